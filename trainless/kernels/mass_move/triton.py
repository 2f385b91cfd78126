# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``mass_move`` with every other key as the target: one program per query tile.

A program reads the source columns alone. Only a tile that holds a row where the correction would lose
precision (see ``blocked``) walks over all keys, so nothing has to be counted on the host in between.
Registered as ``trainless::mass_move``. On an H100 a few sources per head cost less than fused attention, a fifth of
the keys three times as much (benchmarks/results/kernels-nvidia-h100-80gb-hbm3.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..tiles import (
    finish,
    key_range,
    launch,
    load_rows,
    mask_arguments,
    mask_operands,
    multiply,
    product,
    width_of,
)
from ..visibility import Visibility

# As LIMIT of ``blocked``, for every dtype: a tile that walks over all keys costs little here.
LIMIT = 2.0


@triton.jit
def _mass_move(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d,
    old, old_b, old_h, old_n, old_d, new, new_b, new_h, new_n, new_d,
    lse, keep, source, index, filled, chosen, sinks,
    heads, count, share, lq, lk, d, most, scale, limit,
    softcap, window, keys, keys_b, keys_k, hidden,
    mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1).to(tl.int64)
    b = lane // count
    h = tl.load(chosen + lane % count)
    first = tl.program_id(0).to(tl.int64) * BM
    rows = first + tl.arange(0, BM)
    inside = rows < lq
    offset = lk - lq
    query = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, inside, d, BD)
    total = tl.load(lse + (b * heads + h) * lq + rows, mask=inside, other=float("-inf"))
    kept = tl.load(keep + lane * lq + rows, mask=inside, other=1.0)
    blind = total == float("-inf")
    total = tl.where(blind, 0.0, total)
    k_base = k + b * k_b + (h // share) * k_h
    v_base = v + b * v_b + (h // share) * v_h
    s = tl.full((BM,), 0.0, tl.float32)
    moved = tl.full((BM, BD), 0.0, tl.float32)
    here = tl.load(filled + lane)
    for start in range(0, here, BS):
        slot = start + tl.arange(0, BS)
        cols = tl.load(index + lane * most + slot, mask=slot < here, other=0)
        key = load_rows(k_base, cols, k_n, k_d, slot < here, d, BD)
        z = finish(
            product(query, key, EXACT) * scale, rows, cols, slot < here, b, h, lq, lk, offset,
            softcap, window, keys, keys_b, keys_k, hidden,
            mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
            CAUSAL, WINDOW, CAP, KEYS, MASK, BIAS,
        )  # fmt: skip
        p = tl.exp(z - total[:, None])
        s += tl.sum(p, 1)
        value = load_rows(v_base, cols, v_n, v_d, slot < here, d, BD)
        # Half precision would cost accuracy: the correction is a difference. TF32 holds its values exactly.
        moved += multiply(p, value.to(tl.float32), EXACT)
    wide = tl.arange(0, BD).to(tl.int64)
    held = tl.full((BM,), 1.0, tl.float32)
    if SINKS:
        held -= tl.exp(tl.load(sinks + h).to(tl.float32) - total)
    rest = held - s
    still = (kept == 1.0) | (s == 0.0) | blind
    c = (held - kept * s) / tl.where(rest > 0, rest, 1.0)
    hard = ((rest <= 0) | (c > limit)) & (still == 0)
    plain = still | hard
    c = tl.where(plain, 1.0, c)
    at = old + b * old_b + h * old_h + rows[:, None] * old_n + wide[None, :] * old_d
    within = inside[:, None] & (wide[None, :] < d)
    o = tl.load(at, mask=within, other=0.0).to(tl.float32)
    result = c[:, None] * o + tl.where(plain, 0.0, kept - c)[:, None] * moved
    if tl.max(hard.to(tl.int32), 0) > 0:
        top = tl.full((BM,), float("-inf"), tl.float32)
        sum_ = tl.full((BM,), 0.0, tl.float32)
        acc = tl.full((BM, BD), 0.0, tl.float32)
        lo, hi = key_range(first, first + BM, lk, offset, window, CAUSAL, WINDOW)
        for start in range(lo // BN * BN, hi, BN):
            cols = start + tl.arange(0, BN).to(tl.int64)
            outside = tl.load(source + lane * lk + cols, mask=cols < lk, other=1) == 0
            key = load_rows(k_base, cols, k_n, k_d, cols < lk, d, BD)
            z = finish(
                product(query, key, EXACT) * scale, rows, cols, outside, b, h, lq, lk, offset,
                softcap, window, keys, keys_b, keys_k, hidden,
                mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
                CAUSAL, WINDOW, CAP, KEYS, MASK, BIAS,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(z, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(z - base[:, None])
            shrink = tl.exp(top - base)
            sum_ = sum_ * shrink + tl.sum(p, 1)
            value = load_rows(v_base, cols, v_n, v_d, cols < lk, d, BD)
            acc = acc * shrink[:, None] + multiply(p, value.to(tl.float32), EXACT)
            top = higher
        receives = top != float("-inf")
        mean = acc / tl.where(receives, sum_, 1.0)[:, None]
        outer = sum_ * tl.exp(tl.where(receives, top, 0.0) - total)
        exact = kept[:, None] * moved + (outer + (1.0 - kept) * s)[:, None] * mean
        result = tl.where((hard & receives)[:, None], exact, result)
    at = new + b * new_b + h * new_h + rows[:, None] * new_n + wide[None, :] * new_d
    tl.store(at, result.to(new.dtype.element_ty), mask=within)


@torch.library.custom_op("trainless::mass_move", mutates_args=())
def mass_move_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    source: Tensor,
    keep: Tensor,
    heads: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    keys: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """source (B, h, Lk) bool; keep (B, h, Lq) float32, 1 in rows to leave; heads (h,) int64."""
    b, h, lq, d = query.shape
    lk, count = key.shape[2], heads.shape[0]
    new = out.clone()
    filled = source.sum(-1)
    # Source keys first, in order: no size has to come back to the host.
    index = torch.argsort(source.to(torch.uint8), dim=-1, descending=True, stable=True)
    width = width_of(d)
    sizes = launch("mass_move", width, query)
    _mass_move[(triton.cdiv(lq, sizes["BM"]), b * count)](
        query, *query.stride(), key, *key.stride(), value, *value.stride(), out, *out.stride(),
        new, *new.stride(), lse.float().contiguous(), keep.contiguous(),
        source.contiguous().view(torch.uint8), index, filled, heads.contiguous(),
        query if sinks is None else sinks.contiguous(),
        h, count, h // key.shape[1], lq, lk, d, lk, scale, LIMIT,
        **mask_arguments(query, softcap, causal, window, keys, mask, bias),
        SINKS=sinks is not None, EXACT=query.dtype == torch.float32,
        BS=16 if query.dtype == torch.float32 else 32, BD=width, **sizes,
    )  # fmt: skip
    return new


@mass_move_op.register_fake
def _(
    query, key, value, out, lse, source, keep, heads, scale, causal, window, keys, mask, bias, softcap, sinks
):
    return torch.empty_like(out)


def mass_move(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    source: Tensor,
    keep: float | Tensor,
    rows: Tensor | None,
    heads: list[int] | None,
    visibility: Visibility,
    terms: Terms,
) -> Tensor:
    """See ``api.mass_move``; the target is every other visible key."""
    b, h, lq, _ = query.shape
    chosen = torch.arange(h) if heads is None else torch.tensor(heads, dtype=torch.long)
    kept = torch.as_tensor(keep, dtype=torch.float32, device=query.device).expand(b, chosen.shape[0], lq)
    if rows is not None:
        kept = torch.where(rows, kept, 1.0)
    new: Tensor = mass_move_op(
        query, key, value, out, lse, source, kept.contiguous(), chosen.to(query.device), terms.scale,
        *mask_operands(visibility), terms.position_bias, terms.softcap, terms.sink_logits,
    )  # fmt: skip
    return new
