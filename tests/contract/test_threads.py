"""Threads with a cache, or a denoiser call, of their own get what they get one after the other, bit for bit."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import models, replay, vlms
from transformers import DynamicCache

import trainless
from trainless.edits.journal import Journal
from trainless.hosts import gate as gate_module
from trainless.hosts.transformers.version import CACHE_NAME

from .cases import MAIN, Case, named
from .tools import build, given_of, same

pytestmark = pytest.mark.ways

WORKERS = 4
ROUNDS = 2
SIZES = (20, 24, 16, 28)


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads that change places between almost any two steps of the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """``work(0)`` … ``work(WORKERS - 1)`` in threads that start together; their results or errors."""
    results: list[Any] = [None] * WORKERS
    start = threading.Barrier(WORKERS)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def jobs(model: Any, family: str) -> Callable[[int], list[torch.Tensor]]:
    """What each thread does: a batch of its own, padded in every second thread, call by call."""

    def language(number: int) -> list[torch.Tensor]:
        calls = [12 + number, 1, 1, 2 + number, 1]
        lengths = [sum(calls), sum(calls) - 4 - number]
        if number % 2:
            ids, mask = models.left_padded(lengths, seed=number)
        else:
            ids, mask = models.prompt(sum(calls), seed=number), None
        return replay(model, None, ids, mask, calls)

    def vision(number: int) -> list[torch.Tensor]:
        given = vlms.row(model, vlms.batch(model, family), number % 2)
        return vlms.replay(model, None, given, [given.prompt, 1, 1, 3])

    def denoiser(number: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**given_of(family, model, SIZES[number]))[0] for _ in range(2)]

    if family in vlms.FAMILIES:
        return vision
    return denoiser if family in models.DENOISERS else language


def of(case: Case) -> str:
    # Qwen-VL keeps the positions of its last batch on the model, so that threads mix even without a patch.
    return "llava" if set(case.families) & set(vlms.FAMILIES) else next(iter(case.families))


@pytest.mark.parametrize(**named(MAIN))
def test_every_method_in_threads(case: Case) -> None:
    family = of(case)
    model = build(family)
    work = jobs(model, family)
    with trainless.patched(model, case.method, **case.parameters) as patch:
        alone = [work(i) for i in range(WORKERS)]
        once = [(r["fired"], r["acted"]) for r in patch.report().to_dict()["methods"]]
        for _ in range(ROUNDS):
            for got, want in zip(at_once(work), alone, strict=True):
                if isinstance(got, Exception):
                    raise got
                same(got, want)
        counted = [(r["fired"], r["acted"]) for r in patch.report().to_dict()["methods"]]
    assert counted == [((1 + ROUNDS) * fired, (1 + ROUNDS) * acted) for fired, acted in once]


def test_a_prefill_in_chunks_beside_whole_ones() -> None:
    """Eviction waits for the last chunk in the thread that feeds chunks, and in no other."""
    model = build("llama")
    prompts = [models.prompt(30 + i, seed=i) for i in range(WORKERS)]

    def generate(number: int) -> torch.Tensor:
        chunks = {"prefill_chunk_size": 7} if number % 2 else {}
        ids = prompts[number]
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            **chunks,
        )

    with trainless.patched(model, "h2o", heavy=4, recent=3):
        alone = [generate(i) for i in range(WORKERS)]
        for _ in range(ROUNDS):
            for got, want in zip(at_once(generate), alone, strict=True):
                if isinstance(got, Exception):
                    raise got
                assert torch.equal(got, want)


def test_image_tokens_are_said_for_one_thread() -> None:
    """A mask that one thread gives for its own embeddings is not taken for another thread's prompt."""
    model = build("llava")
    work = jobs(model, "llava")
    with trainless.patched(model, "var", sink_dims=list(vlms.DIMS), layers="1:"):
        alone = [work(i) for i in range(WORKERS)]
        given = vlms.batch(model, "llava")
        wrong = torch.zeros(given.ids.shape, dtype=torch.bool)

        def other(number: int) -> list[torch.Tensor]:
            if number == 0:
                with trainless.image_tokens(model, wrong):
                    return work(1)
            return work(number)

        for got, want in zip(at_once(other)[1:], alone[1:], strict=True):
            if isinstance(got, Exception):
                raise got
            same(got, want)


# ---------------------------------------------------------------- changes of patches beside calls


def test_pausing_waits_for_calls_and_calls_for_pausing() -> None:
    """A call sees the patch at all of its layers or at none, however often another thread switches it."""
    model = build("llama", dtype=torch.float32, exact=False)
    ids = models.prompt(20)
    with torch.no_grad():
        plain = model(ids).logits
        patch = trainless.patch(model, "attn_temperature", temperature=0.5)
        sharp = model(ids).logits
    seen = {"plain": 0, "sharp": 0}
    stop = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            for _ in range(40):
                with patch.paused():
                    pass
            stop.set()
            return
        while not stop.is_set():
            with torch.no_grad():
                got = model(ids).logits
            which = "plain" if torch.equal(got, plain) else "sharp"
            assert torch.equal(got, plain) or torch.equal(got, sharp)
            seen[which] += 1

    assert at_once(work) == [None] * WORKERS
    assert seen["sharp"]


