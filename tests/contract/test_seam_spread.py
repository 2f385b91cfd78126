"""Row and column maxima and entropies as methods see them, against probabilities written out in float64."""

import pytest
import torch
from oracle import H2O, install, replay
from transformers import DynamicCache

import trainless
from trainless import seams
from trainless.kernels.quant_kv import blocks
from trainless.kernels.spread import NAMES

from .reference import attention_of, softmax_over
from .test_families import _gpt_oss
from .test_seams import _logits, _run
from .tools import CALLS, build, same, text, wide
from .toys import chosen, near, registered, toy

NEAR = {"rtol": 0, "atol": 1e-11}
SAW: dict[int, list] = {}


def _watch(heads=None):
    def value(call, stats, state):
        assert stats.group_mass is None and stats.probe_mass is None
        SAW.setdefault(call.site.layer, []).append({name: getattr(stats, name) for name in NAMES})

    return toy("spread", lambda site: [seams.Observe(value, needs=set(NAMES), heads=heads)])


def _nats(p):
    return -(p * p.clamp_min(1e-300).log())


def _truth(p, real):
    p = p * real[:, None, :, None]
    share = p / p.sum(2, keepdim=True).clamp_min(1e-300)
    return {
        "row_entropy": _nats(p).sum(3), "row_max": p.amax(3), "column_max": p.amax(2),
        "column_entropy": _nats(share).sum(2),
    }  # fmt: skip


def _dense(want, also=None):
    """Attention that notes the four by layer; softcap and sinks as the family has them."""

    def attention(module, query, key, value, seen, scaling, kwargs):
        z = _logits(query, key, scaling)
        cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        z = z if cap is None else cap * torch.tanh(z / cap)
        lq, lk = seen.shape[2:]
        real = seen[:, 0, :, lk - lq :].diagonal(dim1=-2, dim2=-1)
        if also is not None:
            rows, keys = torch.arange(lq)[:, None] + lk - lq, torch.arange(lk)[None]
            seen = seen & also(rows, keys)
        if sinks is None:
            p = softmax_over(z, seen)
        else:
            more = sinks.to(z).view(1, -1, 1, 1).expand(*z.shape[:3], 1)
            p = torch.cat([z.masked_fill(~seen, -torch.inf), more], -1).softmax(-1)[..., :-1]
        want.setdefault(module.layer_idx, []).append(_truth(p, real))
        return p @ value

    return attention


def _agree(want, heads=None):
    for layer, expected in want.items():
        for one, got in zip(expected, SAW[layer], strict=True):
            for name in NAMES:
                whole = one[name].clone()
                if heads is not None:
                    whole[:, [h for h in range(whole.shape[1]) if h not in heads]] = got[name][
                        :, [h for h in range(whole.shape[1]) if h not in heads]
                    ]
                torch.testing.assert_close(got[name], whole, **NEAR)


@pytest.mark.parametrize("calls", [CALLS, [20, 1, 1]], ids=["short", "long"])
@pytest.mark.parametrize(
    ("family", "padded"), [("llama", True), ("llama", False), ("gemma2", True), ("gpt_oss", True)]
)
def test_the_four_in_every_call(padded, family, calls):
    model, want = _gpt_oss() if family == "gpt_oss" else build(family), {}
    with wide(model):
        stock = _run(model, padded, calls)
    with attention_of(model, _dense(want)):
        _run(model, padded, calls)
    SAW.clear()
    heads = (1, 2) if family == "llama" and not padded else None
    with registered(_watch(heads)), trainless.patched(model, "toy_spread"), wide(model):
        same(_run(model, padded, calls), stock)  # only looked at
    _agree(want, heads)


@pytest.mark.parametrize("calls", [CALLS, [20, 1, 1]], ids=["short", "long"])
def test_the_four_of_what_a_pattern_leaves(calls):
    model, want = build("llama"), {}
    with attention_of(model, _dense(want, near)):
        _run(model, True, calls)
    SAW.clear()
    pattern = toy("near", lambda site: [seams.Pattern(lambda call, stats, state: seams.Pairs(near))])
    with registered(_watch(), pattern), trainless.patched(model, "toy_near"):
        with trainless.patched(model, "toy_spread"):
            _run(model, True, calls)
    _agree(want)


