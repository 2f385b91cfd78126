"""Rounding by hand; packed caches put into a stock model; sets and counts of what is packed."""

import math

import pytest
import torch
from transformers import DynamicCache

from . import H2O, KvQuant, Streaming, Tova, ZipCache, install, models, replay
from .checks import CALLS, EXACT, LENGTHS, same
from .packing import affine, channel_size


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- rounding


def test_rounding_by_hand():
    torch.testing.assert_close(affine(t(0, 1, 2, 3), 2, 0), t(0, 1, 2, 3), **EXACT)
    torch.testing.assert_close(affine(t(0, 0.4, 0.6, 1), 2, 0), t(0, 1 / 3, 2 / 3, 1), **EXACT)
    torch.testing.assert_close(affine(t(0, 0.5, 1.5, 3), 2, 0), t(0, 0, 2, 3), **EXACT)  # half to even
    assert torch.equal(affine(t(0.1, 0.1), 2, 0), t(0.1, 0.1))
    assert torch.equal(affine(t(0.1, 0.7), 16, 0), t(0.1, 0.7))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_at_most_half_a_step_and_the_ends_are_exact(bits):
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = affine(x, bits, 0)
    step = (x.amax(0) - x.amin(0)) / (2**bits - 1)
    assert ((x - y).abs() <= step / 2 + 1e-12).all() and (x - y).abs().max() > 0
    torch.testing.assert_close(y.amin(0), x.amin(0), **EXACT)
    torch.testing.assert_close(y.amax(0), x.amax(0), **EXACT)
    assert max(len(y[:, c].unique()) for c in range(6)) <= 2**bits
    torch.testing.assert_close(affine(y, bits, 0), y, **EXACT)


def test_channel_sizes():
    v = t([4, 0, -1], [-9, 0, 0.25])
    torch.testing.assert_close(channel_size(v), t(3, 1, 1), **EXACT)


# ---------------------------------------------------------------- against a stock model with a doctored cache


def naive(x, bits):
    """One slice rounded, number by number."""
    low, high = min(x), max(x)
    step = (high - low) / (2**bits - 1)
    return [low + round((value - low) / step) * step if step else low for value in x]


def naive_block(keys, values, chosen, k_bits, v_bits, sized_by):
    """Keys and values (L, D) of one head with the tokens ``chosen`` rounded in place."""
    exact = values.clone()
    for c in range(keys.shape[1]):
        keys[chosen, c] = t(*naive(keys[chosen, c].tolist(), k_bits))
    sizes = [math.sqrt(max(abs(v) for v in exact[sized_by, c].tolist())) for c in range(values.shape[1])]
    for j in chosen:
        scaled = naive([v / s for v, s in zip(exact[j].tolist(), sizes, strict=True)], v_bits)
        values[j] = t(*[v * s for v, s in zip(scaled, sizes, strict=True)])


@torch.no_grad()
def step_with(model, ids, length, doctor):
    """A stock prefill of ``length`` tokens, the cache changed by ``doctor(layer, keys, values)``, a step."""
    cache = DynamicCache()
    model(ids[:, :length], past_key_values=cache)
    for number, layer in enumerate(cache.layers):
        doctor(number, layer.keys[0], layer.values[0])
    return model(ids[:, length : length + 1], past_key_values=cache).logits


@pytest.mark.parametrize("bits", [(4, 4), (2, 8)])
def test_kvquant_is_a_stock_model_with_rounded_groups(bits):
    model, ids = models.build("llama"), models.prompt(18)

    def doctor(_, keys, values):
        for head in range(2):
            for start in (0, 4, 8):
                group = list(range(start, start + 4))
                naive_block(keys[head], values[head], group, *bits, group)

    want = step_with(model, ids, 17, doctor)
    rule = KvQuant(*bits, group=4, residual=3)
    got = replay(model, rule, ids, None, [17, 1])
    torch.testing.assert_close(got[1], want, **EXACT)
    assert sorted(rule.packed(0, 0, 1)) == list(range(12))
    assert (got[1] - step_with(model, ids, 17, lambda *_: None)).abs().max() > 1e-4


