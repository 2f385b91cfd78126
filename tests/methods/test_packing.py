"""Caches held at few bits: bytes to the byte, packed once, beside an evictor, after the patch is gone."""

import copy

import pytest
import torch
from oracle import H2O, KvQuant, ZipCache, install, models, real_rows, replay
from transformers import DynamicCache, StaticCache

import trainless
from trainless.cache import PackedLayer
from trainless.preview.memory import estimate

WIDTH, HEADS, LAYERS = 8, 2, 3
ZIP = {"interval": 5, "probes": (3, 4)}


def build(dtype=torch.float64, **more):
    return models.build("llama", dtype=dtype, exact=dtype == torch.float64, **more)


def layer_bytes(layer: PackedLayer) -> int:
    """Every storage that the layer holds for keys and values, counted once."""
    tensors = [layer.keys, layer.values]
    for segment in layer.store.segments:
        tensors += [t for n, t in segment.tensors().items() if n != "index"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def side_bytes(layer: PackedLayer) -> int:
    found = [layer.tail, layer.scores, *layer.store.positions()]
    found += [s.index for s in layer.store.segments]
    return sum(t.untyped_storage().nbytes() for t in found if t is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("k_bits", "v_bits"), [(4, 4), (2, 8), (16, 4), (8, 16)])
@pytest.mark.parametrize("lengths", [[40], [40, 40], [40, 31, 9]], ids=str)
def test_bytes_are_the_budget(lengths, k_bits, v_bits, dtype):
    model = build(dtype)
    patch = trainless.patch(model, "kvquant", k_bits=k_bits, v_bits=v_bits, group=4, residual=5)
    ids, mask = models.left_padded(lengths)
    cache = DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    packed = (max(lengths) - 5) // 4 * 4
    # The row that lacks most whole groups has most tokens waiting.
    waits = max(n - max(0, n - 5) // 4 * 4 for n in lengths)
    item, groups = dtype.itemsize, packed // 4
    codes = sum(WIDTH * (item if bits == 16 else bits / 8) for bits in (k_bits, v_bits)) * packed
    numbers = (2 * groups * WIDTH if k_bits < 16 else 0) + (groups * WIDTH + 2 * packed if v_bits < 16 else 0)
    exact = len(lengths) * HEADS * (codes + numbers * item + waits * 2 * WIDTH * item)
    for layer in cache.layers:
        assert layer_bytes(layer) == exact
        # A position is an int32 per token and head.
        assert side_bytes(layer) == 4 * len(lengths) * HEADS * (packed + waits)
        assert layer.nbytes == exact + side_bytes(layer)
    rows = patch.report().methods[0].layers
    assert [r["bytes_kept"] for r in rows] == [layer.nbytes for layer in cache.layers]
    assert rows[0]["tokens_kept"] == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_bytes_of_two_tiers_are_the_budget(dtype):
    model = build(dtype)
    trainless.patch(model, "zipcache", **ZIP)
    cache = DynamicCache()
    model(models.prompt(40), past_key_values=cache)
    item = dtype.itemsize

    def tier(n, bits):
        return n * WIDTH * 2 * bits / 8 + (3 * WIDTH + 2 * n) * item

    for layer in cache.layers:
        assert layer_bytes(layer) == HEADS * (tier(24, 4) + tier(16, 2))
        assert side_bytes(layer) == 4 * HEADS * 40 == layer.nbytes - layer_bytes(layer)


@pytest.mark.parametrize("group", [0, 7, 64])
def test_zipcache_in_groups_follows_its_rule(group):
    """A padded batch whose tiers have several groups, and chunks of later tokens, against the dense rule."""
    from contract.cases import ProbedZipCache

    from trainless.patchers.zipcache import ZipCache as Method

    given = {"interval": 30, "group": group, "bits": (4, 2), "probes": (4, 0.2)}
    model, calls = build(layers=2), [120, *[1] * 31, 4]
    ids, mask = models.left_padded([155, 131])
    rule = ProbedZipCache(Method(**given), interval=30, bits=(4, 2), k_group=group or None)
    with install(model, rule):
        want = replay(model, None, ids, mask, calls)
    with trainless.patched(model, "zipcache", **given):
        got = replay(model, None, ids, mask, calls, DynamicCache())
    for a, b, real in zip(got, want, real_rows(mask, calls, 2), strict=True):
        assert (a - b)[real].abs().max() < 1e-10


def test_groups_bring_keys_of_a_long_prompt_closer():
    """Keys that drift along a text: over a whole prompt a step spans the drift, in groups a part of it."""
    model, ids, lost = build(layers=1), models.prompt(400), []
    for group in (0, 64):
        cache = DynamicCache()
        with trainless.patched(model, "zipcache", group=group, bits=(2, 2)):
            model(ids, past_key_values=cache)
        steps = [s.key_step.abs().mean() for s in cache.layers[0].store.segments]
        lost.append(float(sum(steps)))
    assert lost[1] < 0.9 * lost[0]


@pytest.mark.parametrize(
    "use",
    [
        ["kvquant", {"group": 4, "residual": 5}],
        ["zipcache", ZIP],
        ["zipcache", {**ZIP, "group": 7}],
        ["zipcache", {**ZIP, "group": 0}],
    ],
    ids=str,
)
def test_the_estimate_is_what_a_prefill_then_holds(use):
    from trainless.patch.binding import bind
    from trainless.recipes import resolve

    model = build(torch.float32)
    parts, bindings = bind(model, resolve(use[0], use[1]))
    found = estimate(parts, bindings, [40])
    trainless.patch(model, use[0], **use[1])
    cache = DynamicCache()
    model(models.prompt(40), past_key_values=cache)
    assert found is not None and found.points[0].patched == sum(layer.nbytes for layer in cache.layers)


@pytest.mark.parametrize(
    "use", [["kvquant", {"group": 4, "residual": 2}], ["zipcache", ZIP]], ids=lambda u: u[0]
)
def test_what_is_packed_stays_as_it_is(use):
    """Later chunks are joined on; no code and no parameter of an earlier one changes."""
    model = build()
    trainless.patch(model, use[0], **use[1])
    ids, cache, before = models.prompt(40), DynamicCache(), None
    replay(model, None, ids[:, :20], None, [20], cache)
    for start in range(20, 40):
        before = [copy.deepcopy(layer.store.runs) for layer in cache.layers]
        model(ids[:, start : start + 1], position_ids=torch.tensor([[start]]), past_key_values=cache)
        for runs, layer in zip(before, cache.layers, strict=True):
            for was, now in zip(runs, layer.store.runs, strict=False):
                for name, tensor in was.segment.tensors().items():
                    assert torch.equal(getattr(now.segment, name)[:, :, : tensor.shape[2]], tensor), name
    assert before and sum(len(layer.store.runs) for layer in cache.layers) > 0


def test_packing_reads_no_pads():
    model = build()
    trainless.patch(model, "kvquant", group=4, residual=0)
    ids, mask = models.left_padded([24, 17])
    other = ids.masked_fill(~mask.bool(), 5)
    caches = []
    for given in (ids, other):
        cache = DynamicCache()
        model(given, attention_mask=mask, past_key_values=cache)
        caches.append(cache)
    for one, two in zip(*(c.layers for c in caches), strict=True):
        for a, b in zip(one.store.segments, two.store.segments, strict=True):
            for name, tensor in a.tensors().items():
                assert torch.equal(tensor, getattr(b, name)), name


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("how", ["paused", "removed"])
def test_without_its_patch_a_packed_cache_returns_what_it_holds(how, padded):
    """As numbers, in the places where the model looks for them: like a stock cache with the rounded keys in it."""
    model, stock = build(), build()
    ids, mask = models.left_padded([30, 21]) if padded else (models.prompt(30), None)
    every = torch.ones_like(ids) if mask is None else mask
    patch = trainless.patch(model, "kvquant", k_bits=2, v_bits=4, group=4, residual=3)
    cache, plain = DynamicCache(), DynamicCache()
    replay(model, None, ids[:, :24], None if mask is None else mask[:, :24], [24], cache)
    replay(stock, None, ids[:, :24], None if mask is None else mask[:, :24], [24], plain)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        theirs.keys, theirs.values = ours._laid_out(0)
    positions = every.cumsum(1).sub(1).clamp_min(0)

    def run(m, c, lo, hi):
        seen = None if mask is None else mask[:, :hi]
        return m(
            ids[:, lo:hi], attention_mask=seen, position_ids=positions[:, lo:hi], past_key_values=c
        ).logits

    if how == "removed":
        patch.remove()
        got = [run(model, cache, 24, 25), run(model, cache, 25, 29)]
    else:
        with patch.paused():
            got = [run(model, cache, 24, 25), run(model, cache, 25, 29)]
    want = [run(stock, plain, 24, 25), run(stock, plain, 25, 29)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    if how == "paused":
        slots = cache.layers[0].store.slots
        run(model, cache, 29, 30)
        assert cache.layers[0].store.slots > slots, "it packs again"


def test_an_evictor_beside_it_drops_packed_tokens():
    """Codes move together once enough of them are empty, and bytes follow; the set is the evictor's own."""
    model, ids = build(), models.prompt(100)
    trainless.patch(model, [
        {"use": "h2o", "with": {"heavy": 8, "recent": 8}},
        {"use": "kvquant", "with": {"group": 4, "residual": 2}},
    ])  # fmt: skip
    cache, most = DynamicCache(), 0
    replay(model, None, ids[:, :30], None, [30], cache)
    layer = cache.layers[0]
    assert isinstance(layer, PackedLayer) and layer.store.slots == 12 and layer.slots == 16
    for start in range(30, 100):
        model(ids[:, start : start + 1], position_ids=torch.tensor([[start]]), past_key_values=cache)
        most = max(most, layer.slots)
        kept = layer.kept()[0]
        assert all(
            len(head) == 16 and head[-1] == start and set(range(start - 7, start)) <= set(head)
            for head in kept
        )
    assert 16 < most <= 16 + 32 + 6 * HEADS
    assert any(s.index is not None for s in layer.store.segments), "groups have lost tokens"


def test_a_prefill_in_chunks_is_one_prefill():
    model = build(torch.float32)
    trainless.patch(model, "kvquant", group=4, residual=3)
    ids = models.prompt(30)
    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, prefill_chunk_size=7), whole)


@pytest.mark.parametrize("method", ["kvquant", "zipcache"])
def test_dropped_and_moved_codes_are_those_of_the_oracle(method, monkeypatch):
    """Every hole is closed at once, so slots move at nearly every step; padded rows lose other tokens than full ones."""
    monkeypatch.setattr("trainless.cache.packed.SLACK", 0)
    ids, mask = models.left_padded([46, 35])
    calls, keeps = [20, *[1] * 12, 5, *[1] * 9], H2O(6, 5)
    given = {"group": 3, "residual": 1} if method == "kvquant" else {"interval": 3, "probes": (1, 0)}
    rule = KvQuant(**given, evictor=keeps) if method == "kvquant" else ZipCache(interval=3, evictor=keeps)
    want = replay(build(), [rule, keeps], ids, mask, calls)
    model = build()
    trainless.patch(
        model, [{"use": "h2o", "with": {"heavy": 6, "recent": 5}}, {"use": method, "with": given}]
    )
    got = replay(model, None, ids, mask, calls)
    for a, b, real in zip(got, want, mask.bool().split(calls, 1), strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("kvquant", {"k_bits": 3}, r"k_bits: got 3: give 2, 4, 8, or 16"),
        ("kvquant", {"v_bits": True}, r"v_bits: must be an int; got True"),
        ("kvquant", {"group": 0}, r"group: got 0"),
        ("kvquant", {"residual": -1}, r"residual.*-1"),
        ("kvquant", {"residual": 1.5}, r"residual=1.5"),
        ("zipcache", {"bits": (4, 5)}, r"bits: others=5"),
        ("zipcache", {"bits": (2, 4)}, r"salient tokens would be held at fewer bits.*\(4, 2\)"),
        ("zipvl", {"bits": (2, 8)}, r"important tokens would be held at fewer bits.*\(8, 2\)"),
        ("zipcache", {"salient": 0.0}, r"salient=0.0"),
        ("zipcache", {"probes": (0.05, -1)}, r"probes=-1: a number of tokens"),
        ("zipcache", {"interval": 0}, r"interval"),
    ],
)
def test_bad_numbers_are_refused(method, given, words):
    with pytest.raises(trainless.InputError, match=words):
        trainless.patch(build(), method, **given)


