"""Linear attention: every form against dense float64, the limits it is made for, and what it refuses."""

import pytest
import torch
from kernel_cases import Largest, no_worse

from trainless.errors import InputError
from trainless.kernels import linear_attention, visibility
from trainless.kernels.linear import blocked, choose, reference

FEATURES = ("elu", "relu", "softmax")
# (B, H, Hkv, Lq, Lk, D, Dv): one token, odd lengths, groups, more keys than queries and the reverse.
SHAPES = [
    (1, 1, 1, 1, 1, 16, 16),
    (2, 6, 2, 7, 7, 16, 24),
    (1, 4, 4, 131, 131, 24, 24),
    (2, 6, 1, 5, 300, 8, 8),
    (2, 4, 2, 150, 9, 16, 16),
]
IDS = ["B{}-H{}-K{}-Q{}-L{}-D{}-V{}".format(*s) for s in SHAPES]
KINDS = ("full", "keys", "causal", "causal-keys")
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def make(shape, dtype=torch.float64):
    b, h, hkv, lq, lk, d, dv = shape
    size = {"q": (b, h, lq, d), "k": (b, hkv, lk, d), "v": (b, hkv, lk, dv)}
    return [
        torch.randn(s, dtype=torch.float64).mul(1.5 if n != "v" else 1).to(dtype) for n, s in size.items()
    ]


