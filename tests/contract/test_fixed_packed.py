"""Packed layers in buffers of fixed size: step by step what the layer does that decides on the host, compiled or not."""

import copy
import io
import os
import pickle

import pytest
import torch
from oracle import models, replay
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

import trainless
from trainless.cache import (
    FixedEvictingLayer,
    FixedPackedLayer,
    FixedTiersLayer,
    PackedLayer,
    fixed_packed,
    fixed_tiers,
)

from .tools import same

KV = {"use": "kvquant", "with": {"group": 4, "residual": 3}}
CASES = {
    "kvquant": [KV],
    "a share waits": [{"use": "kvquant", "with": {"group": 3, "residual": 0.3, "k_bits": 8, "v_bits": 2}}],
    "zipcache": [{"use": "zipcache", "with": {"interval": 5, "probes": (3, 4)}}],
    "zipcache, in groups": [{"use": "zipcache", "with": {"interval": 5, "group": 4}}],
    "zipcache, three at a time": [
        {"use": "zipcache", "with": {"interval": 3, "bits": (8, 4), "salient": 0.4}}
    ],
    "values alone": [{"use": "kvquant", "with": {"group": 4, "residual": 0, "k_bits": 16}}],
}
BOTH = {
    "h2o": [{"use": "h2o", "with": {"heavy": 4, "recent": 4}}, KV],
    "h2o, one choice for all heads": [
        {"use": "h2o", "with": {"heavy": 5, "recent": 2, "normalise": True}},
        KV,
    ],
    "streaming": [{"use": "streaming", "with": {"recent": 7}}, KV],
    "tova": [{"use": "tova", "with": {"capacity": 0.6}}, KV],
    "snapkv": [{"use": "snapkv", "with": {"capacity": 0.6}}, KV],
}
ALONE = [
    pytest.param(use, kind, id=f"{name}-{kind}")
    for name, use in CASES.items()
    for kind in ("dynamic", "static")
]
BESIDE = [pytest.param(use, "static", id=name) for name, use in BOTH.items()]
NAMED = pytest.mark.parametrize(("use", "kind"), ALONE + BESIDE)
PADDED = pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
CALLS = [14, *[1] * 11, 5, *[1] * 6]


def build(dtype=torch.float64, layers=3):
    return models.build("llama", dtype=dtype, exact=dtype == torch.float64, layers=layers)


def text(padded: bool, calls=CALLS):
    length = sum(calls)
    if padded:
        return models.left_padded([length, length - 5, length - 9])
    return torch.cat([models.prompt(length), models.prompt(length, 1)]), None


def cache_of(kind: str, model, capacity: int = 40):
    return StaticCache(config=model.config, max_cache_len=capacity) if kind == "static" else DynamicCache()


@pytest.fixture
def on_the_host(monkeypatch):
    """Make layers that never settle."""

    def made(yes: bool = True):
        monkeypatch.undo()
        for cls in (FixedPackedLayer, FixedEvictingLayer, FixedTiersLayer) if yes else ():
            monkeypatch.setattr(cls, "suits", staticmethod(lambda *rules: False))

    return made


def wanted(on_the_host, use, ids, mask, calls, dtype=torch.float64, layers=3):
    """What layers do that decide on the host: the outputs and the cache."""
    on_the_host()
    model, cache = build(dtype, layers), DynamicCache()
    trainless.patch(model, use)
    found = replay(model, None, ids, mask, calls, cache)
    assert not any(isinstance(layer, FixedPackedLayer) for layer in cache.layers)
    on_the_host(False)
    return found, cache


def alike(cache, other):
    """The same tokens at the same bits, and what waits beside them."""
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert a.kept() == b.kept() and a.seen == b.seen and a.ages == b.ages
        if a.counts != a.ages:
            continue  # one moves codes together, the other leaves them where they are
        assert [r.filled for r in a.store.runs] == [r.filled for r in b.store.runs]
        for one, two in zip(a.store.segments, b.store.segments, strict=True):
            for name, tensor in one.tensors().items():
                torch.testing.assert_close(tensor, getattr(two, name), rtol=0, atol=1e-11)
        torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=1e-11)


def frozen(cache) -> list[bool]:
    return [isinstance(layer, FixedPackedLayer) and layer.fed is not None for layer in cache.layers]


