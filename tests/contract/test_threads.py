"""Threads with a cache, or a denoiser call, of their own get what they get one after the other, bit for bit."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import models, replay, vlms

import trainless

from .cases import MAIN, Case, named
from .tools import build, given_of, same

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