def test_the_first_patch_waits_for_a_call_that_is_under_way() -> None:
    model = build("llama", dtype=torch.float32, exact=False)
    ids = models.prompt(12)
    inside, go_on = threading.Event(), threading.Event()

    def hold(*unused: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    hook = model.model.layers[1].register_forward_pre_hook(hold)
    with torch.no_grad():
        go_on.set()
        plain = model(ids).logits
        go_on.clear(), inside.clear()
        results: list[Any] = []
        caller = threading.Thread(target=lambda: results.append(model(ids).logits.detach()))
        caller.start()
        assert inside.wait(30)
        patcher = threading.Thread(
            target=lambda: results.append(trainless.patch(model, "attn_temperature", temperature=0.5))
        )
        patcher.start()
        patcher.join(0.3)
        assert patcher.is_alive()  # it waits
        go_on.set()
        caller.join(), patcher.join()
    hook.remove()
    assert torch.equal(results[0], plain)
    results[1].remove()


def test_a_patch_may_go_between_the_beginning_of_a_call_and_its_first_hook() -> None:
    """Torch has listed our hooks then, and calls them all the same; it is a plain call, and the next one as well."""
    model = build("llama", dtype=torch.float32, exact=False)
    ids = models.prompt(12)
    with torch.no_grad():
        plain = model(ids).logits
        patch = trainless.patch(model, "h2o", heavy=2, recent=3)

        def off(*unused: Any) -> None:
            if patch.applied:
                remover = threading.Thread(target=patch.remove)
                remover.start(), remover.join()

        hook = model.register_forward_pre_hook(off, prepend=True)
        first = model(ids).logits
        assert not patch.applied
        hook.remove()
        assert torch.equal(first, plain) and torch.equal(model(ids).logits, plain)


def test_a_call_that_begins_while_a_model_is_first_watched_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, inside, go_on = torch.nn.Linear(2, 2), threading.Event(), threading.Event()
    frames = gate_module._current_frames

    def hold(*unused: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    module.register_forward_pre_hook(hold)
    caller = threading.Thread(target=lambda: module(torch.zeros(1, 2)))

    def late() -> Any:
        found = frames()
        if not caller.ident:  # right behind the look at what is under way
            caller.start()
            assert inside.wait(30)
        return found

    monkeypatch.setattr(gate_module, "_current_frames", late)
    gate, journal = gate_module.Gate("a module"), Journal()
    gate.watch(module, journal)
    try:
        assert caller.ident in {thread for thread, _ in gate.calls}
    finally:
        go_on.set()
        caller.join()
        journal.undo()


@pytest.mark.parametrize("standing", [True, False])
def test_a_change_from_inside_a_call_is_refused(standing: bool) -> None:
    model = build("llama", dtype=torch.float32, exact=False)
    ids = models.prompt(12)
    patch = trainless.patch(model, "head_gain", heads=[[0, 0]], gain=0.5) if standing else None

    def change(*unused: Any) -> None:
        trainless.patch(model, "attn_temperature", temperature=0.5)

    hook = model.model.layers[1].register_forward_pre_hook(change)
    with pytest.raises(trainless.InputError, match="from inside a call"):
        model(ids)
    hook.remove()
    if patch is not None:
        patch.remove()
    model(ids)
    assert not [key for m in model.modules() for key in vars(m) if key.startswith("_trainless")]


def test_a_call_ended_by_ctrl_c_is_forgotten() -> None:
    """KeyboardInterrupt skips torch's hooks, so the gate has to see for itself that the call is over."""
    model = build("llama", dtype=torch.float32, exact=False)
    patch = trainless.patch(model, "attn_temperature", temperature=0.5)

    def stop(*unused: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(models.prompt(12))
    hook.remove()
    with patch.paused():
        model(models.prompt(12))
    patch.remove()


def test_a_cache_is_used_by_one_thread_at_a_time():
    """The second call is refused by name, the first one is not disturbed, and calls in turn are nobody's business."""
    model, ids = models.build("llama", layers=1), models.prompt(12, seed=1)
    trainless.patch(model, "h2o", heavy=4, recent=4)
    alone, shared = (DynamicCache(config=model.config) for _ in range(2))
    for cache in (alone, shared):
        model(ids, **{CACHE_NAME: cache})
    inside, go_on = threading.Event(), threading.Event()

    def wait(*unused: Any) -> None:
        inside.set()
        go_on.wait(30)

    got: list[torch.Tensor] = []
    first = threading.Thread(
        target=torch.no_grad(lambda: got.append(model(ids[:, :1], **{CACHE_NAME: shared}).logits))
    )
    hook = model.model.layers[0].mlp.register_forward_pre_hook(wait)
    first.start()
    assert inside.wait(30)
    hook.remove()
    with pytest.raises(trainless.InputError, match="in use by a call in another thread"):
        model(ids[:, :1], **{CACHE_NAME: shared})
    go_on.set()
    first.join()
    same(got[0], model(ids[:, :1], **{CACHE_NAME: alone}).logits)
    same(model(ids[:, 1:2], **{CACHE_NAME: shared}).logits, model(ids[:, 1:2], **{CACHE_NAME: alone}).logits)
