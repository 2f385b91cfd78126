"""Attention with log-sum-exp: the bits of sdpa where it applies, float64 truth everywhere."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import IDS, KINDS, SHAPES, Largest, make, no_worse, oracle

from trainless.errors import InputError
from trainless.kernels import attention, row_attention, visibility
from trainless.kernels.common import Terms
from trainless.kernels.lse import blocked, choose, reference

EXACT = {"rtol": 1e-11, "atol": 1e-11}
FORMS = {"reference": reference.attention, "fused": blocked.fused, "blocked": blocked.blocked}


def run(form, case, seen=None):
    terms = Terms(case.scale, **case.terms)
    return FORMS[form](*case.qkv, visibility=seen or case.seen(), terms=terms)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "cap-bias-sink"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exact_in_float64(form, kind, shape, extras):
    case = make(kind, shape, extras=extras)
    if form == "fused":
        case.terms.pop("softcap", None)
    _, _, want, lse = oracle(case)
    out, got = run(form, case)
    torch.testing.assert_close(out, want, **EXACT)
    torch.testing.assert_close(got, lse, **EXACT)
    assert got.dtype == torch.float64


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "cap-bias-sink"])
@pytest.mark.parametrize("kind", ["causal", "left", "dense", "additive"])
def test_gradients_are_those_of_the_reference(kind, extras):
    case, grads = make(kind, (2, 4, 2, 9, 9, 8), extras=extras), []
    for form in (reference.attention, blocked.blocked):
        leaves = [t.detach().clone().requires_grad_() for t in case.qkv]
        with torch.enable_grad():
            out, lse = form(*leaves, visibility=case.seen(), terms=Terms(case.scale, **case.terms))
            (out.square().sum() + lse[torch.isfinite(lse)].sum()).backward()
        grads.append([t.grad for t in leaves])
    for got, want in zip(*grads, strict=True):
        assert bool(torch.isfinite(got).all())
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "left", "dense", "additive"])
@pytest.mark.parametrize("form", ["fused", "blocked"])
def test_low_precision_is_no_worse_than_eager(form, kind, dtype):
    case = make(kind, (2, 6, 2, 150, 150, 32), dtype)
    _, _, want, lse = oracle(case)
    _, _, plain, plain_lse = oracle(case, dtype)
    out, got = run(form, case)
    assert out.dtype == dtype and got.dtype == torch.float32
    no_worse(out, want, plain)
    sees = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(got), sees)
    no_worse(got[sees], lse[sees], plain_lse[sees])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("causal", (1, 1)),
        ("causal", (1, 77)),
        ("causal", (300, 300)),
        ("full", (130, 300)),
        ("full", (1100, 1100)),
        ("left", (2100, 2100)),
        ("left", (60, 90)),
        ("minimum", (2100, 2100)),
        ("keys", (800, 800)),
        ("dense", (2100, 600)),
        ("additive", (900, 900)),
    ],
)
def test_the_bits_are_those_of_sdpa(kind, lengths, dtype):
    case = make(kind, (2, 6, 2, *lengths, 16), dtype)
    q, k, v = case.qkv
    mask = case.mask if case.mask is None or case.mask.dtype == torch.bool else case.mask.to(dtype)
    whole = lengths[0] == lengths[1]
    want = F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=case.scale,
        is_causal=mask is None and case.causal and whole and lengths[0] > 1,
    )  # fmt: skip
    case.mask = mask
    out, _ = attention(q, k, v, visibility=case.seen(), scale=case.scale)
    sees = case.truth.any(-1).expand(out.shape[:3])
    assert torch.equal(out[sees], want[sees])
    assert not out[~sees].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_sees_nothing_gives_zeros(form):
    case = make("dense", (2, 4, 2, 9, 9, 8))
    case.truth[0, :, 3] = False
    case.truth[1] = False
    out, lse = run(form, case)
    assert not out[0, :, 3].any() and not out[1].any()
    assert torch.isneginf(lse[0, :, 3]).all() and torch.isneginf(lse[1]).all()
    assert not out.isnan().any() and torch.isfinite(lse[0, :, 4]).all()


@pytest.mark.parametrize("lengths", [(0, 4), (4, 0), (0, 0)])
def test_empty_calls(lengths):
    q, k = torch.randn(2, 4, lengths[0], 8), torch.randn(2, 2, lengths[1], 8)
    seen = visibility(None, causal=False, lq=lengths[0], lk=lengths[1])
    out, lse = attention(q, k, k, visibility=seen, scale=1.0)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert not out.any() and torch.isneginf(lse).all()


def test_an_empty_batch():
    q = torch.randn(0, 4, 5, 8)
    out, lse = attention(q, q, q, visibility=visibility(None, causal=True, lq=5, lk=5), scale=1.0)
    assert out.shape == q.shape and lse.shape == (0, 4, 5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_views_give_the_same_bits(softcap):
    """Heads behind tokens, a slice of a longer cache, and a last axis that is not contiguous."""
    case = make("causal", (2, 6, 2, 40, 40, 16), torch.float32)
    q = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([case.key, torch.full_like(case.key, torch.nan)], 2)[:, :, :40]
    v = case.value.transpose(2, 3).contiguous().transpose(2, 3)
    options = {"visibility": case.seen(), "scale": 0.3, "softcap": softcap}
    for a, b in zip(attention(q, k, v, **options), attention(*case.qkv, **options), strict=True):
        assert torch.equal(a, b)


def test_a_value_of_another_width():
    case = make("causal", (1, 4, 2, 12, 12, 8))
    case.value = torch.randn(1, 2, 12, 5, dtype=torch.float64)
    out, _ = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    torch.testing.assert_close(out, oracle(case)[2], **EXACT)


@pytest.mark.parametrize("form", ["fused", "blocked"])
def test_padding_on_the_left_changes_nothing(form):
    """A left-padded batch equals its rows alone, in float64."""
    case = make("left", (2, 4, 2, 30, 30, 8))
    out, lse = run(form, case)
    alone = [t[1:, :, 10:] for t in case.qkv]
    seen = visibility(None, causal=True, lq=20, lk=20)
    want, want_lse = FORMS[form](*alone, visibility=seen, terms=Terms(case.scale))
    torch.testing.assert_close(out[1:, :, 10:], want, **EXACT)
    torch.testing.assert_close(lse[1:, :, 10:], want_lse, **EXACT)


@pytest.mark.parametrize(("kind", "softcap"), [("causal", 4.0), ("left", None), ("window", None)])
def test_no_tensor_of_queries_by_keys(kind, softcap):
    case = make(kind, (1, 3, 1, 4000, 4000, 8), torch.float32)
    seen = case.seen()
    with Largest() as largest:
        attention(*case.qkv, visibility=seen, scale=0.3, softcap=softcap)
    assert largest.elements < 4000 * 4000 / 2


# ------------------------------------------------------------- rows of a decode step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("lq", [1, 3])
def test_row_attention_is_attention(lq, extras, dtype):
    case = make("full", (2, 6, 2, lq, 33, 16), dtype, extras=extras)
    _, a, want, _ = oracle(case)
    _, plain_a, plain, _ = oracle(case, dtype)
    out, probabilities = row_attention(*case.qkv, scale=case.scale, **case.terms)
    assert out.dtype == dtype and probabilities.dtype in (torch.float32, torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(out, want, **EXACT)
        torch.testing.assert_close(probabilities, a, **EXACT)
    else:
        no_worse(out, want, plain)
        no_worse(probabilities, a, plain_a)


@pytest.mark.parametrize("axes", ["BKL", "BKQL", "BHQL"])
def test_row_attention_skips_invalid_keys(axes):
    case = make("full", (2, 6, 2, 2, 33, 16))
    shape = {"BKL": (2, 2, 33), "BKQL": (2, 2, 2, 33), "BHQL": (2, 6, 2, 33)}[axes]
    valid = torch.rand(shape) < 0.6
    valid[1, 0] = False
    by_head = valid[:, :, None] if axes == "BKL" else valid
    case.truth = by_head.repeat_interleave(6 // by_head.shape[1], 1).expand(2, 6, 2, 33)
    _, a, want, _ = oracle(case)
    out, probabilities = row_attention(*case.qkv, scale=case.scale, valid=valid)
    torch.testing.assert_close(out, want, **EXACT)
    torch.testing.assert_close(probabilities, a, **EXACT)
    assert not out[1, 0].any()


# ------------------------------------------------------------- choice and refusals


def test_the_choice_says_why():
    case = make("causal", (1, 4, 2, 8, 8, 8), torch.float32)
    assert choose(*case.qkv, visibility=case.seen(), terms=Terms(1.0)).name == "fused"
    choice = choose(*case.qkv, visibility=case.seen(), terms=Terms(1.0, softcap=5.0))
    assert choice.name == "blocked"
    assert "soft-cap" in str(choice) and "CUDA" in str(choice)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"key": torch.randn(1, 3, 8, 8)}, "multiple of key heads"),
        ({"value": torch.randn(1, 2, 7, 8)}, "value"),
        ({"visibility": visibility(None, causal=True, lq=8, lk=9)}, "8 x 9"),
        ({"position_bias": torch.zeros(1, 4, 8, 7)}, "position_bias"),
        ({"sink_logits": torch.zeros(3)}, "sink_logits"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"query": torch.randn(4, 8, 8)}, "4-D"),
    ],
)
def test_what_does_not_fit_is_refused(change, named):
    good = {
        "query": torch.randn(1, 4, 8, 8),
        "key": torch.randn(1, 2, 8, 8),
        "value": torch.randn(1, 2, 8, 8),
        "visibility": visibility(None, causal=True, lq=8, lk=8),
        "scale": 1.0,
    }
    with pytest.raises(InputError) as caught:
        attention(**{**good, **change})
    assert named in str(caught.value)