@pytest.mark.parametrize("normalise", ["visible", "published"])
def test_zipcache_is_a_stock_model_with_two_rounded_sets(normalise):
    model, ids = models.build("llama"), models.prompt(18)
    rows = [3, 8, 8, 15, 16]
    with install(model, ()) as o:
        replay(model, None, ids[:, :17])
    rule = ZipCache(0.6, (4, 2), [[rows]], normalise=normalise)

    def doctor(layer, keys, values):
        p = o.trace(layer).before[0]
        for head in range(2):
            c = p[2 * head : 2 * head + 2][:, rows].sum((0, 1)).tolist()
            for j in range(17):
                seen = sum(i >= j for i in rows) if normalise == "visible" else 17 - j
                c[j] /= seen
            order = sorted(range(17), key=lambda j: c[j], reverse=True)
            for chosen, bits in ((sorted(order[:10]), 4), (sorted(order[10:]), 2)):
                before = values[head].clone()
                naive_block(keys[head], before, chosen, bits, bits, chosen)  # keys only
            exact = values[head].clone()
            for chosen, bits in ((order[:10], 4), (order[10:], 2)):
                spare, rounded = keys[head].clone(), exact.clone()
                naive_block(spare, rounded, chosen, bits, bits, list(range(17)))
                values[head][chosen] = rounded[chosen]
            assert {j for j, b in rule.packed(layer, 0, head).items() if b == (4, 4)} == set(order[:10])
            assert len(rule.packed(layer, 0, head)) == 17

    got = replay(model, rule, ids, None, [17, 1])
    torch.testing.assert_close(got[1], step_with(model, ids, 17, doctor), **EXACT)
    assert rule.margin() > 0


# ---------------------------------------------------------------- identities, batches, cuts

LAST = [[[13], [8], [4]]]
RULES = {
    "kvquant": lambda: KvQuant(group=3, residual=2),
    "kvquant full": lambda: KvQuant(2, 4, group=2, residual=4, flush="full", v_sizes="chunk"),
    "kvquant layer": lambda: KvQuant(4, 2, group=2, residual=0.2, v_scope="layer"),
    "kvquant plain": lambda: KvQuant(4, 2, group=4, residual=1, v_group=4, separable=False),
    "zipcache": lambda: ZipCache(probes=LAST, interval=3),
    "zipcache published": lambda: ZipCache(0.5, (4, 2), [[range(14), range(9), range(5)]], 2, "published"),
    "zipcache layer": lambda: ZipCache(2, (8, 4), LAST, 3, v_scope="layer", flush="blocks"),
    "zipcache groups": lambda: ZipCache(0.5, (4, 2), LAST, 4, count="regular", k_group=2, meta=torch.float32),
    "zipcache by layer": lambda: ZipCache(probes={0: LAST, 1: LAST, 2: [[[1, 13], [3, 8], [4, 4]]]}),
}