@NAMED
@PADDED
def test_steps_on_buffers_are_those_of_the_layer_that_decides_on_the_host(on_the_host, use, padded, kind):
    ids, mask = text(padded)
    want, base = wanted(on_the_host, use, ids, mask, CALLS)
    model = build()
    patches = trainless.patch(model, use)
    cache = cache_of(kind, model)
    got = replay(model, None, ids, mask, CALLS, cache)
    assert all(frozen(cache))
    for a, b, real in zip(got, want, _real(mask, ids).split(CALLS, 1), strict=True):
        assert (a - b)[real].abs().max() < 1e-11
    alike(cache, base)
    assert any("packed/fixed" in m.kernels for m in patches.report().methods)


@pytest.mark.parametrize(("group", "lengths"), [(3, [14, 14]), (0, [5, 4])], ids=["last group", "short row"])
def test_groups_with_empty_slots_stay_beside_those_that_are_filled(on_the_host, group, lengths):
    """A prompt's groups of the size of later ones, of which one has fewer tokens: nothing is joined to them."""
    use = [{"use": "zipcache", "with": {"interval": 5, "group": group}}]
    calls = [lengths[0], *[1] * 12]
    ids, mask = models.left_padded([n + 12 for n in lengths])
    want, _ = wanted(on_the_host, use, ids, mask, calls)
    model, cache = build(), DynamicCache()
    trainless.patch(model, use)
    got = replay(model, None, ids, mask, calls, cache)
    assert all(frozen(cache))
    for a, b, real in zip(got, want, _real(mask, ids).split(calls, 1), strict=True):
        assert (a - b)[real].abs().max() < 1e-11


def _real(mask, ids):
    return torch.ones_like(ids).bool() if mask is None else mask.bool()


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_in_less_than_double_precision_the_difference_is_rounding(on_the_host, use, kind, dtype):
    calls = [14, *[1] * 3]
    ids, mask = text(True, calls)
    want, _ = wanted(on_the_host, use, ids, mask, calls, dtype)
    model = build(dtype)
    trainless.patch(model, use)
    got = replay(model, None, ids, mask, calls, cache_of(kind, model))
    for a, b, real in zip(got, want, mask.bool().split(calls, 1), strict=True):
        assert (a - b)[real].abs().max() < (1e-4 if dtype == torch.float32 else 0.05) * b[real].abs().max()


# By default one of each kind of layer: packed, in tiers, evicting with and without scores.
COMPILED = {
    name: pytest.param(
        use, id=name, marks=[] if name in ("kvquant", "zipcache", "h2o", "streaming") else pytest.mark.grid
    )
    for name, use in {"kvquant": [KV], "zipcache": CASES["zipcache"], **BOTH}.items()
}
STEPS = 200 if os.environ.get("TRAINLESS_ALL") else 50  # a dozen groups are packed on the way


