"""Each seam by itself, with a toy method, against attention written out densely in float64."""

from types import SimpleNamespace

import pytest
import torch
from oracle import H2O, install, models, real_rows, replay
from torch.nn.functional import pad
from transformers import DynamicCache

import trainless

from . import toys
from .reference import attention_of, softmax_over
from .tools import CALLS, EXACT, Snapshot, build, outputs, same, text, wide
from .toys import with_toys

LONG = [20, 1, 1]  # a prefill that is too long for outright probabilities, then steps
CUTS = pytest.mark.parametrize("calls", [CALLS, LONG], ids=["short", "long"])
PADDED = pytest.mark.parametrize("padded", [True, False], ids=["padded", "single"])


def _logits(query, key, scaling):
    return query @ key.mT * scaling


def plain(module, query, key, value, seen, scaling, kwargs):
    return softmax_over(_logits(query, key, scaling), seen) @ value


def _run(model, padded, calls, family="llama"):
    ids, mask = text(padded)
    found = replay(model, None, ids, mask, calls)
    return [a[r] for a, r in zip(found, real_rows(mask, calls, ids.shape[0]), strict=True)]


def _check(name, attention, padded, calls, family="llama"):
    """Patch with the toy, compare with the dense attention; then the removal."""
    model = build(family)
    stock = _run(model, padded, calls)
    with attention_of(model, plain):
        same(_run(model, padded, calls), stock, EXACT)
    with attention_of(model, attention):
        want = _run(model, padded, calls)
    before = Snapshot(model)  # here, since transformers notes on the class that an implementation was set
    names = [name] if isinstance(name, str) else name
    patches = [trainless.patch(model, n) for n in names]
    same(_run(model, padded, calls), want, EXACT)
    for patch in patches:
        report = patch.report().methods[0]
        assert report.fired == 3 * len(calls) and report.acted == report.fired
    for patch in patches:
        patch.remove()
    before.check(model)
    same(_run(model, padded, calls), stock)
    assert (want[0] - stock[0]).abs().max() > 1e-4


# ---------------------------------------------------------------- keys


def _with_extra(*offsets):
    def attention(module, query, key, value, seen, scaling, kwargs):
        lq, groups = query.shape[2], query.shape[1] // 2
        for offset in offsets:
            k, v = (
                t.expand(query.shape[0], -1, -1, -1).repeat_interleave(groups, 1)
                for t in toys.extra(module.layer_idx + offset)
            )
            more = toys.visible_extra(lq) if offset == 0 else torch.ones(1, 1, 1, 3, dtype=torch.bool)
            key, value = torch.cat([key, k], 2), torch.cat([value, v], 2)
            seen = torch.cat([seen, more.expand(*seen.shape[:3], 3)], 3)
        return plain(module, query, key, value, seen, scaling, kwargs)

    return attention


@CUTS
@PADDED
@with_toys(toys.Keys)
def test_extra_keys(padded, calls):
    _check("toy_keys", _with_extra(0), padded, calls)


@CUTS
@with_toys(toys.Keys, toys.MoreKeys)
def test_extra_keys_of_two_methods_are_joined(calls):
    _check(["toy_keys", "toy_more_keys"], _with_extra(0, 10), True, calls)


# ---------------------------------------------------------------- pattern


def _restricted(*predicates):
    def attention(module, query, key, value, seen, scaling, kwargs):
        lq, lk = seen.shape[2:]
        q, k = torch.arange(lk - lq, lk)[:, None], torch.arange(lk)[None]
        for predicate in predicates:
            seen = seen & predicate(q, k)
        return plain(module, query, key, value, seen, scaling, kwargs)

    return attention


@CUTS
@PADDED
@with_toys(toys.Near)
def test_a_static_pattern(padded, calls):
    _check("toy_near", _restricted(toys.near), padded, calls)