@pytest.mark.parametrize(
    "rule",
    [
        lambda: KvQuant(16, 16, group=2, residual=0),
        lambda: KvQuant(2, 2, group=2, residual=22),
        lambda: ZipCache(bits=(16, 16), interval=2),
    ],
)
def test_identities(rule):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    for a, b in zip(
        replay(model, rule(), ids, mask, CALLS), replay(model, (), ids, mask, CALLS), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", RULES)
def test_a_padded_batch_is_its_rows_alone(name):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = RULES[name]()
    batch = replay(model, rule, ids, mask, CALLS)
    plain = replay(model, (), ids, mask, CALLS)
    assert torch.equal(batch[0], plain[0]) and (batch[1] - plain[1]).abs().max() > 1e-4
    for row, length in enumerate(LENGTHS):
        pads = 22 - length
        calls = [CALLS[0] - pads, *CALLS[1:]]
        alone = RULES[name]()
        if getattr(alone, "probes", None):
            by_layer = (
                alone.probes if isinstance(alone.probes, dict) else dict.fromkeys(range(3), alone.probes)
            )
            alone.probes = {layer: [[listed[0][row]]] for layer, listed in by_layer.items()}
        got = replay(model, alone, ids[row : row + 1, pads:], None, calls)
        same([b[row : row + 1, -n:] for b, n in zip(batch, calls, strict=True)], got, calls=calls)
        assert alone.packed(2, 0, 1) == rule.packed(2, row, 1)


def test_kvquant_packs_the_same_groups_however_the_calls_are_cut():
    model, ids = models.build("llama"), models.prompt(22)
    found = []
    for calls in ([22], [5, 17], [1] * 22, CALLS):
        rule = KvQuant(group=4, residual=5)
        replay(model, rule, ids, None, calls)
        found.append([b.columns for b in rule.blocks[0]])
        assert sorted(rule.packed(1, 0, 0)) == list(range(16))
    assert all(f == found[0] for f in found)
    # The other way of flushing empties the buffer by whole residuals, so that the cut matters.
    for calls, want in (([22], 20), ([14, 1, 1, 5, 1], 20), ([13, 1, 1], 15), ([13, 1], 10)):
        rule = KvQuant(group=5, residual=5, flush="full")
        replay(model, rule, ids, None, calls)
        assert sorted(rule.packed(0, 0, 0)) == list(range(want))


def test_packed_tokens_never_change():
    model, ids = models.build("llama"), models.prompt(22)
    for rule in (KvQuant(2, 2, group=2, residual=3), ZipCache(interval=2, bits=(2, 2))):
        before = None
        with install(model, rule):
            cache = DynamicCache()
            for start, stop in ((0, 14), (14, 15), (15, 16), (16, 21), (21, 22)):
                with torch.no_grad():
                    model(ids[:, start:stop], past_key_values=cache)
                state = next(iter(rule._state.values()))
                if before is not None:
                    packed, keys, values = before
                    n = packed.shape[-1]
                    assert (state["packed"][..., :n] | ~packed).all()
                    assert torch.equal(state["keys"][:, :, :n][packed], keys[packed])
                    assert torch.equal(state["values"][:, :, :n][packed], values[packed])
                before = tuple(state[k].clone() for k in ("packed", "keys", "values"))


def test_zipcache_chunks_and_their_shares():
    model, ids = models.build("llama"), models.prompt(22)
    rule = ZipCache(0.5, (4, 2), interval=3)
    replay(model, rule, ids, None, [10, 1, 1, 1, 5, 1, 1])
    blocks = [(b.call, b.k_bits, len(b.columns[0])) for b in rule.blocks[0]]
    assert blocks == [(0, 4, 5), (0, 2, 5), (3, 4, 1), (3, 2, 2), (4, 4, 2), (4, 2, 3)]
    # 8 tokens at 4 bits and 10 at 2, two heads of 8 channels, keys and values
    assert rule.code_bytes(0, 0, 8) == (8 * 4 + 10 * 2) * 2 * 8 * 2 / 8
    rule = ZipCache(0.5, (4, 2), interval=2, flush="blocks", count="regular")
    replay(model, rule, ids, None, [9, 5, 1])
    blocks = [(b.call, b.k_bits, len(b.columns[0])) for b in rule.blocks[0]]
    assert blocks == [(0, 4, 5), (0, 2, 4), *[(1, 4, 1), (1, 2, 1)] * 2, (2, 4, 1), (2, 2, 1)]


def test_normalisations_agree_when_every_row_is_a_probe():
    model, ids = models.build("llama"), models.prompt(14)
    rules = [ZipCache(probes=[[range(14)]], normalise=n) for n in ("visible", "published")]
    for rule in rules:
        replay(model, rule, ids)
    for layer in range(3):
        torch.testing.assert_close(*(r.saliency[layer][0] for r in rules), **EXACT)
    # One probe row, at the end: the published form favours late columns by its divisor.
    for rule, divide in ((ZipCache(normalise="visible"), False), (ZipCache(normalise="published"), True)):
        with install(model, rule) as o:
            replay(model, None, ids)
        want = o.trace(0).before[0, :, -1].view(2, 2, 14).sum(1)
        want = want / torch.arange(14, 0, -1) if divide else want
        torch.testing.assert_close(rule.saliency[0][0][0], want, **EXACT)


def test_probe_rows_must_belong_to_the_call():
    model, ids = models.build("llama"), models.prompt(10)
    with pytest.raises(ValueError, match="not all in call 0"):
        replay(model, ZipCache(probes=[[[3, 10]]]), ids)


# ---------------------------------------------------------------- with an evictor


@pytest.mark.parametrize("evictor", [lambda p: H2O(4, 3, positions=p), lambda p: Streaming(5, 2, p)])
@pytest.mark.parametrize("positions", ["real", "rolled"])
def test_at_16_bits_beside_an_evictor_it_is_the_evictor(evictor, positions):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    keeps = evictor(positions)
    both = [KvQuant(16, 16, group=2, residual=2, evictor=keeps), keeps]
    same(
        replay(model, both, ids, mask, CALLS),
        replay(model, evictor(positions), ids, mask, CALLS),
        mask,
    )


def test_only_what_an_evictor_keeps_is_packed():
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    keeps = Tova(8)
    rule = KvQuant(4, 4, group=2, residual=2, evictor=keeps)
    replay(model, [rule, keeps], ids, mask, CALLS)
    for row in range(3):
        call_of = {j: b.call for b in rule.blocks[1] if b.row == row for j in b.columns[0]}
        assert call_of
        for j, call in call_of.items():
            assert j in keeps.kept(1, call, row, 0)
