"""Output, log-sum-exp and column mass from one sweep, against dense probabilities."""

import pytest
import torch
from kernel_cases import IDS, SHAPES, edit, make, no_worse, oracle, rms, times_values

from trainless.kernels import mass_move, visibility
from trainless.kernels.column_mass import attention_and_mass, together_reasons
from trainless.kernels.common import Terms

EXACT = {"rtol": 1e-9, "atol": 1e-9}
KINDS = ("full", "causal", "left", "keys")


def sweep(case, rows=None, heads=None):
    terms = Terms(case.scale, **case.terms)
    heads = list(range(case.query.shape[1])) if heads is None else heads
    found = attention_and_mass(*case.qkv, visibility=case.seen(), terms=terms, rows=rows, heads=heads)
    assert found[3].m.shape == found[3].inverse.shape == found[1].shape
    return found[:3]


def usable(case):
    return not together_reasons(*case.qkv, case.seen(), Terms(case.scale, **case.terms))


@pytest.mark.parametrize("strength", [1.0, 12.0], ids=["mild", "far-apart"])
@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_in_float64(kind, shape, sink, strength):
    """Logits of a few, and of a thousand: there the bounds are too far apart and maxima are looked up."""
    case = make(kind, shape, strength=strength)
    b, h, _, lq, _, _ = shape
    if sink:
        case.terms["sink_logits"] = torch.linspace(-1, 3, h, dtype=torch.float64)
    if not usable(case):
        assert lq > shape[4] and kind in ("causal", "left")
        return
    _, a, out, lse = oracle(case)
    rows = torch.rand(b, lq) < 0.7
    got = sweep(case)
    for mine, want in zip(got, (out, lse, a.sum(2)), strict=True):
        torch.testing.assert_close(mine, want, **EXACT)
    heads = sorted({h - 1, 0})[::-1]
    some = sweep(case, rows, heads)
    for mine, want in zip(some, (out, lse, (a * rows[:, None, :, None]).sum(2)), strict=True):
        torch.testing.assert_close(mine, want[:, heads], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strength", [0.5, 2.0, 12.0])
def test_low_precision_is_no_worse_than_eager(strength, dtype):
    case = make("causal", (2, 6, 2, 300, 300, 32), dtype, strength=strength)
    _, _, want, truth = oracle(case)
    _, _, plain, _ = oracle(case, dtype)
    out, lse, mass = sweep(case)
    assert out.dtype == lse.dtype == mass.dtype == torch.float32
    # In float32 the largest of thousands of errors shows another order of summation.
    no_worse(out.to(dtype), want, plain, factor=4.0 if dtype == torch.float32 else 2.0)
    torch.testing.assert_close(lse.double(), truth, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(mass.sum(-1), torch.full_like(mass[..., 0], 300), rtol=1e-5, atol=0)


def test_more_than_one_block_and_padded_rows():
    """Longer than a block of rows; the first batch row starts with padding, which sees nothing."""
    lq = 500
    case = make("causal", (2, 4, 2, lq, lq, 16))
    mask = torch.ones(2, 1, lq, lq, dtype=torch.bool).tril_()
    mask[0, :, :, :170] = False
    case.truth, case.mask = mask, mask
    assert case.seen().structured and usable(case)
    _, a, out, lse = oracle(case)
    got = sweep(case, torch.arange(lq)[None].expand(2, -1) >= 170)
    seen = mask.any(-1).expand(-1, 4, -1)
    assert torch.equal(torch.isneginf(got[1]), ~seen)
    torch.testing.assert_close(got[0], out.masked_fill(~seen[..., None], 0), **EXACT)
    torch.testing.assert_close(got[1][seen], lse[seen], **EXACT)
    torch.testing.assert_close(got[2], a[:, :, 170:].sum(2), **EXACT)


def test_infinite_exponentials_of_hidden_keys_do_no_harm():
    """Hidden keys whose logits are hundreds above every visible one."""
    case = make("causal", (1, 2, 1, 40, 40, 16), torch.float32)
    case.key[:, :, 20:] *= 200
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril_()
    mask[..., 30:35] = False
    case.truth, case.mask = mask, mask
    _, a, out, _ = oracle(case)
    got, lse, mass = sweep(case)
    assert torch.isfinite(got).all() and torch.isfinite(mass).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(got.double(), out, rtol=0, atol=3e-3)  # logits of thousands, in float32
    torch.testing.assert_close(mass.double(), a.sum(2), rtol=0, atol=3e-3)


def test_what_it_cannot_do_is_said():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    causal = visibility(None, causal=True, lq=5, lk=5)
    assert together_reasons(q, k, k, causal, Terms(1.0)) == ()
    assert "soft-cap" in together_reasons(q, k, k, causal, Terms(1.0, softcap=2.0))[0]
    window = visibility(None, causal=True, lq=5, lk=5, window=2)
    assert "window" in together_reasons(q, k, k, window, Terms(1.0))[0]
    with torch.enable_grad():
        assert "gradients" in together_reasons(q, k, k.clone().requires_grad_(), causal, Terms(1.0))[0]


@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_probabilities_of_single_keys_are_those_that_made_the_output(strength):
    """An edit of rows with nine tenths on the source is not much worse than one made on the probabilities."""
    case = make("causal", (1, 6, 2, 400, 400, 32), torch.float32, strength=strength)
    case.scale = 32**-0.5
    case.query += 0.7
    case.key[:, :, 3] = 0.6
    source = torch.zeros(1, 6, 400, dtype=torch.bool)
    source[:, :, 3:9] = True
    _, a, _, _ = oracle(case)
    _, eager, _, _ = oracle(case, torch.float32)
    want = times_values(edit(a, case.truth, source, 0.4), case.value.double())
    plain = times_values(edit(eager, case.truth, source, 0.4), case.value)
    terms = Terms(case.scale)
    out, lse, _, scale = attention_and_mass(
        *case.qkv, visibility=case.seen(), terms=terms, rows=None, heads=list(range(6))
    )
    options = {"source": source, "keep": 0.4, "visibility": case.seen(), "scale": case.scale}
    got = mass_move(*case.qkv, out, lse, row_scale=scale, **options)
    mine, theirs = got.double() - want, plain.double() - want
    assert rms(mine) <= 6 * rms(theirs)
    assert mine.abs().max() <= 1e-5 * want.abs().max()
