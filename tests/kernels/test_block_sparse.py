"""Sparse attention: every pattern against a dense float64 softmax over the pairs it allows."""

import pytest
import torch
from kernel_cases import IDS, KINDS, SHAPES, Largest, make, no_worse, oracle

from trainless.errors import InputError
from trainless.kernels import attention, block_sparse, visibility
from trainless.kernels.block_sparse import Blocks, Spans, Subset, blocked, choose, reference
from trainless.kernels.common import Terms

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FORMS = {"reference": reference.block_sparse, "blocked": blocked.block_sparse}
PATTERNS = ("subset", "apart", "blocks", "blocks-shared", "spans")
CAUSAL = ("causal", "left", "minimum", "window")


def pattern_of(name, shape):
    """A pattern and its truth, bool (B, H, Lq, Lk), written out pair by pair."""
    b, h, _, lq, lk, _ = shape
    q, k = torch.arange(lq)[:, None], torch.arange(lk)[None]
    if name == "subset":  # the same tokens as queries and as keys, another subset per row of the batch
        keys = torch.rand(b, lk) < 0.6
        queries = keys[:, -lq:] if lk >= lq else torch.rand(b, lq) < 0.6
    if name == "apart":
        queries, keys = torch.rand(1, lq) < 0.5, torch.rand(b, lk) < 0.5
    if name in ("subset", "apart"):
        truth = queries[:, None, :, None] & keys[:, None, None, :]
        return Subset(queries, keys), truth.expand(b, h, lq, lk)
    if name == "spans":
        span = torch.tensor([(1, 3, lk + 2, 17, 3, 40)[n % 6] for n in range(h)])
        gap = q + lk - lq - k
        return Spans(span, 4), ((gap < span[:, None, None]) | (k < 4)).expand(b, h, lq, lk)
    shared, size = name == "blocks-shared", 16
    nq, nk = -(-lq // size), -(-lk // size)
    wide = torch.rand(1 if shared else b, 1 if shared else h, nq, nk) < 0.5
    index = torch.where(wide, torch.arange(nk), -1)[..., torch.randperm(nk)]
    return Blocks(index, size), wide[:, :, q // size, k // size].expand(b, h, lq, lk)


def truth_of(case, allowed, dtype=torch.float64):
    """The dense attention of the case over the allowed pairs."""
    case.truth, before = case.truth.expand_as(allowed) & allowed, case.truth
    found = oracle(case, dtype)[2]
    case.truth = before
    return found


def terms_of(case):
    return Terms(case.scale, **case.terms)


EVERY = [
    pytest.param(
        form, name, kind, shape, extras, id=f"{form}-{name}-{kind}-{at}{'-cap-bias-sinks' if extras else ''}"
    )
    for form in FORMS
    for name in PATTERNS
    for kind in (CAUSAL if name == "spans" else KINDS)
    for shape, at in zip(SHAPES, IDS, strict=True)
    for extras in ((True,) if form == "reference" else (False, True))
]


@pytest.mark.parametrize(("form", "name", "kind", "shape", "extras"), EVERY)
def test_every_form_is_exact_in_float64(form, name, kind, shape, extras):
    case = make(kind, shape, extras=extras)
    pattern, allowed = pattern_of(name, shape)
    got = FORMS[form](*case.qkv, pattern, visibility=case.seen(), terms=terms_of(case))
    torch.testing.assert_close(got, truth_of(case, allowed), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "left"])
@pytest.mark.parametrize("name", PATTERNS)
def test_low_precision_is_no_worse_than_the_plain_form(name, kind, dtype):
    shape = (2, 6, 2, 170, 170, 32)
    case = make(kind, shape, dtype, strength=2.0)
    case.scale = 32**-0.5
    pattern, allowed = pattern_of(name, shape)
    got = block_sparse(*case.qkv, pattern, visibility=case.seen(), scale=case.scale)
    assert got.dtype == dtype
    no_worse(got, truth_of(case, allowed), truth_of(case, allowed, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_subset_of_everything_has_the_bits_of_attention(dtype):
    case = make("causal", (2, 4, 2, 70, 70, 16), dtype)
    every = torch.ones(1, 70, dtype=torch.bool)
    options = {"visibility": case.seen(), "scale": case.scale}
    got = block_sparse(*case.qkv, Subset(every, every), **options)
    assert torch.equal(got, attention(*case.qkv, **options)[0])


def test_a_padded_row_is_the_row_alone():
    case = make("left", (2, 4, 2, 60, 60, 8), torch.float64)
    keep = torch.rand(2, 60) < 0.5
    keep[1, :20] = False
    got = block_sparse(*case.qkv, Subset(keep, keep), visibility=case.seen(), scale=case.scale)
    alone = [t[1:, :, 20:] for t in case.qkv]
    seen = visibility(None, causal=True, lq=40, lk=40)
    want = block_sparse(*alone, Subset(keep[1:, 20:], keep[1:, 20:]), visibility=seen, scale=case.scale)
    torch.testing.assert_close(got[1:, :, 20:], want, **EXACT)
    assert not got[1, :, :20].any()


@pytest.mark.parametrize("name", PATTERNS)
def test_views_give_the_same_bits_and_poison_stays_outside(name):
    shape = (2, 4, 2, 70, 70, 16)
    case = make("causal", shape, torch.float32)
    pattern, allowed = pattern_of(name, shape)
    options = {"visibility": case.seen(), "scale": case.scale}
    want = block_sparse(*case.qkv, pattern, **options)
    q = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([case.key, torch.full_like(case.key, torch.nan)], 2)[:, :, :70]
    v = case.value.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(block_sparse(q, k, v, pattern, **options), want)
    if name in ("subset", "apart"):  # tokens that take no part are not even multiplied by zero
        k, v = k.clone(), v.clone()
        k.transpose(1, 2)[~pattern.keys], v.transpose(1, 2)[~pattern.keys] = torch.nan, torch.nan
        assert torch.equal(block_sparse(q, k, v, pattern, **options), want)
    assert not want[~allowed.tril().any(-1)].any()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_empty_calls(lengths):
    case = make("full", (2, 4, 2, *lengths, 8))
    pattern = Subset(torch.ones(2, lengths[0]).bool(), torch.ones(2, lengths[1]).bool())
    got = block_sparse(*case.qkv, pattern, visibility=case.seen(), scale=1.0)
    assert got.shape == (2, 4, lengths[0], 8) and not got.any()
    none = Subset(torch.zeros(1, 7).bool(), torch.zeros(1, 7).bool())
    case = make("causal", (2, 4, 2, 7, 7, 8))
    assert not block_sparse(*case.qkv, none, visibility=case.seen(), scale=1.0).any()


@pytest.mark.parametrize(
    ("name", "kind"), [("subset", "causal"), ("subset", "window"), ("blocks", "left"), ("spans", "causal")]
)
def test_no_tensor_of_queries_by_keys(name, kind):
    shape = (1, 2, 1, 3000, 3000, 8)
    case = make(kind, shape, torch.float32)
    keep = torch.rand(1, 3000) < 0.5
    index = (torch.arange(188)[:, None] - torch.arange(4)).clamp_min(-1)[None, None]
    pattern = {
        "subset": Subset(keep, keep), "blocks": Blocks(index, 16), "spans": Spans(torch.tensor([200, 300]), 4),
    }[name]  # fmt: skip
    seen = case.seen()
    with Largest() as largest:
        block_sparse(*case.qkv, pattern, visibility=seen, scale=0.3)
    assert largest.elements < 3000 * 3000 / 4


SQUARE = (2, 4, 2, 40, 40, 8)
WRONG = [
    (Subset(torch.ones(2, 40), torch.ones(2, 40).bool()), "queries"),
    (Subset(torch.ones(2, 40).bool(), torch.ones(2, 39).bool()), "keys"),
    (Subset(torch.ones(2, 40).bool(), torch.ones(3, 40).bool()), "batch"),
    (Blocks(torch.zeros(1, 1, 3, 1).long(), 24), "power of two"),
    (Blocks(torch.zeros(1, 1, 2, 1).long(), 16), "index"),
    (Blocks(torch.full((1, 1, 3, 1), 3), 16), "key blocks"),
    (Blocks(torch.zeros(1, 1, 3, 2).long(), 16), "twice"),
    (Spans(torch.zeros(4).long()), "span"),
    (Spans(torch.ones(4).long(), -1), "sinks"),
]


@pytest.mark.parametrize(("pattern", "word"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_patterns_that_do_not_fit_are_refused(pattern, word):
    case = make("causal", SQUARE)
    with pytest.raises(InputError, match=word):
        block_sparse(*case.qkv, pattern, visibility=case.seen(), scale=1.0)


def test_spans_of_a_call_that_is_not_causal_are_refused():
    case = make("full", SQUARE)
    with pytest.raises(InputError, match="causal"):
        block_sparse(*case.qkv, Spans(torch.ones(4).long()), visibility=case.seen(), scale=1.0)


def test_the_choice_says_why():
    case = make("causal", SQUARE)
    found = choose(*case.qkv, None, visibility=case.seen(), terms=Terms(1.0))
    assert found.name == "blocked" and any("CUDA" in reason for reason in found.reasons)
