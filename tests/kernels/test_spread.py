"""Largest entries and entropies of rows and columns: float64 truth, counted rows, joined parts, memory."""

import pytest
import torch
from kernel_cases import KINDS, Largest, make, oracle

from trainless.errors import InputError
from trainless.kernels import attention, visibility
from trainless.kernels.common import Terms
from trainless.kernels.spread import NAMES, Spread, reference, spread, spread_of

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHAPE = (2, 6, 2, 20, 33, 16)


def entropies(p):
    """Entry by entry, with 0·log 0 = 0."""
    terms = torch.zeros_like(p)
    terms[p > 0] = -p[p > 0] * p[p > 0].log()
    return terms


def truth(p, heads=None):
    p = p if heads is None else p[:, heads]
    mass = p.sum(2, keepdim=True)
    share = torch.where(mass > 0, p / mass, torch.zeros_like(p))
    return {
        "row_entropy": entropies(p).sum(3),
        "row_max": p.max(3).values,
        "column_max": p.max(2).values,
        "column_entropy": entropies(share).sum(2),
    }


def options(case):
    return {
        "visibility": case.seen(), "scale": case.scale, "position_bias": case.terms.get("position_bias"),
        "softcap": case.terms.get("softcap"),
    }  # fmt: skip


def agree(got, want):
    assert sorted(got) == sorted(want)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], **EXACT)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "cap-bias-sinks"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_four_are_exact_in_float64(kind, extras):
    case = make(kind, SHAPE, extras=extras)
    _, a, _, lse = oracle(case)
    rows = torch.rand(2, SHAPE[3]) < 0.6
    heads = [5, 0, 3]
    for counted in (None, rows):
        p = a if counted is None else a * counted[:, None, :, None]
        agree(spread(*case.qkv[:2], lse, NAMES, rows=counted, **options(case)), truth(p))
        agree(spread(*case.qkv[:2], lse, NAMES, rows=counted, heads=heads, **options(case)), truth(p, heads))
        agree(spread_of(a, NAMES, counted), truth(p))
        terms = Terms(case.scale, case.terms.get("position_bias"), case.terms.get("softcap"))
        asked = Spread(*case.qkv[:2], lse, NAMES, case.seen(), terms, counted)
        agree(reference.spread(asked), truth(p))


def test_only_what_is_asked_for_and_parts_join():
    case = make("full", SHAPE)
    _, a, _, lse = oracle(case)
    assert list(spread(*case.qkv[:2], lse, ["row_max"], **options(case))) == ["row_max"]
    parts = []
    for at in (slice(0, 10), slice(10, 33)):
        key = case.key[:, :, at]
        seen = visibility(None, causal=False, lq=SHAPE[3], lk=key.shape[2])
        parts.append(spread(case.query, key, lse, NAMES, visibility=seen, scale=case.scale, finish=False))
    agree(parts[0].beside(parts[1]).finished(), truth(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_no_tensor_of_queries_by_keys(dtype):
    case = make("causal", (1, 1, 1, 2100, 2100, 8), dtype, strength=0.5)
    seen = case.seen()
    _, lse = attention(*case.qkv, visibility=seen, scale=0.3)
    with Largest() as largest:
        got = spread(case.query, case.key, lse, NAMES, visibility=seen, scale=0.3)
    assert largest.elements < 2100 * 2100 / 2
    want = truth(oracle(case)[1])
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        # The log-sum-exp is computed from inputs of this precision.
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lse": torch.zeros(2, 4, 7)}, "lse"),
        ({"rows": torch.ones(2, 8)}, "rows"),
        ({"heads": [4]}, "heads=[4]"),
        ({"wanted": ["row_min"]}, "spread of 'row_min'"),
    ],
)
def test_what_does_not_fit_is_refused(change, named):
    good = {
        "query": torch.randn(2, 4, 8, 8), "key": torch.randn(2, 2, 8, 8), "lse": torch.zeros(2, 4, 8),
        "wanted": NAMES, "visibility": visibility(None, causal=True, lq=8, lk=8), "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        spread(**{**good, **change})
    assert named in str(caught.value)