@CUTS
@PADDED
@with_toys(toys.Near, toys.Even)
def test_two_static_patterns_intersect(padded, calls):
    _check(["toy_near", "toy_even"], _restricted(toys.near, toys.even), padded, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@CUTS
@with_toys(toys.Nothing)
def test_a_pattern_that_restricts_nothing_gives_the_stock_bits(calls, dtype):
    model = build("llama", dtype=dtype, exact=False)
    stock = _run(model, True, calls), _run(model, False, calls)
    patch = trainless.patch(model, "toy_nothing")
    same(_run(model, True, calls), stock[0])
    same(_run(model, False, calls), stock[1])
    assert patch.report().methods[0].acted == 0


def _dynamic(module, query, key, value, seen, scaling, kwargs):
    p = softmax_over(_logits(query, key, scaling), seen)
    lq, lk = seen.shape[2:]
    real = seen[:, 0, :, lk - lq :].diagonal(dim1=-2, dim2=-1)
    keep = toys.chosen((p * real[:, None, :, None]).sum(2))
    itself = torch.arange(lk - lq, lk)[:, None] == torch.arange(lk)[None]
    return plain(module, query, key, value, seen & (keep | itself), scaling, kwargs)


@CUTS
@PADDED
@with_toys(toys.Dynamic)
def test_a_pattern_chosen_from_statistics(padded, calls):
    _check("toy_dynamic", _dynamic, padded, calls)


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


# ---------------------------------------------------------------- form


def _linear(module, query, key, value, seen, scaling, kwargs):
    return toys.linear(query, key, value, seen)


@CUTS
@PADDED
@with_toys(toys.Form)
def test_another_form_of_attention(padded, calls):
    _check("toy_form", _linear, padded, calls)


@with_toys(toys.Form)
def test_a_form_composes_with_a_gain():
    model = build("llama")

    def halved(*args):
        out = _linear(*args)
        return torch.cat([out[:, :1] * 0.5, out[:, 1:]], 1)

    with attention_of(model, halved):
        want = _run(model, True, CALLS)
    trainless.patch(model, "toy_form")
    trainless.patch(model, "head_gain", heads=[[0, 0], [1, 0], [2, 0]], gain=0.5)
    same(_run(model, True, CALLS), want, EXACT)


# ---------------------------------------------------------------- observe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@PADDED
@CUTS
@with_toys(toys.Observe, toys.ObserveToo)
def test_observers_see_exact_statistics_and_change_nothing(padded, calls, dtype):
    model = build("llama", dtype=dtype, exact=dtype == torch.float64)
    stock = _run(model, padded, calls)
    want: dict[int, list] = {}

    def watch(module, query, key, value, seen, scaling, kwargs):
        z = _logits(query, key, scaling).masked_fill(~seen, -torch.inf)
        p = softmax_over(z, seen)
        lq, lk = seen.shape[2:]
        real = seen[:, 0, :, lk - lq :].diagonal(dim1=-2, dim2=-1)
        want.setdefault(module.layer_idx, []).append(
            (z.logsumexp(-1), (p * real[:, None, :, None]).sum(2), real)
        )
        return p @ value

    with attention_of(model, watch):
        _run(model, padded, calls)
    toys.SEEN.clear()
    trainless.patch(model, "toy_observe")
    same(_run(model, padded, calls), stock)
    near = {"rtol": 0, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for layer, expected in want.items():
        for call, (lse, mass, real) in enumerate(expected):
            rows = real[:, None].expand(lse.shape)
            got = toys.SEEN[layer]
            torch.testing.assert_close(got.lse[call][rows], lse[rows].to(got.lse[call]), **near)
            torch.testing.assert_close(got.column_mass[call], mass.to(got.column_mass[call]), **near)
    trainless.patch(model, "toy_observe_too")  # two may look
    same(_run(model, padded, calls), stock)


@with_toys(toys.Observe)
def test_observers_see_the_attention_before_mass_and_gain():
    """Statistics are those before edits: a gain and ACT beside an observer do not change what it sees there."""
    model = build("llama", layers=1)
    toys.SEEN.clear()
    observer = trainless.patch(model, "toy_observe")
    _run(model, True, [20])
    alone = toys.SEEN.pop(0)
    trainless.patch(model, "act", alpha=1.5, skip_layers=0, min_rows=3)
    trainless.patch(model, "head_gain", gain=0.5)
    _run(model, True, [20])
    same(toys.SEEN[0].column_mass, alone.column_mass, EXACT)
    observer.remove()


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
    from trainless.seams import Contribution

    for given in ({"needs": {"probe_mass"}}, {"probes": toys.last_and_third}):
        with pytest.raises(InputError, match="probe"):
            Contribution("observe", lambda call, stats, state: None, **given)


# ---------------------------------------------------------------- position, mass


def _moved(*heads):
    def attention(module, query, key, value, seen, scaling, kwargs):
        p = softmax_over(_logits(query, key, scaling), seen)
        thirds = torch.arange(p.shape[-1]) % 3
        for head in heads:
            q = p[:, head]
            freed = 0.75 * (q * (thirds == 1)).sum(-1, keepdim=True)
            room = (q * (thirds == 0)).sum(-1, keepdim=True)
            grown = torch.where(thirds == 0, q * (1 + freed / room.clamp_min(1e-300)), q)
            edited = torch.where(thirds == 1, 0.25 * q, grown)
            p = p.clone()
            p[:, head] = torch.where(room > 0, edited, q)
        return p @ value

    return attention


@CUTS
@PADDED
@with_toys(toys.Mass)
def test_mass_between_two_groups_of_keys(padded, calls):
    _check("toy_mass", _moved(0, 1), padded, calls)


@CUTS
@with_toys(toys.Mass, toys.MassElsewhere)
def test_mass_of_different_heads(calls):
    _check(["toy_mass", "toy_mass_elsewhere"], _moved(0, 1, 2, 3), True, calls)


def _gated(*heads):
    """As the toy: rows and heads whose gate is open have their mass moved; the gate reads mass before edits."""

    def attention(module, query, key, value, seen, scaling, kwargs):
        p = softmax_over(_logits(query, key, scaling), seen)
        lq, lk = p.shape[2:]
        thirds, odd = torch.arange(lk) % 3, torch.arange(lk - lq, lk) % 2 == 1
        moved = p.clone()
        for head in heads:
            q = p[:, head]
            held, room = ((q * (thirds == n)).sum(-1, keepdim=True) for n in (1, 0))
            grown = torch.where(thirds == 0, q * (1 + 0.75 * held / room.clamp_min(1e-300)), q)
            edited = torch.where(thirds == 1, 0.25 * q, grown)
            open_ = (held >= toys.GATE) & odd[:, None] & (room > 0)
            moved[:, head] = torch.where(open_, edited, q)
        return moved @ value

    return attention


@CUTS
@PADDED
@with_toys(toys.Gated)
def test_gates_per_row_and_head_on_group_masses(padded, calls):
    _check("toy_gated", _gated(0, 1, 2, 3), padded, calls)


@CUTS
@with_toys(toys.GatedHeads, toys.Observe)
def test_group_masses_of_some_heads_beside_an_observer(calls):
    """With statistics that others ask for the call takes the long way; the edit is the same."""
    toys.SEEN.clear()
    _check(["toy_gated_heads", "toy_observe"], _gated(1, 2), True, calls)


@CUTS
@PADDED
@with_toys(toys.Position)
def test_positions_of_keys(padded, calls):
    from oracle.evict import frequencies, rotate

    model = build("llama")
    freq = frequencies(model)

    def attention(module, query, key, value, seen, scaling, kwargs):
        steps = (torch.arange(key.shape[2]) % 3).expand(key.shape[:3])
        return plain(module, query, rotate(key, steps, freq), value, seen, scaling, kwargs)

    _check("toy_position", attention, padded, calls)


@with_toys(toys.Near, toys.Keys)
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_seams_work_without_causality(family):
    model = build(family)
    counted = iter(range(1000))
    given = _restricted(toys.near)
    layer_of = {}

    def attention(module, query, key, value, seen, scaling, kwargs):
        layer_of.setdefault(id(module), next(counted))
        return given(module, query, key, value, seen, scaling, kwargs)

    with attention_of(model, attention):
        want = outputs(model, family)
    assert len(layer_of) == 3
    trainless.patch(model, "toy_near")
    same(outputs(model, family), want, EXACT)
    assert pad(models.prompt(3), (0, 1)).shape == (1, 4)


@with_toys(toys.LseElsewhere)
def test_a_log_sum_exp_beside_an_edit_of_few_heads_is_whole():
    """Act watches one head; a rule on other heads asked for the log-sum-exp."""
    model = build("llama")

    def watched(*patches):
        toys.SEEN.clear()
        for name, given in patches:
            trainless.patch(model, name, **given)
        _run(model, False, LONG)
        trainless.unpatch(model)
        return toys.SEEN[0].lse[0]

    alone = watched(("toy_lse_elsewhere", {}))
    beside = watched(("act", {"heads": [[0, 1]], "theta": 0.0}), ("toy_lse_elsewhere", {}))
    assert alone.shape[1] > 1 and (alone != 0).all()
    torch.testing.assert_close(beside, alone, rtol=0, atol=EXACT)
