# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``linear_attention``: sums over pieces of keys, one product per tile of queries; and causal.

Without a causal mask the keys are cut into pieces, one program each, whose sums are added up afterwards: no
atomics, the same bits every time. Then one program per tile of queries. The causal form cuts the keys likewise:
a program begins with the sums of the pieces before its own and walks through its piece in chunks. Registered as
``trainless::linear_reduce``, ``linear_apply`` and ``linear_causal``.

Features stay in float32 and products run as TF32 for half-precision inputs (whose values TF32 holds exactly
or nearly so): the whole is bound by memory, and features of half precision would be the larger error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import load_rows, multiply, width_of
from ..visibility import Visibility

CODES = {"elu": 0, "relu": 1, "softmax": 2}
SPANS = 512  # programs that share the keys of all heads: a few per multiprocessor
BV = 64  # columns of the value that a program works on: sums of 128 x 64 fit into registers


@triton.jit
def features(x, valid, d, FEATURE: tl.constexpr, BD: tl.constexpr):
    """phi of rows of float32 (n, BD); zero in rows that do not count and past the width d."""
    inside = (tl.arange(0, BD) < d)[None, :]
    if FEATURE == 0:
        phi = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == 1:
        phi = tl.maximum(x, 0.0)
    else:
        z = tl.where(inside, x, float("-inf"))
        e = tl.exp(z - tl.max(z, 1)[:, None])
        phi = e / tl.sum(e, 1)[:, None]
    return tl.where(inside & valid[:, None], phi, 0.0)


