"""Moving probability: against probabilities edited by hand, at weak and overwhelming sinks."""

import pytest
import torch
from kernel_cases import IDS, KINDS, SHAPES, Largest, edit, make, no_worse, oracle, times_values

from trainless.errors import InputError
from trainless.kernels import attention, mass_move, visibility
from trainless.kernels.common import Terms
from trainless.kernels.mass_move import blocked, choose, reference, rest

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def run(case, out, lse, **options):
    return mass_move(*case.qkv, out, lse, visibility=case.seen(), scale=case.scale, **case.terms, **options)


def sinking(lq, dtype, strength):
    """A causal call in which key 3 is a sink whose hold differs from head to head."""
    case = make("causal", (1, 6, 2, lq, lq, 32), torch.float64, strength=1.0)
    case.scale = 32**-0.5
    case.query += 0.7
    case.key[:, :, 3] = strength * torch.linspace(0.3, 2.0, 2)[None, :, None]
    case.value[:, :, 3] *= 0.1
    source = torch.zeros(1, 6, lq, dtype=torch.bool)
    source[:, :, 3] = True
    return case.to(dtype), source


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "cap-bias-sink"])
def test_exact_in_float64(kind, shape, extras):
    case = make(kind, shape, extras=extras)
    _, a, out, lse = oracle(case)
    b, h, _, lq, lk, _ = shape
    heads = sorted({0, h // 2, h - 1}, reverse=True)
    source = torch.rand(b, h, lk) < 0.3
    target = (torch.rand(b, h, lk) < 0.4) & ~source
    rows = torch.rand(b, 1, lq) < 0.7
    keep = torch.rand(b, h, lq, dtype=torch.float64)
    terms = Terms(case.scale, **case.terms)
    for goal in (None, target):
        for much in (0.0, 0.4, keep):
            want = times_values(edit(a, case.truth, source, much, goal, rows), case.value)
            options = {"source": source, "keep": much, "target": goal, "rows": rows}
            torch.testing.assert_close(run(case, out, lse, **options), want, **EXACT)
            dense = reference.mass_move(
                *case.qkv, out, lse, heads=None, visibility=case.seen(), terms=terms, **options
            )
            torch.testing.assert_close(dense, want, **EXACT)
            if not isinstance(much, float):
                options["keep"] = keep[:, heads]
            options["source"] = source[:, heads]
            options["target"] = None if goal is None else goal[:, heads]
            some = run(case, out, lse, heads=heads, **options)
            torch.testing.assert_close(some[:, heads], want[:, heads], **EXACT)
            others = [i for i in range(h) if i not in heads]
            assert torch.equal(some[:, others], out[:, others])


@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("dense", "per_head", "additive", "minimum")])
@pytest.mark.parametrize("cut", [0.0, 0.4, 0.9])
def test_heads_that_attend_to_the_rest_once_more_are_exact(kind, shape, sink, cut, monkeypatch):
    """Heads are made to do so from a row on that differs from one to the next, at any length."""
    taken = []

    def starts(query, key, value, lse, source, keep, heads, limit, seen, terms):
        n = query.shape[2]
        found = torch.full(source.shape[:2], int(cut * n))
        found[:, 1::3] = 0
        found[:, 2::4] = n
        return found if rest.splits(seen) else found.masked_fill(found < n, 0)

    plain = rest.edit_from
    monkeypatch.setattr(rest, "edit_from", lambda *a, **k: (taken.append(k["start"]), plain(*a, **k)))
    monkeypatch.setattr(blocked, "LONG", 1)
    monkeypatch.setattr(blocked, "_starts", starts)
    case = make(kind, shape)
    b, h, _, lq, lk, _ = shape
    if sink:
        case.terms["sink_logits"] = torch.linspace(-1, 3, h, dtype=torch.float64)
    _, a, out, lse = oracle(case)
    heads = sorted({0, h // 2, h - 1}, reverse=True)
    source = torch.rand(b, h, lk) < 0.4
    source[0, 0] = True  # nobody can receive: unchanged
    source[-1, h // 2] = False
    rows = torch.rand(b, 1, lq) < 0.7
    for much in (0.0, 0.4, torch.rand(b, h, lq, dtype=torch.float64)):
        want = times_values(edit(a, case.truth, source, much, None, rows), case.value)
        got = run(case, out, lse, source=source, keep=much, rows=rows)
        torch.testing.assert_close(got, want, **EXACT)
        picked = much if isinstance(much, float) else much[:, heads]
        some = run(case, out, lse, source=source[:, heads], keep=picked, rows=rows, heads=heads)
        torch.testing.assert_close(some[:, heads], want[:, heads], **EXACT)
        others = [i for i in range(h) if i not in heads]
        assert torch.equal(some[:, others], out[:, others])
    assert bool(taken) == bool(source.any())


def test_where_a_head_changes_its_form():
    """A sink that holds nearly everything, nearly all keys, nearly all of the last keys, one weak sink."""
    case = make("causal", (1, 4, 4, 300, 300, 32), torch.float32, strength=0.5)
    case.query += 0.7
    case.key[:, 0, 3] = 3.0
    source = torch.zeros(1, 4, 300, dtype=torch.bool)
    source[:, 0, 3] = source[:, 1, 3:] = source[:, 2, 250:] = source[:, 3, 5] = True
    source[:, 1, 100::9] = False
    case.key[:, 2, 250:] = 2.0
    out, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    keep = torch.full((1, 4, 300), 0.4)
    start = blocked._starts(*case.qkv, lse, source, keep, [0, 1, 2, 3], 2.0, case.seen(), Terms(case.scale))
    assert start[0, 0] == 0 and start[0, 1] == 0 and 200 <= start[0, 2] < 300 and start[0, 3] == 300
    _, a, _, _ = oracle(case)
    got = run(case, out, lse, source=source, keep=0.4)
    want = times_values(_sunk(a, source, 0.4), case.value.double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", [0.0, 0.4])
@pytest.mark.parametrize("strength", [0.1, 0.6, 2.0])
def test_low_precision_is_no_worse_than_eager(strength, keep, dtype):
    """From sinks that hold a per cent to sinks that hold nearly all. Eager edits its own probabilities.

    In float32 rows are edited from the output that is there up to c = 4, which may cost four times the error
    of eager; the largest of thousands of errors shows that the log-sum-exp comes from another kernel.
    """
    case, source = sinking(300, dtype, strength)
    _, a, _, _ = oracle(case)
    want = times_values(_sunk(a, source, keep), case.value.double())
    _, eager, _, _ = oracle(case, dtype)
    plain = times_values(_sunk(eager, source, keep).to(dtype), case.value)
    out, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    got = run(case, out, lse, source=source, keep=keep)
    assert got.dtype == dtype
    if dtype == torch.float32:
        mine, theirs = (got.double() - want), (plain.double() - want)
        assert mine.pow(2).mean() <= 16 * theirs.pow(2).mean()
        assert mine.abs().max() <= 8 * theirs.abs().max()
        assert mine.abs().max() <= 1e-5 * want.abs().max()
    else:
        no_worse(got, want, plain)


def _sunk(a, source, keep):
    """The closed form on dense probabilities; rows that see nothing but sources stay."""
    inside = a * source[:, :, None]
    outside = a * ~source[:, :, None]
    s, r = inside.sum(-1, keepdim=True), outside.sum(-1, keepdim=True)
    alone = (a > 0).sum(-1, keepdim=True) == (inside > 0).sum(-1, keepdim=True)
    return torch.where(alone, a, keep * inside + outside * (1 + (1 - keep) * s / r.clamp_min(1e-300)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_two_keys_from_weak_to_overwhelming(dtype):
    """Values (1, 0) and masses p, 1 - p with the first a source: the output is keep·p, up to p = 1 - e^-80."""
    for gap in (-30.0, -1.0, 0.0, 2.0, 8.0, 20.0, 80.0):
        q = torch.ones(1, 1, 2, 16, dtype=dtype)
        k = torch.zeros(1, 1, 2, 16, dtype=dtype)
        k[..., 0, 0] = gap
        v = torch.zeros(1, 1, 2, 16, dtype=dtype)
        v[..., 0, 0], v[..., 1, 1] = 1, 1
        seen = visibility(None, causal=False, lq=2, lk=2)
        out, lse = attention(q, k, v, visibility=seen, scale=1.0)
        source = torch.tensor([[[True, False]]])
        new = mass_move(q, k, v, out, lse, source=source, keep=0.4, visibility=seen, scale=1.0)
        p = torch.sigmoid(torch.tensor(gap, dtype=torch.float64))
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(new[0, 0, 0, 0].double(), 0.4 * p, rtol=0, atol=tolerance)
        torch.testing.assert_close(new[0, 0, 0, 1].double(), 1 - 0.4 * p, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_receiver_stay_as_they_are(dtype):
    """Row r sees keys 0 … r; with keys 0 … 4 all sources, rows 0 … 4 have nowhere to move anything."""
    case = make("causal", (2, 4, 2, 20, 20, 16), dtype)
    out, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    source = torch.zeros(2, 4, 20, dtype=torch.bool)
    source[..., :5] = True
    new = run(case, out, lse, source=source, keep=0.1)
    assert torch.equal(new[:, :, :5], out[:, :, :5])
    assert (new[:, :, 5:] != out[:, :, 5:]).any(-1).all()
    everything = torch.ones_like(source)
    assert torch.equal(run(case, out, lse, source=everything, keep=0.1), out)
    nobody = torch.zeros_like(source)
    assert torch.equal(run(case, out, lse, source=source, keep=0.1, target=nobody), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [False, True])
def test_identity_is_bitwise(target, dtype):
    case, source = sinking(60, dtype, 2.0)
    out, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    goal = torch.zeros_like(source)
    goal[..., 7:9] = True
    goal = goal if target else None
    assert torch.equal(run(case, out, lse, source=source, keep=1.0, target=goal), out)
    assert torch.equal(run(case, out, lse, source=torch.zeros_like(source), keep=0.0, target=goal), out)
    rows = torch.zeros(1, 1, 60, dtype=torch.bool)
    assert torch.equal(run(case, out, lse, source=source, keep=0.0, target=goal, rows=rows), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_chosen_heads_and_rows_change(dtype):
    case, source = sinking(60, dtype, 1.0)
    out, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    before = out.clone()
    rows = torch.zeros(1, 2, 60, dtype=torch.bool)
    rows[0, 0, 10:20], rows[0, 1, 40:] = True, True
    new = run(case, out, lse, source=source[:, :2], keep=0.3, heads=[4, 1], rows=rows)
    assert torch.equal(out, before)
    changed = (new != out).any(-1)[0]
    assert torch.equal(changed[4], rows[0, 0]) and torch.equal(changed[1], rows[0, 1])
    assert not changed[[0, 2, 3, 5]].any()


@pytest.mark.parametrize("strength", [0.3, 2.0])
@pytest.mark.parametrize("target", [False, True])
def test_rows_keep_their_sum(strength, target):
    case, source = sinking(80, torch.float32, strength)
    case.value = torch.ones_like(case.value)
    out, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    goal = torch.zeros_like(source)
    goal[..., 1] = True
    new = run(case, out, lse, source=source, keep=0.2, target=goal if target else None)
    torch.testing.assert_close(new, torch.ones_like(new), rtol=0, atol=2e-5)


@pytest.mark.parametrize("lq", [40, 300])
@pytest.mark.parametrize("target", [False, True])
def test_gradients_of_values_are_edited_probabilities(target, lq):
    """That is how probabilities are looked at that no kernel returns. Rows are written in place, where a gradient may
    need what stood there."""
    case, source = sinking(lq, torch.float64, 1.0)
    goal = torch.rand(1, 6, lq) < 0.4 if target else None
    goal = goal & ~source if target else None
    rows = torch.rand(1, 1, lq) < 0.7
    asked = torch.randn(1, 6, lq, 32, dtype=torch.float64)
    found = []
    for dense in (False, True):
        case.value = case.value.detach().clone().requires_grad_()
        _, a, out, lse = oracle(case)
        if dense:
            edited = times_values(edit(a, case.truth, source, 0.4, goal, rows), case.value)
        else:
            edited = run(case, out, lse, source=source, keep=0.4, target=goal, rows=rows)
        found.append(torch.autograd.grad((edited * asked).sum(), case.value)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_a_target_of_tiny_mass_receives_in_proportion():
    """Two targets e^-60 below the rest, 3 : 1: all that is freed arrives, 3 : 1."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, 0.0, -60.0 + torch.log(torch.tensor(3.0)).item(), -60.0]).view(1, 1, 4, 1)
    v = torch.eye(4)[None, None]
    seen = visibility(None, causal=False, lq=1, lk=4)
    out, lse = attention(q, k, v, visibility=seen, scale=1.0)
    source = torch.tensor([[[True, False, False, False]]])
    target = torch.tensor([[[False, False, True, True]]])
    new = mass_move(
        q, k, v, out, lse, source=source, keep=0.2, target=target, visibility=seen, scale=1.0
    )  # fmt: skip
    torch.testing.assert_close(new[0, 0, 0], torch.tensor([0.1, 0.5, 0.3, 0.1]), rtol=1e-5, atol=1e-6)


def test_ragged_sources_and_an_empty_head():
    case = make("causal", (2, 4, 2, 50, 50, 8))
    _, a, out, lse = oracle(case)
    source = torch.zeros(2, 4, 50, dtype=torch.bool)
    source[0, 0, 2], source[0, 1, 5:25], source[1, 3, [1, 7, 49]] = True, True, True
    want = times_values(edit(a, case.truth, source, 0.4), case.value)
    got = run(case, out, lse, source=source, keep=0.4)
    torch.testing.assert_close(got, want, **EXACT)
    for b, h in ((0, 2), (0, 3), (1, 0), (1, 1), (1, 2)):
        assert torch.equal(got[b, h], out[b, h])


def test_a_pattern_and_a_batched_mask_reach_the_exact_rows():
    """Rows that are computed again use the mask, bias and pattern of their own batch row."""
    case = make("dense", (2, 2, 1, 24, 24, 8), extras=True)
    case.key[:, :, 4] *= 6
    case.terms["softcap"] = 9.0
    seen = case.seen().restrict(lambda q, k: (q + k) % 5 != 0)
    row, key = torch.arange(24)[:, None], torch.arange(24)[None]
    case.truth = case.truth & ((row + key) % 5 != 0)
    _, a, out, lse = oracle(case)
    source = torch.zeros(2, 2, 24, dtype=torch.bool)
    source[..., 4] = True
    assert (a[..., 4] > 0.9).any() and (a[..., 4] < 0.1).any()
    want = times_values(edit(a, case.truth, source, 0.3), case.value)
    got = mass_move(
        *case.qkv, out, lse, source=source, keep=0.3, visibility=seen, scale=case.scale, **case.terms
    )
    torch.testing.assert_close(got, want, **EXACT)


def test_padding_on_the_left_changes_nothing():
    case = make("left", (2, 4, 2, 30, 30, 8))
    _, _, out, lse = oracle(case)
    source = torch.rand(2, 4, 30) < 0.2
    got = run(case, out, lse, source=source, keep=0.4)[1:, :, 10:]
    alone = [t[1:, :, 10:] for t in case.qkv]
    want = mass_move(
        *alone, out[1:, :, 10:], lse[1:, :, 10:], source=source[1:, :, 10:], keep=0.4,
        visibility=visibility(None, causal=True, lq=20, lk=20), scale=case.scale,
    )  # fmt: skip
    torch.testing.assert_close(got, want, **EXACT)


def test_one_more_row_alone_is_the_last_row_of_all():
    """The edit of n + 1 rows equals that of n rows and one decode step with the same sources."""
    case = make("causal", (1, 4, 2, 25, 25, 8))
    _, _, out, lse = oracle(case)
    source = torch.rand(1, 4, 25) < 0.2
    want = run(case, out, lse, source=source, keep=0.4)[:, :, -1:]
    got = mass_move(
        case.query[:, :, -1:], case.key, case.value, out[:, :, -1:], lse[:, :, -1:], source=source,
        keep=0.4, visibility=visibility(None, causal=True, lq=1, lk=25), scale=case.scale,
    )  # fmt: skip
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_empty_calls(lengths):
    q, k = torch.randn(2, 4, lengths[0], 8), torch.randn(2, 2, lengths[1], 8)
    seen = visibility(None, causal=True, lq=lengths[0], lk=lengths[1])
    out, lse = attention(q, k, k, visibility=seen, scale=1.0)
    source = torch.ones(2, 4, lengths[1], dtype=torch.bool)
    assert torch.equal(mass_move(q, k, k, out, lse, source=source, keep=0.5, visibility=seen, scale=1.0), out)


@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_no_tensor_of_queries_by_keys(strength):
    case, source = sinking(2500, torch.float32, strength)
    out, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    with Largest() as largest:
        run(case, out, lse, source=source, keep=0.4)
    assert largest.elements < 2500 * 2500 / 2


def test_the_choice_says_why():
    case = make("causal", (1, 4, 2, 8, 8, 8), torch.float32)
    choice = choose(*case.qkv, visibility=case.seen(), terms=Terms(1.0), target=torch.ones(1))
    assert choice.name == "blocked" and "target" in str(choice) and "CUDA" in str(choice)
    assert set(blocked.LIMIT) == {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"source": torch.zeros(2, 4, 8)}, "source"),
        ({"source": torch.zeros(2, 3, 8, dtype=torch.bool)}, "source"),
        ({"target": torch.zeros(2, 4, 7, dtype=torch.bool)}, "target"),
        ({"rows": torch.zeros(2, 8, dtype=torch.bool)}, "rows"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": torch.ones(3, 4, 8)}, "keep"),
        ({"lse": torch.zeros(2, 4, 7)}, "lse"),
        ({"heads": [9]}, "heads=[9]"),
    ],
)
def test_what_does_not_fit_is_refused(change, named):
    q, k = torch.randn(2, 4, 8, 8), torch.randn(2, 2, 8, 8)
    good = {
        "query": q,
        "key": k,
        "value": k,
        "out": torch.randn(2, 4, 8, 8),
        "lse": torch.zeros(2, 4, 8),
        "source": torch.zeros(2, 4, 8, dtype=torch.bool),
        "keep": 0.5,
        "visibility": visibility(None, causal=True, lq=8, lk=8),
        "scale": 1.0,
    }
    with pytest.raises(InputError) as caught:
        mass_move(**{**good, **change})
    assert named in str(caught.value)
