"""The Triton kernels of linear attention; run by ``test_triton.py`` like triton_kernels.py."""

import os
from dataclasses import replace

import pytest
import torch
from kernel_cases import no_worse
from test_linear import FEATURES, KINDS, make, mask_of, oracle
from triton_device import DEVICE, on_the_device  # noqa: F401 — a fixture that every test uses

from trainless.kernels import linear_attention
from trainless.kernels.linear import triton as form

# (B, H, Hkv, Lq, Lk, D, Dv): longer than a tile, several tiles of values, groups, one token, more queries than keys.
SHAPES = [
    (1, 2, 1, 150, 150, 24, 80),
    (2, 4, 2, 70, 131, 16, 16),
    (1, 1, 1, 1, 1, 16, 16),
    (1, 2, 2, 90, 40, 16, 8),
]
DTYPES = [torch.float32, torch.float16]
ALL = DEVICE == "cuda" or os.environ.get("TRAINLESS_ALL") == "1"
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)
    SHAPES += [(1, 4, 2, 700, 700, 64, 64), (1, 2, 2, 300, 300, 128, 128), (1, 2, 1, 100, 100, 256, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_linear_attention(feature, kind, shape, dtype):
    if feature != "elu" and shape is not SHAPES[0]:
        pytest.skip("the features differ in one place only")
    if (
        not ALL
        and shape is not SHAPES[KINDS.index(kind)]
        and (feature, shape, dtype) != ("elu", SHAPES[0], DTYPES[0])
    ):
        pytest.skip("another shape for every kind, and all of them under TRAINLESS_ALL=1")
    q, k, v = make(shape, dtype)
    seen, truth = mask_of(kind, shape)
    want = oracle(q.double(), k.double(), v.double(), truth, feature, 1e-4)
    got = form.linear_attention(q, k, v, visibility=seen, feature=feature, eps=1e-4)
    assert got.dtype == dtype
    no_worse(got, want, oracle(q, k, v, truth, feature, 1e-4))


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_views_padding_of_any_contents_and_rows_without_features(kind):
    q, k, v = make((2, 4, 2, 70, 70, 16, 16), torch.float32)
    seen, _ = mask_of(f"{kind}-keys" if kind == "causal" else "keys", (2, 4, 2, 70, 70, 16, 16))
    q[:, :, 3] = -1.0
    options = {"visibility": seen, "feature": "relu", "eps": 0.0}
    want = linear_attention(q, k, v, **options)
    hidden = ~seen.keys[:, None, :, None]
    rolled = [t.masked_fill(hidden, torch.nan).transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    got = form.linear_attention(q.transpose(2, 3).contiguous().transpose(2, 3), *rolled, **options)
    assert not got[:, :, 3].any()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    shared = replace(seen, keys=seen.keys[:1])
    one = form.linear_attention(q, k, v, visibility=shared, feature="elu", eps=1e-4)
    torch.testing.assert_close(one, linear_attention(q, k, v, visibility=shared), rtol=1e-5, atol=1e-5)


def test_the_operators_are_registered_correctly():
    q, k, v = make((2, 4, 2, 20, 20, 16, 16), torch.float32)
    keys = torch.rand(2, 20) < 0.8
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for given in (None, keys):
        check(torch.ops.trainless.linear_reduce.default, (k, v, given, 0), test_utils=tests)
        check(torch.ops.trainless.linear_causal.default, (q, k, v, given, 1e-4, 0), test_utils=tests)
    state, total = torch.ops.trainless.linear_reduce(k, v, keys, 0)
    check(torch.ops.trainless.linear_apply.default, (q, state, total, 1e-4, 0), test_utils=tests)


def test_many_spans_add_up_as_one(monkeypatch):
    _, k, v = make((1, 1, 1, 40, 1500, 16, 16), torch.float32)
    found = []
    for spans in (1, 512):
        monkeypatch.setattr(form, "SPANS", spans)
        found.append(torch.ops.trainless.linear_reduce(k, v, None, 0))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


PIECES = [("causal-keys", (230, 420))]
if ALL:
    PIECES = [(k, n) for k in ("causal", "causal-keys") for n in ((1100, 1100), (230, 420), (420, 200))]


@pytest.mark.parametrize(("kind", "lengths"), PIECES, ids=str)
def test_a_causal_sequence_in_pieces(kind, lengths):
    """Longer than a piece; more keys than queries, and queries before the first key."""
    shape = (2, 2, 1, *lengths, 16, 80)
    q, k, v = make(shape, torch.float32)
    seen, truth = mask_of(kind, shape)
    want = oracle(q.double(), k.double(), v.double(), truth, "elu", 1e-4)
    got = form.linear_attention(q, k, v, visibility=seen, feature="elu", eps=1e-4)
    no_worse(got, want, oracle(q, k, v, truth, "elu", 1e-4))