def mask_of(kind, shape):
    """(Visibility, truth (B, 1, Lq, Lk))"""
    b, _, _, lq, lk, _, _ = shape
    truth = torch.ones(b, 1, lq, lk, dtype=torch.bool)
    if "causal" in kind:
        truth = truth & (torch.arange(lq)[:, None] + lk - lq >= torch.arange(lk))
    seen = visibility(None, causal="causal" in kind, lq=lq, lk=lk)
    if "keys" in kind:
        exist = torch.rand(b, lk) < 0.7
        exist[0, : lk // 3] = False
        truth = truth & exist[:, None, None]
        seen = visibility(None, causal="causal" in kind, lq=lq, lk=lk)
        from dataclasses import replace

        seen = replace(seen, keys=exist)
    return seen, truth


def feature_map(x, feature):
    if feature == "elu":
        return torch.nn.functional.elu(x) + 1
    return torch.relu(x) if feature == "relu" else torch.softmax(x, -1)


def oracle(q, k, v, truth, feature, eps):
    """Pair by pair, from the definition; shares no code with the package."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    a = feature_map(q, feature) @ feature_map(k, feature).mT * truth
    count = truth.sum(-1, keepdim=True).clamp(min=1).to(a.dtype)
    above = a @ v / count
    return torch.where(above == 0, 0, above / (a.sum(-1, keepdim=True) / count + eps))


def plain(q, k, v, seen, feature, eps):
    """The same two products as anyone would write them, in the dtype of the inputs."""
    share = q.shape[1] // k.shape[1]
    phi_q, phi_k = feature_map(q, feature), feature_map(k, feature)
    if seen.keys is not None:
        phi_k = phi_k * seen.keys[:, None, :, None]
    phi_k, v = phi_k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    n = (k.shape[2] if seen.keys is None else seen.keys.sum(1)[:, None, None, None]) ** -0.5
    state = (phi_k * n).mT @ (v * n)
    below = phi_q @ (phi_k * n * n).sum(2)[..., None].to(phi_q.dtype) + eps
    return phi_q @ state.to(phi_q.dtype) / below


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("form", [reference, blocked], ids=["reference", "blocked"])
def test_every_form_is_exact_in_float64(form, feature, kind, shape):
    q, k, v = make(shape)
    seen, truth = mask_of(kind, shape)
    got = form.linear_attention(q, k, v, visibility=seen, feature=feature, eps=1e-4)
    torch.testing.assert_close(got, oracle(q, k, v, truth, feature, 1e-4), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", ["full", "keys"])
def test_low_precision_is_no_worse_than_the_plain_products(kind, feature, dtype):
    shape = (2, 4, 2, 700, 700, 32, 32)
    q, k, v = make(shape, dtype)
    seen, truth = mask_of(kind, shape)
    want = oracle(q.double(), k.double(), v.double(), truth, feature, 1e-4)
    got = linear_attention(q, k, v, visibility=seen, feature=feature)
    assert got.dtype == dtype
    no_worse(got, want, plain(q, k, v, seen, feature, 1e-4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_of_the_causal_form(dtype):
    shape = (2, 4, 2, 300, 420, 32, 32)
    q, k, v = make(shape, dtype)
    seen, truth = mask_of("causal-keys", shape)
    want = oracle(q.double(), k.double(), v.double(), truth, "elu", 1e-4)
    dense = oracle(q, k, v, truth, "elu", 1e-4)
    no_worse(linear_attention(q, k, v, visibility=seen), want, dense)


# ---------------------------------------------------------------- properties


def test_constant_values_come_out_smaller_by_eps_only():
    q, k, _ = make((1, 2, 2, 50, 50, 16, 16))
    v = torch.full((1, 2, 50, 16), 3.0, dtype=torch.float64)
    got = linear_attention(q, k, v, visibility=visibility(None, causal=False, lq=50, lk=50))
    mean = feature_map(k, "elu").mean(2, keepdim=True)
    z = (feature_map(q, "elu") * mean).sum(-1, keepdim=True) + 1e-4
    torch.testing.assert_close(got, 3.0 * (1 - 1e-4 / z).expand_as(got), **EXACT)


def test_a_query_without_features_gives_zero_even_without_eps():
    q, k, v = make((1, 2, 2, 20, 20, 16, 16))
    q[:, :, 3] = -1.0
    seen = visibility(None, causal=False, lq=20, lk=20)
    for eps in (0.0, 1e-4):
        got = linear_attention(q, k, v, visibility=seen, feature="relu", eps=eps)
        assert not got[:, :, 3].any() and torch.isfinite(got).all() and got[:, :, 4].any()
        same = reference.linear_attention(q, k, v, visibility=seen, feature="relu", eps=eps)
        torch.testing.assert_close(got, same, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything(causal):
    from dataclasses import replace

    q, k, v = make((2, 2, 2, 40, 40, 16, 16), torch.float32)
    seen = visibility(None, causal=causal, lq=40, lk=40)
    keys = torch.arange(40)[None] >= torch.tensor([[5], [40]])  # the second row sees nothing at all
    bad_k, bad_v = (t.masked_fill(~keys[:, None, :, None], torch.nan) for t in (k, v))
    got = linear_attention(q, bad_k, bad_v, visibility=replace(seen, keys=keys))
    assert torch.isfinite(got).all() and not got[1].any()
    if not causal:
        alone = linear_attention(
            q[:1], k[:1, :, 5:], v[:1, :, 5:], visibility=visibility(None, causal=False, lq=40, lk=35)
        )
        torch.testing.assert_close(got[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_views_and_empty_inputs(causal):
    q, k, v = make((2, 4, 2, 70, 70, 16, 16), torch.float32)
    seen = visibility(None, causal=causal, lq=70, lk=70)
    want = linear_attention(q, k, v, visibility=seen)
    rolled = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(linear_attention(*rolled, turned, visibility=seen), want, rtol=1e-5, atol=1e-6)
    nothing = linear_attention(
        q, k[:, :, :0], v[:, :, :0], visibility=visibility(None, causal=causal, lq=70, lk=0)
    )
    assert nothing.shape == q.shape and not nothing.any()
    none = linear_attention(q[:, :, :0], k, v, visibility=visibility(None, causal=causal, lq=0, lk=70))
    assert none.shape == (2, 4, 0, 16)


def test_blocks_of_any_length_give_the_same(monkeypatch):
    q, k, v = make((3, 2, 2, 333, 333, 16, 16), torch.float32)
    seen = visibility(None, causal=False, lq=333, lk=333)
    causal = visibility(None, causal=True, lq=333, lk=333)
    found = []
    for buffer, chunk in ((1 << 11, 16), (1 << 14, 64), (1 << 20, 256)):
        monkeypatch.setattr(blocked, "BUFFER", buffer)
        monkeypatch.setattr(blocked, "CHUNK", chunk)
        found.append([linear_attention(q, k, v, visibility=s) for s in (seen, causal)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_permuted_keys_change_nothing_and_permuted_queries_permute_the_rows():
    q, k, v = make((1, 2, 1, 64, 64, 16, 16))
    seen, order = visibility(None, causal=False, lq=64, lk=64), torch.randperm(64)
    want = linear_attention(q, k, v, visibility=seen)
    torch.testing.assert_close(
        linear_attention(q, k[:, :, order], v[:, :, order], visibility=seen), want, **EXACT
    )
    torch.testing.assert_close(
        linear_attention(q[:, :, order], k, v, visibility=seen), want[:, :, order], **EXACT
    )


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    q, k, v = (t.requires_grad_() for t in make((1, 4, 2, 20, 20, 8, 8)))
    seen, truth = mask_of("causal" if causal else "full", (1, 4, 2, 20, 20, 8, 8))
    got = torch.autograd.grad(linear_attention(q, k, v, visibility=seen).square().sum(), (q, k, v))
    want = torch.autograd.grad(oracle(q, k, v, truth, "elu", 1e-4).square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- limits


def test_a_million_tokens_of_float16():
    """Sums over keys leave float16 near 50,000 tokens; means do not. Against float64 sums in pieces."""
    n, d = 1_000_000, 8
    q, k, v = (torch.randn(1, 1, n, d, dtype=torch.float32).mul(2).half() for _ in range(3))
    v = v + 100  # far from cancelling
    got = linear_attention(q, k, v, visibility=visibility(None, causal=False, lq=n, lk=n))
    assert torch.isfinite(got).all()
    assert torch.isinf(feature_map(k, "elu").sum(2)).all(), "the plain sum would not have been enough"
    state, total = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    for at in range(0, n, 1 << 17):
        phi = feature_map(k[0, 0, at : at + (1 << 17)].double(), "elu")
        state += phi.T @ v[0, 0, at : at + (1 << 17)].double()
        total += phi.sum(0)
    some = torch.randint(n, (5000,))
    phi = feature_map(q[0, 0, some].double(), "elu")
    want = phi @ (state / n) / (phi @ (total / n) + 1e-4)[:, None]
    assert (got[0, 0, some].double() - want).abs().max() <= torch.finfo(torch.float16).eps * 100


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_length(causal):
    q, k, v = make((1, 2, 1, 4096, 4096, 16, 16), torch.float32)
    with Largest() as seen:
        linear_attention(q, k, v, visibility=visibility(None, causal=causal, lq=4096, lk=4096))
    assert seen.elements <= max(q.numel(), blocked.BUFFER)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_summed_is_refused():
    q, k, v = make((1, 2, 2, 30, 30, 16, 16))
    window = visibility(None, causal=True, lq=30, lk=30, window=4)
    dense = visibility(torch.rand(1, 1, 30, 30) < 0.5, causal=False, lq=30, lk=30)
    full = visibility(None, causal=False, lq=30, lk=30)
    for seen, said in ((window, "window"), (dense, "dense mask")):
        with pytest.raises(InputError, match=said):
            linear_attention(q, k, v, visibility=seen)
    with pytest.raises(InputError, match="elu, relu, softmax"):
        linear_attention(q, k, v, visibility=full, feature="cosine")
    with pytest.raises(InputError, match="eps"):
        linear_attention(q, k, v, visibility=full, eps=-1.0)
    with pytest.raises(InputError, match="do not fit"):
        linear_attention(q, k[:, :1].expand(1, 3, 30, 16), v[:, :1].expand(1, 3, 30, 16), visibility=full)


def test_the_choice_is_explained():
    q, k, v = make((1, 2, 2, 30, 30, 16, 16))
    found = choose(q, k, v, visibility=visibility(None, causal=False, lq=30, lk=30))
    assert found.name == "blocked" and any("CUDA" in reason for reason in found.reasons)
