"""One State for all layers of a sequence: every layer goes on from what the one before has left, call after call."""

import copy
import threading

import pytest
import torch
from oracle import models
from transformers import DynamicCache

import trainless
from trainless import seams

from .reference import attention_of, softmax_over
from .test_seams import PADDED, _logits
from .test_state import STEPS, Feed
from .tools import EXACT, Snapshot, build, given_of, same
from .toys import registered, toy


def _after(kept, real):
    """(B,): what a layer leaves: a third of what it found, and its real rows."""
    return kept / 3 + real.to(torch.float64).sum(1)


def _gain(site):
    def value(call, stats, state):
        b, _, _, lq, _ = call.shape
        kept = state.get("kept")
        real = torch.ones(b, lq, dtype=torch.bool) if call.real is None else call.real
        kept = _after(torch.zeros(b, dtype=torch.float64) if kept is None else kept, real)
        state.set("kept", kept)
        return (1 / (1 + kept))[:, None, None, None]

    return [seams.Gain(value, scope="layers")]


SHARED = toy("shared", _gain)
OWN = toy("own", lambda site: [c.but(scope="sequence") for c in _gain(site)])


def _dense():
    kept = [None]

    def attention(module, query, key, value, seen, scaling, kwargs):
        lq, lk = seen.shape[2:]
        real = seen[:, 0, :, lk - lq :].diagonal(dim1=-2, dim2=-1)
        kept[0] = _after(
            torch.zeros(query.shape[0], dtype=torch.float64) if kept[0] is None else kept[0], real
        )
        return softmax_over(_logits(query, key, scaling), seen) @ value / (1 + kept[0][:, None, None, None])

    return attention


def _fed(model, ids, mask, cache=None):
    feed, at, found = Feed(model, ids, mask, cache), 0, []
    for size in STEPS:
        out = feed.call(size)
        found.append(out if mask is None else out[mask[:, at : at + size].bool()])
        at += size
    return found


@PADDED
def test_every_layer_goes_on_from_the_one_before(padded):
    model = build("llama")
    ids, mask = models.left_padded([20, 14]) if padded else (models.prompt(20, 1), None)
    with attention_of(model, _dense()):
        want = _fed(model, ids, mask)
    before = Snapshot(model)
    with registered(SHARED, OWN):
        patch = trainless.patch(model, "toy_shared")
        same(_fed(model, ids, mask), want, EXACT)
        same(_fed(model, ids, mask), want, EXACT)  # a new cache begins anew
        assert patch.verify()
        patch.remove()
        before.check(model)
        with trainless.patched(model, "toy_own"):  # the test would see a State for each layer
            assert (_fed(model, ids, mask)[-1] - want[-1]).abs().max() > 1e-6


def test_it_moves_with_the_cache_and_caches_do_not_mix():
    model = build("llama")
    ids, _ = models.left_padded([20, 20])
    with attention_of(model, _dense()):
        want = _fed(model, ids, None)
    with registered(SHARED), trainless.patched(model, "toy_shared"):
        feed, other = Feed(model, ids), Feed(model, ids[:1])
        feed.call(STEPS[0]), other.call(3)
        moved = feed.rows([1, 1])
        moved.cache = copy.deepcopy(feed.cache)
        moved.cache.reorder_cache(torch.tensor([1, 1]))
        for number, size in enumerate(STEPS[1:], 1):
            same([moved.call(size)], [want[number][[1, 1]]], EXACT)
            other.call(1)
            same([feed.call(size)], [want[number]], EXACT)
        feed.cache.reset()
        again = Feed(model, ids, cache=DynamicCache())
        same([again.call(STEPS[0])], [want[0]], EXACT)


def test_threads_have_one_each():
    model = build("llama")
    prompts = [models.prompt(20, n) for n in (1, 2, 3)]
    with registered(SHARED), trainless.patched(model, "toy_shared"):
        want = [_fed(model, ids, None) for ids in prompts]
        got, start = {}, threading.Barrier(3)

        def run(n):
            with torch.no_grad():
                start.wait()
                got[n] = _fed(model, prompts[n], None)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
        [t.start() for t in threads], [t.join() for t in threads]
    for n in range(3):
        same(got[n], want[n], EXACT)


def test_two_patches_on_different_layers_have_one_each():
    model = build("llama")
    ids = models.prompt(20, 1)
    with registered(SHARED):
        with trainless.patched(model, "toy_shared", where={"layers": [0]}):
            with trainless.patched(model, "toy_shared", where={"layers": "1:"}):
                seen = []

                def note(site, seen=seen):
                    return [seams.Observe(lambda c, s, state: seen.append(state), scope="layers")]

                with registered(toy("note", note)), trainless.patched(model, "toy_note"):
                    feed = Feed(model, ids)
                    feed.call(14), feed.call(1)
        kept = feed.cache.layers[0].states
        assert len(seen) == 6 and len({id(s) for s in seen}) == 1
    first, second = (kept[n].get("kept") for n in sorted(n for n in kept if n.startswith("toy_shared at")))
    torch.testing.assert_close(first, torch.tensor([14 / 3 + 1], dtype=torch.float64))
    one = 14 / 3 + 14
    torch.testing.assert_close(second, torch.tensor([(one / 3 + 1) / 3 + 1], dtype=torch.float64))


def test_around_and_encoders_share_it_within_a_forward():
    def around(site):
        def value(proceed, call, state):
            counts = state.get("n")
            state.set("n", torch.ones(1) if counts is None else counts + 1)
            seen.append(int(state.get("n")))
            return proceed(*call.args, **call.kwargs)

        return [seams.Around(value, scope="layers")]

    for family in ("llama", "bert"):
        seen: list[int] = []
        model = build(family)
        layers = 3
        with registered(toy("around", around)), trainless.patched(model, "toy_around"):
            for _ in range(2):
                model(**({"input_ids": models.prompt(6)} if family == "llama" else given_of("bert", model)))
        assert seen == [*range(1, layers + 1)] * 2, family


def test_misuse_is_refused_by_name():
    def keyed(site):
        def value(call, stats, state):
            state.set("by_key", torch.zeros(1, call.shape[4]), keys=1)

        return [seams.Observe(value, scope="layers")]

    model = build("llama", layers=1)
    on_denoisers = toy("on_denoisers", _gain, hosts=frozenset({"diffusers"}))
    with registered(toy("keyed", keyed), on_denoisers):
        with trainless.patched(model, "toy_keyed"):
            with pytest.raises(trainless.InputError, match="no axis over keys"):
                model(models.prompt(6))
        with pytest.raises(
            trainless.NoMatch, match="scope 'layers' is asked for, and here it lasts for a run"
        ):
            trainless.patch(build("pixart"), "toy_on_denoisers")
