"""Statistics over chosen rows, and calls in which only some of the tokens take part, with toy methods."""

from types import SimpleNamespace

import pytest
import torch
from oracle import H2O, install, replay
from transformers import DynamicCache

import trainless

from . import toys
from .reference import attention_of, softmax_over
from .test_seams import LONG, PADDED, _check, _logits, _run
from .tools import CALLS, EXACT, build, same, text, wide
from .toys import with_toys

# ---------------------------------------------------------------- chosen rows


def _times(probes, batch, lq, real):
    """(B, Lq): how often each row is chosen."""
    chosen = probes(SimpleNamespace(shape=(batch, 0, 0, lq, 0)), None)
    if chosen.dtype != torch.bool:
        chosen = torch.nn.functional.one_hot(chosen.clamp_min(0), lq) * (chosen >= 0)[..., None]
        chosen = chosen.sum(1)
    return chosen * real


TURNS = pytest.mark.parametrize("calls", [CALLS, [20, 1, 1], [18, 4]], ids=["short", "long", "turn"])
PROBES = {"toy_probe_mask": toys.last_and_third, "toy_probe_index": toys.twice_and_none}


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@TURNS
@PADDED
@with_toys(toys.ProbeMask, toys.ProbeIndex)
def test_column_mass_over_chosen_rows(padded, calls, family, name):
    model = build(family)
    with wide(model):
        stock = _run(model, padded, calls)
    want: dict[int, list] = {}

    def watch(module, query, key, value, seen, scaling, kwargs):
        z = _logits(query, key, scaling)
        cap = kwargs.get("softcap")
        p = softmax_over(z if cap is None else cap * torch.tanh(z / cap), seen)
        lq, lk = seen.shape[2:]
        real = seen[:, 0, :, lk - lq :].diagonal(dim1=-2, dim2=-1)
        times = _times(PROBES[name], query.shape[0], lq, real)
        counts = (seen[:, 0] * times[..., None]).sum(1)
        want.setdefault(module.layer_idx, []).append(((p * times[:, None, :, None]).sum(2), counts))
        return p @ value

    with attention_of(model, watch):
        _run(model, padded, calls)
    toys.PROBED.clear()
    trainless.patch(model, name)
    with wide(model):
        same(_run(model, padded, calls), stock)  # only looked at
    for layer, expected in want.items():
        for (mass, counts), (got, rows) in zip(expected, toys.PROBED[layer], strict=True):
            torch.testing.assert_close(got, mass, rtol=0, atol=1e-11)
            assert torch.equal(rows.expand_as(counts), counts)


@TURNS
@PADDED
@with_toys(toys.ProbeMask, toys.ProbeIndex)
def test_column_mass_over_chosen_rows_of_a_cache_that_evicts(padded, calls):
    """Slots are not columns: each value found belongs to the token that the slot held in that call."""
    model = build("llama", layers=1)
    ids, mask = text(padded)
    keep = trainless.patch(model, "h2o", heavy=4, recent=3)
    trainless.patch(model, "toy_probe_mask")
    cache = DynamicCache()
    toys.PROBED.clear()
    rule = H2O(4, 3)
    with trainless.patched(model, "toy_probe_index"):
        replay(model, None, ids, mask, calls, cache)
    both = toys.PROBED.pop(0)
    keep.remove(), trainless.unpatch(model)
    with install(model, rule) as oracle:
        replay(model, None, ids, mask, calls)
        for call, lq in enumerate(calls):
            p, seen = oracle.trace(0, call).before, oracle.trace(0, call).seen
            real = torch.ones(p.shape[0], lq, dtype=torch.bool)
            if mask is not None:
                real = mask[:, sum(calls[:call]) : sum(calls[: call + 1])].bool()
            for n, probes in enumerate(PROBES.values()):
                times = _times(probes, p.shape[0], lq, real)
                full = (p * times[:, None, :, None]).sum(2)
                got, rows = both[2 * call + n]
                # The same numbers, in whatever order the slots stand; empty slots and evicted tokens hold zero.
                width = min(got.shape[2], full.shape[2])
                torch.testing.assert_close(
                    got.sort(2, descending=True).values[..., :width],
                    full.sort(2, descending=True).values[..., :width], rtol=0, atol=1e-11,
                )  # fmt: skip
                assert rows.sum() > 0 and rows.max() <= times.sum(1).max() and seen.any()


@with_toys(toys.ProbeNone)
def test_no_chosen_rows_cost_nothing():
    model = build("llama")
    stock = _run(model, True, LONG)
    patch = trainless.patch(model, "toy_probe_none")
    same(_run(model, True, LONG), stock)
    assert patch.report().methods[0].fired == 9


def test_a_statistic_over_chosen_rows_says_which():
    from trainless.errors import InputError
    from trainless.seams import Observe

    for given in ({"needs": {"probe_mass"}}, {"probes": toys.last_and_third}):
        with pytest.raises(InputError, match="probe"):
            Observe(lambda call, stats, state: None, **given)


# ---------------------------------------------------------------- some of the tokens


def _tokens(module, query, key, value, seen, scaling, kwargs):
    z = _logits(query, key, scaling)
    cap = kwargs.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    lq, lk = seen.shape[2:]
    real = seen[:, 0, :, lk - lq :].diagonal(dim1=-2, dim2=-1)
    times = _times(toys.last_and_third, query.shape[0], lq, real)
    if lq < lk:  # the last row sees every real key, in models without a window
        whole = seen[:, 0, -1].clone()
    else:
        whole = real
    keep = toys.taking_part((softmax_over(z, seen) * times[:, None, :, None]).sum(2), whole)
    out = softmax_over(z, seen & keep[:, None, None, :]) @ value
    return out * keep[:, None, lk - lq :, None]


@pytest.mark.parametrize("calls", [CALLS, [20, 1, 1], [4, 17, 1]], ids=["short", "long", "turn"])
@PADDED
@with_toys(toys.Subset)
def test_only_some_of_the_tokens_take_part(padded, calls):
    _check("toy_subset", _tokens, padded, calls)


@pytest.mark.parametrize("other", ["toy_keys", "head_gain"])
@with_toys(toys.Subset, toys.Keys)
def test_a_subset_of_the_tokens_composes(other):
    """With extra keys, which every query that takes part sees; with a gain."""
    model = build("llama")

    def attention(module, query, key, value, seen, scaling, kwargs):
        out = _tokens(module, query, key, value, seen, scaling, kwargs)
        return torch.cat([out[:, :1] * 0.5, out[:, 1:]], 1)

    ids, mask = text(True)
    if other == "head_gain":
        with attention_of(model, attention):
            want = _run(model, True, LONG)
        trainless.patch(model, "toy_subset")
        trainless.patch(model, "head_gain", heads=[[0, 0], [1, 0], [2, 0]], gain=0.5)
        same(_run(model, True, LONG), want, EXACT)
        return
    trainless.patch(model, "toy_subset")
    alone = _run(model, True, [20])
    trainless.patch(model, "toy_keys")
    both = _run(model, True, [20])
    assert torch.isfinite(both[0]).all() and (both[0] - alone[0]).abs().max() > 1e-4
    assert ids.shape[0] == mask.shape[0]
