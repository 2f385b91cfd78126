"""Mass of groups of keys: against probabilities summed by hand; only asked rows; float32 and half precision."""

import pytest
import torch
from kernel_cases import IDS, KINDS, SHAPES, Largest, make, no_worse, oracle

from trainless.errors import InputError
from trainless.kernels import group_mass, visibility
from trainless.kernels.common import Terms
from trainless.kernels.group_mass import choose, reference

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def summed(a, groups, count, rows=None):
    """(B, H, Lq, count) from probabilities (B, H, Lq, Lk), entry by entry of the definition."""
    of = groups if groups.shape[1] == 1 else groups.repeat_interleave(a.shape[1] // groups.shape[1], 1)
    mass = torch.stack([a.masked_fill((of != g)[:, :, None], 0).sum(-1) for g in range(1, count + 1)], -1)
    return mass if rows is None else mass.masked_fill(~rows[:, None, :, None], 0)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "cap-bias-sink"])
def test_exact_in_float64(kind, shape, extras):
    case = make(kind, shape, extras=extras)
    _, a, _, lse = oracle(case)
    b, _, hkv, lq, lk, _ = shape
    rows = torch.rand(b, lq) < 0.6
    terms = Terms(case.scale, **case.terms)
    for heads in (1, hkv):
        groups = torch.randint(0, 4, (b, heads, lk))
        for asked in (None, rows):
            want = summed(a, groups, 3, asked)
            total = lse if asked is None else lse.masked_fill(~asked[:, None], -torch.inf)
            for given in (None, lse):
                options = {
                    "groups": groups,
                    "count": 3,
                    "rows": asked,
                    "lse": given,
                    "visibility": case.seen(),
                }
                got, found = group_mass(case.query, case.key, scale=case.scale, **case.terms, **options)
                torch.testing.assert_close(got, want, **EXACT)
                torch.testing.assert_close(found, total, **EXACT)
                dense, same = reference.group_mass(case.query, case.key, terms=terms, **options)
                torch.testing.assert_close(dense, want, **EXACT)
                torch.testing.assert_close(same, total, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_the_plain_form(dtype):
    case = make("causal", (2, 6, 2, 130, 130, 16), dtype)
    groups = torch.randint(0, 3, (2, 1, 130))
    want = summed(oracle(case)[1], groups, 2)
    plain = summed(oracle(case, dtype)[1].float(), groups, 2)
    got, _ = group_mass(
        case.query, case.key, groups=groups, count=2, visibility=case.seen(), scale=case.scale
    )
    assert got.dtype == torch.float32
    no_worse(got, want, plain)


def test_rows_that_nobody_asked_about_are_not_read_and_views_are_taken():
    case = make("causal", (1, 4, 2, 60, 60, 16))
    rows = torch.zeros(1, 60, dtype=torch.bool)
    rows[:, 50:57] = True
    groups = torch.randint(0, 3, (1, 1, 60))
    want = summed(oracle(case)[1], groups, 2, rows)
    query = case.query.masked_fill(~rows[:, None, :, None], torch.nan)
    key = case.key.transpose(2, 3).contiguous().transpose(2, 3)
    got, lse = group_mass(
        query, key, groups=groups, count=2, rows=rows, visibility=case.seen(), scale=case.scale
    )
    torch.testing.assert_close(got, want, **EXACT)
    assert torch.isneginf(lse[:, :, :50]).all() and torch.isfinite(lse[:, :, 50:57]).all()


def test_memory_grows_with_the_number_of_keys_only():
    n = 3000
    q, k = torch.randn(1, 8, n, 16), torch.randn(1, 8, n, 16)
    rows = torch.zeros(1, n, dtype=torch.bool)
    rows[:, -600:] = True
    groups = torch.ones(1, 1, n, dtype=torch.uint8)
    seen = visibility(None, causal=True, lq=n, lk=n, device="cpu")
    with Largest() as largest:
        mass, _ = group_mass(q, k, groups=groups, count=1, rows=rows, visibility=seen, scale=0.25)
    torch.testing.assert_close(mass[0, :, -600:, 0], torch.ones(8, 600))
    assert largest.elements < 8 * 600 * n / 4


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 3, 8), (1, 2, 1, 0, 4, 8), (1, 2, 1, 3, 0, 8)], ids=str)
def test_empty_inputs(shape):
    b, h, hkv, lq, lk, d = shape
    seen = visibility(None, causal=False, lq=lq, lk=lk, device="cpu")
    mass, lse = group_mass(
        torch.randn(b, h, lq, d), torch.randn(b, hkv, lk, d), groups=torch.zeros(b, 1, lk, dtype=torch.long),
        count=2, visibility=seen, scale=1.0,
    )  # fmt: skip
    assert mass.shape == (b, h, lq, 2) and not mass.any() and torch.isneginf(lse).all()


def test_what_does_not_fit_is_named():
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    seen = visibility(None, causal=True, lq=6, lk=6, device="cpu")
    good = torch.zeros(1, 1, 6, dtype=torch.long)
    for wrong, word in (
        ({"groups": good.bool()}, "groups"),
        ({"groups": good[..., :5]}, "groups"),
        ({"groups": good.expand(1, 4, 6)}, "groups"),
        ({"groups": good, "count": 0}, "count"),
        ({"groups": good, "rows": torch.ones(1, 5, dtype=torch.bool)}, "rows"),
        ({"groups": good, "lse": torch.zeros(1, 2, 6)}, "lse"),
    ):
        with pytest.raises(InputError, match=word):
            group_mass(q, k, visibility=seen, scale=1.0, **{"count": 2, **wrong})
    assert choose(q, k, visibility=seen, count=2).name == "blocked"
    assert "9 groups" in str(choose(q, k, visibility=seen, count=9))