@triton.jit
def load_keys(k, v, keys, at, cols, k_n, k_d, v_n, v_d, keys_k, lk, d, dv,
              FEATURE: tl.constexpr, KEYS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """(phi(k), v, exists) of the keys ``cols``; keys that do not exist are zero in both."""
    there = cols < lk
    if KEYS:
        there = there & (tl.load(keys + cols * keys_k, mask=there, other=0) != 0)
    phi = features(load_rows(k, cols, k_n, k_d, there, d, BD).to(tl.float32), there, d, FEATURE, BD)
    value = load_rows(v + at * v_d, cols, v_n, v_d, there, dv - at, BV).to(tl.float32)
    return phi, value, there


@triton.jit
def _reduce(
    k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d, keys, keys_b, keys_k, state, total,
    hkv, lk, d, dv, origin, span, pieces,
    FEATURE: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    part, lane, at = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    b, g = lane // hkv, lane % hkv
    acc = tl.full((BD, BV), 0.0, tl.float32)
    mean = tl.full((BD,), 0.0, tl.float32)
    begin = origin + part * span
    for start in range(begin, tl.minimum(begin + span, lk), BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        phi, value, _ = load_keys(
            k + b * k_b + g * k_h, v + b * v_b + g * v_h, keys + b * keys_b, at, tl.where(cols < 0, lk, cols),
            k_n, k_d, v_n, v_d, keys_k, lk, d, dv, FEATURE, KEYS, BD, BV,
        )  # fmt: skip
        acc += multiply(tl.trans(phi), value, EXACT)
        mean += tl.sum(phi, 0)
    rows, wide = tl.arange(0, BD), at + tl.arange(0, BV)
    base = (lane * pieces + part) * d
    where = state + (base + rows[:, None]) * dv + wide[None, :]
    tl.store(where, acc, mask=(rows[:, None] < d) & (wide[None, :] < dv))
    if at == 0:
        tl.store(total + base + rows, mean, mask=rows < d)


@triton.jit
def _apply(
    q, q_b, q_h, q_n, q_d, state, total, out,
    heads, share, lq, d, dv, eps,
    FEATURE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    lane, at = tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    b, h = lane // heads, lane % heads
    g = lane // share
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside, wide = tl.arange(0, BD), at + tl.arange(0, BV)
    x = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, rows < lq, d, BD).to(tl.float32)
    phi = features(x, rows < lq, d, FEATURE, BD)
    where = state + (g * d + inside[:, None]) * dv + wide[None, :]
    sums = tl.load(where, mask=(inside[:, None] < d) & (wide[None, :] < dv), other=0.0)
    mean = tl.load(total + g * d + inside, mask=inside < d, other=0.0)
    weight = tl.sum(phi * mean[None, :], 1) + eps
    found = multiply(phi, sums, EXACT) / tl.where(weight == 0, 1.0, weight)[:, None]
    tl.store(
        out + (lane * lq + rows[:, None]) * dv + wide[None, :], found.to(out.dtype.element_ty),
        mask=(rows[:, None] < lq) & (wide[None, :] < dv),
    )  # fmt: skip


@triton.jit
def _sums_before(parts, each, pieces, BS: tl.constexpr):
    """parts (lanes, pieces, each): every piece becomes the sum of those before it, in place and always in order."""
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    base = parts + tl.program_id(1).to(tl.int64) * pieces * each + at
    so_far = tl.full((BS,), 0.0, tl.float32)
    for piece in range(0, pieces):
        where = base + piece * each
        mine = tl.load(where, mask=at < each, other=0.0)
        tl.store(where, so_far, mask=at < each)
        so_far += mine


@triton.jit
def _causal(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d, keys, keys_b, keys_k, out,
    state, before, counted, heads, share, lq, lk, d, dv, origin, span, pieces, eps,
    FEATURE: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr, CUT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    lane, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    b, h = lane // heads, lane % heads
    g = h // share
    offset = lane * 0 + (lk - lq)  # a single token is a constant to the compiler, which has no type to change
    acc = tl.full((BD, BV), 0.0, tl.float32)
    total = tl.full((BD,), 0.0, tl.float32)
    held = 0.0
    wide = at + tl.arange(0, BV)
    part = tl.program_id(2).to(tl.int64)
    if CUT:
        inside = tl.arange(0, BD)
        base = ((b * (heads // share) + g) * pieces + part) * d
        where = state + (base + inside[:, None]) * dv + wide[None, :]
        acc = tl.load(where, mask=(inside[:, None] < d) & (wide[None, :] < dv), other=0.0)
        total = tl.load(before + base + inside, mask=inside < d, other=0.0)
        held = tl.load(counted + b * pieces + part)
    # Chunks of keys in step with the queries that come with them; the first ones have keys only. Key c
    # comes with query c - offset, so a chunk of keys that starts at a multiple of BN meets its own queries.
    begin = origin + part * span
    for start in range(begin, tl.minimum(begin + span, lk), BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        rows = cols - offset
        phi, value, there = load_keys(
            k + b * k_b + g * k_h, v + b * v_b + g * v_h, keys + b * keys_b, at, tl.where(cols < 0, lk, cols),
            k_n, k_d, v_n, v_d, keys_k, lk, d, dv, FEATURE, KEYS, BD, BV,
        )  # fmt: skip
        asked = (rows >= 0) & (rows < lq)
        x = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, asked, d, BD).to(tl.float32)
        phi_q = features(x, asked, d, FEATURE, BD)
        lower = cols[:, None] >= cols[None, :]
        weights = tl.where(lower, multiply(phi_q, tl.trans(phi), EXACT), 0.0)
        products = multiply(weights, value, EXACT) + multiply(phi_q, acc, EXACT)
        weight = tl.sum(weights, 1) + tl.sum(phi_q * total[None, :], 1)
        count = tl.maximum(held + tl.sum(tl.where(lower & there[None, :], 1.0, 0.0), 1), 1.0)
        below = weight / count + eps
        found = products / count[:, None] / tl.where(below == 0, 1.0, below)[:, None]
        tl.store(
            out + (lane * lq + rows[:, None]) * dv + wide[None, :], found.to(out.dtype.element_ty),
            mask=asked[:, None] & (wide[None, :] < dv),
        )  # fmt: skip
        acc += multiply(tl.trans(phi), value, EXACT)
        total += tl.sum(phi, 0)
        held += tl.sum(tl.where(there, 1.0, 0.0), 0)


def _keys(query: Tensor, keys: Tensor | None) -> tuple[Tensor, int, int]:
    """The key mask as bytes with its strides; without one a pointer that is never read."""
    if keys is None:
        return query, 0, 0
    return keys.view(torch.uint8), 0 if keys.shape[0] == 1 else keys.stride(0), keys.stride(1)


@torch.library.custom_op("trainless::linear_reduce", mutates_args=())
def linear_reduce_op(key: Tensor, value: Tensor, keys: Tensor | None, feature: int) -> tuple[Tensor, Tensor]:
    """Means over the keys that exist: of phi(k) vᵀ, (B, Hkv, D, Dv), and of phi(k), (B, Hkv, D); float32."""
    b, hkv, lk, d = key.shape
    dv, width = value.shape[3], width_of(d)
    bn = 64 if width <= 128 else 32
    pieces = max(1, min(triton.cdiv(lk, 4 * bn), SPANS // max(1, b * hkv)))
    span = triton.cdiv(triton.cdiv(lk, pieces), bn) * bn
    pieces = triton.cdiv(lk, span)
    state = torch.empty(b, hkv, pieces, d, dv, dtype=torch.float32, device=key.device)
    total = torch.empty(b, hkv, pieces, d, dtype=torch.float32, device=key.device)
    mask, mask_b, mask_k = _keys(key, keys)
    _reduce[(pieces, b * hkv, triton.cdiv(dv, BV))](
        key, *key.stride(), value, *value.stride(), mask, mask_b, mask_k, state, total,
        hkv, lk, d, dv, 0, span, pieces,
        FEATURE=feature, KEYS=keys is not None, EXACT=key.dtype == torch.float32, BN=bn, BD=width, BV=BV,
    )  # fmt: skip
    if keys is None:
        return state.sum(2) / lk, total.sum(2) / lk
    count = keys.sum(1).clamp(min=1)[:, None, None]
    return state.sum(2) / count[..., None], total.sum(2) / count


@linear_reduce_op.register_fake
def _(key, value, keys, feature):
    b, hkv, _, d = key.shape
    state = key.new_empty(b, hkv, d, value.shape[3], dtype=torch.float32)
    return state, key.new_empty(b, hkv, d, dtype=torch.float32)


@torch.library.custom_op("trainless::linear_apply", mutates_args=())
def linear_apply_op(query: Tensor, state: Tensor, total: Tensor, eps: float, feature: int) -> Tensor:
    """phi(q) state / (phi(q)·total + eps): (B, H, Lq, Dv) in the dtype of ``query``."""
    b, h, lq, d = query.shape
    dv, width = state.shape[3], width_of(d)
    bm = 64 if width <= 128 else 32
    out = torch.empty(b, h, lq, dv, dtype=query.dtype, device=query.device)
    _apply[(triton.cdiv(lq, bm), b * h, triton.cdiv(dv, BV))](
        query, *query.stride(), state.contiguous(), total.contiguous(), out,
        h, h // state.shape[1], lq, d, dv, eps,
        FEATURE=feature, EXACT=query.dtype == torch.float32, BM=bm, BD=width, BV=BV,
    )  # fmt: skip
    return out


@linear_apply_op.register_fake
def _(query, state, total, eps, feature):
    return query.new_empty(*query.shape[:3], state.shape[3])


@torch.library.custom_op("trainless::linear_causal", mutates_args=())
def linear_causal_op(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, eps: float, feature: int
) -> Tensor:
    """The causal form: (B, H, Lq, Dv) in the dtype of ``query``."""
    b, h, lq, d = query.shape
    lk, dv = value.shape[2:]
    hkv, width, bn = key.shape[1], width_of(d), 64 if d <= 64 else 32
    exact, wide = query.dtype == torch.float32, triton.cdiv(dv, BV)
    out = torch.empty(b, h, lq, dv, dtype=query.dtype, device=query.device)
    mask, mask_b, mask_k = _keys(query, keys)
    # Queries before the first key have chunks too: those begin at a negative number.
    origin = min(lk - lq, 0)
    pieces = max(1, min(triton.cdiv(lk - origin, 4 * bn), SPANS // max(1, b * h * wide)))
    span = triton.cdiv(triton.cdiv(lk - origin, pieces), bn) * bn
    pieces = triton.cdiv(lk - origin, span)
    state, total, counted = out, out, out  # never read with one piece
    if pieces > 1:
        state = torch.empty(b, hkv, pieces, d, dv, dtype=torch.float32, device=key.device)
        total = torch.empty(b, hkv, pieces, d, dtype=torch.float32, device=key.device)
        _reduce[(pieces, b * hkv, wide)](
            key, *key.stride(), value, *value.stride(), mask, mask_b, mask_k, state, total,
            hkv, lk, d, dv, origin, span, pieces,
            FEATURE=feature, KEYS=keys is not None, EXACT=exact, BN=bn, BD=width, BV=BV,
        )  # fmt: skip
        for parts in (state, total):
            each = parts[0, 0, 0].numel()
            _sums_before[(triton.cdiv(each, 256), b * hkv)](parts, each, pieces, BS=256)
        counted = _count_before(keys, b, lk, origin, span, pieces, key.device)
    _causal[(b * h, wide, pieces)](
        query, *query.stride(), key, *key.stride(), value, *value.stride(), mask, mask_b, mask_k, out,
        state, total, counted, h, h // hkv, lq, lk, d, dv, origin, span, pieces, eps,
        FEATURE=feature, KEYS=keys is not None, EXACT=exact, CUT=pieces > 1, BN=bn, BD=width, BV=BV,
    )  # fmt: skip
    return out


def _count_before(
    keys: Tensor | None, b: int, lk: int, origin: int, span: int, pieces: int, device: torch.device
) -> Tensor:
    """(B, pieces) float32: keys that exist before each piece."""
    starts = (origin + span * torch.arange(pieces, device=device)).clamp(0, lk)
    if keys is None:
        return starts.float().expand(b, pieces).contiguous()
    so_far = torch.nn.functional.pad(keys.cumsum(1), (1, 0))
    return so_far.expand(b, lk + 1)[:, starts].float().contiguous()


@linear_causal_op.register_fake
def _(query, key, value, keys, eps, feature):
    return query.new_empty(*query.shape[:3], value.shape[3])


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, feature: str, eps: float
) -> Tensor:
    """See ``api.linear_attention``."""
    keys = visibility.keys
    keys = None if keys is None else keys.expand(query.shape[0], -1)
    if visibility.causal:
        return linear_causal_op(query, key, value, keys, eps, CODES[feature])
    state, total = linear_reduce_op(key, value, keys, CODES[feature])
    return linear_apply_op(query, state, total, eps, CODES[feature])