def test_heads_of_no_whole_bytes_are_refused():
    model = models.build("llama", num_attention_heads=4, num_key_value_heads=2, hidden_size=24, head_dim=6)
    with pytest.raises(trainless.NoMatch, match="6 channels of 2 bits are not a whole number of bytes"):
        trainless.patch(model, "kvquant", k_bits=2)


def test_a_static_cache_is_refused_where_tiers_and_an_evictor_meet():
    model = build(torch.float32)
    trainless.patch(model, ["h2o", "zipcache"])
    with pytest.raises(
        trainless.Unsupported, match=r"zipcache: layer 0 of this static cache.*use a dynamic cache"
    ):
        model(models.prompt(8), past_key_values=StaticCache(config=model.config, max_cache_len=20))


def test_rolled_positions_and_packed_keys_conflict():
    with pytest.raises(trainless.Conflict, match="seam position needs every key as it is"):
        trainless.patch(build(), [
            {"use": "streaming", "with": {"recent": 8, "positions": "rolled"}}, {"use": "kvquant"},
        ])  # fmt: skip


def test_random_probe_rows_depend_on_the_length_alone():
    from trainless.patchers.zipcache import ZipCache

    rows = ZipCache(probes=(0.1, 0.2)).probed(50)
    assert rows[-5:].tolist() == [45, 46, 47, 48, 49] and len(rows) == 15 and int(rows[:10].max()) < 45
    assert torch.equal(rows, ZipCache(probes=(0.1, 0.2)).probed(50))
    assert not torch.equal(rows, ZipCache(probes=(0.1, 0.2), seed=1).probed(50))
    assert ZipCache(probes=(4, 3)).probed(3).tolist() == [0, 1, 2]