@pytest.mark.slow
@pytest.mark.parametrize("use", COMPILED.values())
@PADDED
def test_compiled_whole_once_for_many_steps(on_the_host, use, padded):
    steps = STEPS
    calls = [14, *[1] * steps]
    ids, mask = text(padded, calls)
    want, base = wanted(on_the_host, use, ids, mask, calls, layers=1)
    model = build(layers=1)
    patch = trainless.patch(model, use)
    cache, counter = cache_of("static", model, sum(calls)), CompileCounter()
    whole = torch.ones(len(ids), sum(calls), dtype=torch.long) if mask is None else mask
    position = (_real(mask, ids).long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(ids[:, :14], attention_mask=whole[:, :14], position_ids=position[:, :14], past_key_values=cache)
        torch.compiler.reset()
        step = torch.compile(model, fullgraph=True, backend=counter)
        for at in range(14, sum(calls)):
            seen = whole.clone()
            seen[:, at + 1 :] = 0
            given = ids[:, at : at + 1].clone()
            out = step(
                given, attention_mask=seen, position_ids=position[:, at : at + 1], past_key_values=cache
            )
            assert (out.logits[:, 0] - want[at - 13][:, 0]).abs().max() < 1e-10
    torch.compiler.reset()
    assert counter.frame_count == 1
    for report in patch.report().methods:
        assert report.fired == len(cache.layers) * len(calls) and report.kernels["packed/fixed"] > 0
    alike(cache, base)


def _copied(cache, model):
    return copy.deepcopy(cache)


def _on_disk(cache, model):
    file = io.BytesIO()
    pickle.dump(cache, file)
    file.seek(0)
    return pickle.load(file)


def _reordered(cache, model):
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    return cache


def _chosen(cache, model):
    cache.batch_select_indices(torch.tensor([2, 0]))
    return cache


def _repeated(cache, model):
    cache.batch_repeat_interleave(2)
    return cache


def _reset(cache, model):
    cache.reset()
    replay(model, None, *text(True, [14, 1, 1]), [14, 1, 1], cache)
    return cache


@NAMED
@pytest.mark.parametrize(
    "change", [_copied, _on_disk, _reordered, _chosen, _repeated, _reset], ids=lambda f: f.__name__[1:]
)
def test_what_is_done_to_a_frozen_cache(on_the_host, use, kind, change):
    ids, mask = text(True, [14, 1, 1])
    found = []
    for host in (True, False):
        on_the_host(host)
        model = build()
        trainless.patch(model, use)
        cache = cache_of("dynamic" if host else kind, model)
        replay(model, None, ids, mask, [14, 1, 1], cache)
        assert host or all(frozen(cache))
        cache = change(cache, model)
        rows = len(cache.layers[0].lengths)
        out = []
        with torch.no_grad():
            for step in range(6):
                given = models.prompt(rows, step)[0][:, None]
                where = (
                    torch.tensor(cache.layers[0].real_seen())[:, None] if step == 3 else where_of(cache, step)
                )
                out.append(model(given, position_ids=where, past_key_values=cache).logits)
        found.append((out, cache))
    (want, base), (got, cache) = found
    same(got, want, 1e-11)
    assert all(frozen(cache)) or change is _on_disk
    alike(cache, base)


def where_of(cache, step):
    """Positions of the next tokens, read without thawing; what they are does not matter as long as they agree."""
    rows = len(cache.layers[0].lengths)
    return torch.tensor(cache.layers[0].lengths)[:, None] + 2 + step if rows else None


def test_two_generations_take_turns(on_the_host):
    ids, _ = text(False)
    calls = [14, *[1] * 8]
    wants = [wanted(on_the_host, [KV], row[None, : sum(calls)], None, calls) for row in ids]
    model = build()
    trainless.patch(model, [KV])
    caches, got = [cache_of("static", model), cache_of("dynamic", model)], ([], [])
    at = 0
    with torch.no_grad():
        for call in calls:
            for cache, out, row in zip(caches, got, ids, strict=True):
                out.append(model(row[None, at : at + call], past_key_values=cache).logits)
            at += call
    for out, cache, (want, base) in zip(got, caches, wants, strict=True):
        same(out, want, 1e-11)
        alike(cache, base)


@pytest.mark.parametrize("name", ["kvquant", "zipcache"])
@pytest.mark.parametrize("part", [16, 4], ids=["one", "a quarter"])
def test_buffers_of_a_dynamic_cache_grow_when_they_are_full(on_the_host, monkeypatch, name, part):
    """Without thawing, and only by what is needed next; the report tells what is held then."""
    use, calls = CASES[name], [18, *[1] * 40]
    ids, mask = text(True, calls)
    want, base = wanted(on_the_host, use, ids, mask, calls)
    monkeypatch.setattr(fixed_packed, "RING", part // 4)
    for module in (fixed_packed, fixed_tiers):
        monkeypatch.setattr(module, "GROWTH", part)
    model, cache = build(), DynamicCache()
    patch = trainless.patch(model, use)
    got = replay(model, None, ids, mask, calls, cache)
    for a, b, real in zip(got, want, mask.bool().split(calls, 1), strict=True):
        assert (a - b)[real].abs().max() < 1e-11
    report = patch.report().methods[0]
    assert report.kernels["packed/fixed"] == 39 * len(cache.layers)
    for layer, row in zip(cache.layers, report.layers, strict=True):
        groups, most = layer.fixed.key.shape[2], int(layer.fixed.packed.max()) // layer.fixed.size
        assert most <= groups <= most + 1 + groups // part and row["bytes_kept"] == layer.nbytes
    alike(cache, base)


def test_a_static_cache_that_is_full_says_so():
    model = build()
    trainless.patch(model, [KV])
    cache = cache_of("static", model, 16)
    ids = models.prompt(20)
    with torch.no_grad():
        model(ids[:, :14], past_key_values=cache)
        model(ids[:, 14:15], past_key_values=cache)
        with pytest.raises(trainless.InputError, match="16 tokens is given 19; make it larger"):
            model(ids[:, 15:19], past_key_values=cache)


@pytest.mark.parametrize("use", [*CASES.values(), *BOTH.values(), BOTH["h2o"][:1]])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "2-D mask"])
def test_a_step_beyond_a_static_cache_says_so_and_writes_nothing(use, masked):
    model = build()
    trainless.patch(model, use)
    ids, mask = text(True, [20])
    cache = cache_of("static", model, 16)

    def call(start: int, stop: int):
        given = {"attention_mask": mask[:, :stop]} if masked else {}
        model(ids[:, start:stop], past_key_values=cache, **given)

    with torch.no_grad():
        call(0, 14)
        call(14, 15)
        call(15, 16)
        assert all(layer.fed is not None for layer in cache.layers)
        before = [t.clone() for layer in cache.layers for t in layer._buffers()]
        for _ in range(2):
            with pytest.raises(trainless.InputError, match="16 tokens is given 17; make it larger"):
                call(16, 17)
        after = [t for layer in cache.layers for t in layer._buffers()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [16] * len(cache.layers)


@pytest.mark.parametrize("use", [CASES["kvquant"], CASES["zipcache"]])
def test_a_packed_cache_goes_on_when_the_patch_is_removed(use):
    ids, found = models.prompt(30), []
    for kind in ("dynamic", "static"):
        model = build()
        patch = trainless.patch(model, use)
        cache = cache_of(kind, model)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            model(ids[:, 20:21], past_key_values=cache)
            patch.remove()
            calls = [(21, 22), (22, 26), (26, 27)]
            found.append([model(ids[:, a:b], past_key_values=cache).logits for a, b in calls])
    same(found[1], found[0], 1e-11)


def test_paused_it_packs_nothing_and_resumes():
    ids, mask = text(True)
    found = []
    for kind in ("dynamic", "static"):
        model = build()
        patch = trainless.patch(model, [KV])
        cache, out, at = cache_of(kind, model), [], 0
        position = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            for number, call in enumerate([14, 1, 1, 1, 1, 1, 1, 1, 1]):
                part = slice(at, at + call)
                given = {"attention_mask": mask[:, : at + call], "position_ids": position[:, part]}
                if number in (3, 4):
                    with patch.paused():
                        out.append(model(ids[:, part], past_key_values=cache, **given).logits)
                else:
                    out.append(model(ids[:, part], past_key_values=cache, **given).logits)
                at += call
        found.append((out, cache))
    same(found[1][0], found[0][0], 1e-11)
    assert all(frozen(found[1][1]))
    alike(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_bytes_are_those_of_every_storage(kind):
    model = build(torch.float32)
    patch = trainless.patch(model, [KV])
    cache = cache_of(kind, model)
    replay(model, None, *text(True, [14, 1]), [14, 1], cache)
    for layer, row in zip(cache.layers, patch.report().methods[0].layers, strict=True):
        held = [*layer.fixed.tensors().values(), layer.residual]
        count = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
        assert layer.nbytes == count == row["bytes_kept"]
        assert row["tokens_seen"] == 15
        assert layer.fed is not None
    assert isinstance(cache.layers[0], PackedLayer)


GENERATED = {**BOTH, "kvquant": [KV], "zipcache": CASES["zipcache"], "h2o alone": BOTH["h2o"][:1]}


@pytest.mark.parametrize("use", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "chunks"]
)
def test_generate_on_a_static_cache_with_padding(use, more):
    """generate() hands over a mask as wide as the cache then, and nobody may take its end for padding."""
    if use is CASES["zipcache"] and "prefill_chunk_size" in more:
        pytest.skip("looks at the whole prompt")
    model = build(torch.float32)
    trainless.patch(model, use)
    ids, mask = models.left_padded([19, 12])
    found = [
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
            **static,
        )
        for static in ({}, {"cache_implementation": "static"})
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    same(found[1].logits, found[0].logits, 1e-4)
    assert all(layer.fed is not None for layer in found[1].past_key_values.layers)