@pytest.mark.parametrize("calls", [CALLS, [20, 1, 1]], ids=["short", "long"])
def test_a_pattern_chosen_by_column_maxima(calls):
    """One method decides by what another statistic would not give."""

    def value(call, stats, state):
        keep = chosen(stats.column_max)
        return seams.Pairs(lambda q, k: keep[k] | (q == k))

    def dense(module, query, key, values, seen, scaling, kwargs):
        z = _logits(query, key, scaling)
        lq, lk = seen.shape[2:]
        real = seen[:, 0, :, lk - lq :].diagonal(dim1=-2, dim2=-1)
        keep = chosen((softmax_over(z, seen) * real[:, None, :, None]).amax(2))
        own = torch.arange(lq)[:, None] + lk - lq == torch.arange(lk)
        return softmax_over(z, seen & (keep | own)) @ values

    model = build("llama")
    with attention_of(model, dense):
        want = _run(model, True, calls)
    by = toy("by_max", lambda site: [seams.Pattern(value, needs={"column_max"}, lookahead=True)])
    with registered(by), trainless.patched(model, "toy_by_max"):
        same(_run(model, True, calls), want, 1e-11)


@pytest.mark.parametrize("calls", [CALLS, [20, 1, 1]], ids=["short", "long"])
def test_the_four_of_a_cache_that_evicts(calls):
    """Row statistics are those of the tokens kept; column statistics stand by slot, in whatever order."""
    model = build("llama", layers=1)
    ids, mask = text(True)
    SAW.clear()
    with registered(_watch()), trainless.patched(model, "h2o", heavy=4, recent=3):
        with trainless.patched(model, "toy_spread"):
            replay(model, None, ids, mask, calls, DynamicCache())
    with install(model, H2O(4, 3)) as oracle:
        replay(model, None, ids, mask, calls)
        for n in range(len(calls)):
            real = mask[:, sum(calls[:n]) : sum(calls[: n + 1])].bool()
            want = _truth(oracle.trace(0, n).before, real)
            for name in NAMES:
                got, full = SAW[0][n][name], want[name]
                if name.startswith("column"):
                    got, full = got.sort(2, descending=True).values, full.sort(2, descending=True).values
                    width = min(got.shape[2], full.shape[2])
                    got, full = got[..., :width], full[..., :width]
                torch.testing.assert_close(got, full, **NEAR)


@pytest.mark.parametrize("calls", [[20, 20], [20, 6, 1]], ids=["many", "few"])
def test_the_four_over_packed_keys(calls):
    """Packed slots first, then the keys that wait; the truth from what the codes stand for, written out densely."""
    seen = []

    def value(call, stats, state):
        query, layer = call.query.double(), call.layer
        if not layer.store.slots:
            return
        packed = [key for key, *_ in blocks(call.query, layer.store.segments, None)]
        key = torch.cat([*packed, call.key], 2).double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        lq, lk = query.shape[2], key.shape[2]
        allowed = torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq)
        p = softmax_over(query @ key.mT * call.scaling, allowed)
        for name, want in _truth(p, torch.ones(1, lq, dtype=torch.bool)).items():
            torch.testing.assert_close(getattr(stats, name).double(), want, rtol=0, atol=1e-5)
        seen.append(lq)

    model = build("llama", layers=1)
    ids, _ = text(False)
    watch = toy("spread", lambda site: [seams.Observe(value, needs=set(NAMES))])
    with registered(watch), trainless.patched(model, "kvquant", group=8, residual=8):
        with trainless.patched(model, "toy_spread"):
            replay(model, None, torch.cat([ids, ids], 1)[:, : sum(calls)], None, calls, DynamicCache())
    assert seen == calls[1:]