def test_verify_takes_a_probe_that_is_long_enough():
    patch = trainless.patch(build(torch.float32), "kvquant")
    found = patch.verify()
    assert found and all(check.status == "ok" for check in found.checks), str(found)


@pytest.mark.parametrize("normalise", ["visible", "published"])
@pytest.mark.parametrize("family", ["llava", "paligemma", "gemma3"])
def test_zipcache_follows_its_rule_under_masks_of_images(family, normalise):
    """PaliGemma's prompt and Gemma's images are seen both ways: what a probe row sees is what the mask shows it."""
    from contract.cases import ProbedZipCache
    from oracle import vlms

    from trainless.patchers.zipcache import ZipCache as Method

    model = vlms.build(family)
    given = vlms.batch(model, family)
    calls = [given.prompt, 1, 1, 2, 1, 1]
    settings = {"salient": 0.5, "bits": (4, 2), "interval": 3, "normalise": normalise}
    with trainless.patched(model, "zipcache", probes=(0.2, 0.3), **settings) as patch:
        got = vlms.replay(model, None, given, calls)
        sites = [layer["site"] for layer in patch.report().methods[0].layers]
    layers = [int(site.split("layers.")[1].split(".")[0]) for site in sites]
    rule = ProbedZipCache(Method(probes=(0.2, 0.3), **settings), **settings, layers=layers)
    want = vlms.replay(model, rule, given, calls)
    assert rule.margin() > 1e-6
    for a, b, rows in zip(got, want, vlms.real(given, calls), strict=True):
        assert (a[rows] - b[rows]).abs().max() < 1e-10
