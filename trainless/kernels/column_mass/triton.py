# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``column_mass``: one program per (batch row, query head, key tile).

A program walks over the query tiles that can see its keys and adds up in registers: no atomics, one
write, the same bits every time. Registered as ``trainless::column_mass``. On an H100 it costs as much
as fused attention at 8,192 tokens, three quarters at 32,768 (benchmarks/results/kernels-nvidia-h100-80gb-hbm3.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..tiles import finish, launch, load_rows, mask_arguments, mask_operands, product, tanh, width_of
from ..visibility import Visibility


@triton.jit
def _column_mass(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, lse, chosen, out,
    heads, count, share, lq, lk, d, scale,
    softcap, window, keys, keys_b, keys_k, hidden,
    mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1).to(tl.int64)
    b = lane // count
    h = tl.load(chosen + lane % count)
    left = tl.program_id(0).to(tl.int64) * BN
    cols = left + tl.arange(0, BN)
    offset = lk - lq
    key = load_rows(k + b * k_b + (h // share) * k_h, cols, k_n, k_d, cols < lk, d, BD)
    # Summed over the rows of a tile at the end only: a sum across threads per tile would cost as much as the rest.
    acc = tl.full((BM, BN), 0.0, tl.float32)
    lo = left * 0
    hi = lo + lq
    if CAUSAL:
        lo = tl.maximum(lo, left - offset)
        if WINDOW:
            hi = tl.minimum(hi, left + BN - 1 - offset + window)
    elif WINDOW:
        lo = tl.maximum(lo, left - offset - window)
        hi = tl.minimum(hi, left + BN - offset + window)
    begin, masked = lo // BM * BM, hi
    if not (WINDOW or KEYS or MASK != 0 or BIAS):
        # From here every row sees every key of the tile; rows past the end have an infinite sum.
        masked = begin
        if CAUSAL:
            masked = tl.maximum(tl.cdiv(left + BN - 1 - offset, BM) * BM, begin)
    for start in range(begin, tl.minimum(masked, hi), BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        query = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, rows < lq, d, BD)
        total = tl.load(lse + (b * heads + h) * lq + rows, mask=rows < lq, other=float("inf"))
        z = finish(
            product(query, key, EXACT) * scale, rows, cols, cols < lk, b, h, lq, lk, offset,
            softcap, window, keys, keys_b, keys_k, hidden,
            mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
            CAUSAL, WINDOW, CAP, KEYS, MASK, BIAS,
        )  # fmt: skip
        acc += tl.exp(z - total[:, None])
    for start in range(masked, hi, BM):
        rows = start + tl.arange(0, BM).to(tl.int64)
        query = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, rows < lq, d, BD)
        total = tl.load(lse + (b * heads + h) * lq + rows, mask=rows < lq, other=float("inf"))
        z = product(query, key, EXACT) * scale
        if CAP:
            z = softcap * tanh(z / softcap)
        acc += tl.exp(z - total[:, None])
    tl.store(out + lane * lk + cols, tl.sum(acc, 0), mask=cols < lk)


@torch.library.custom_op("trainless::column_mass", mutates_args=())
def column_mass_op(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    heads: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    keys: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """heads (h,) int64; lse (B, H, Lq) with +inf for rows that do not count. Returns (B, h, Lk)."""
    b, h, lq, d = query.shape
    lk, count = key.shape[2], heads.shape[0]
    out = torch.empty(b, count, lk, dtype=torch.float32, device=query.device)
    width = width_of(d)
    sizes = launch("column_mass", width, query)
    _column_mass[(triton.cdiv(lk, sizes["BN"]), b * count)](
        query, *query.stride(), key, *key.stride(), lse.contiguous(), heads.contiguous(), out,
        h, count, h // key.shape[1], lq, lk, d, scale,
        **mask_arguments(query, softcap, causal, window, keys, mask, bias),
        EXACT=query.dtype == torch.float32, BD=width, **sizes,
    )  # fmt: skip
    return out


@column_mass_op.register_fake
def _(query, key, lse, heads, scale, causal, window, keys, mask, bias, softcap):
    return query.new_empty(query.shape[0], heads.shape[0], key.shape[2], dtype=torch.float32)


def column_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    visibility: Visibility,
    terms: Terms,
    rows: Tensor | None = None,
    heads: list[int] | None = None,
    group: str | None = None,
) -> Tensor:
    """See ``api.column_mass``."""
    h, hkv = query.shape[1], key.shape[1]
    chosen = torch.arange(h) if heads is None else torch.tensor(heads, dtype=torch.long)
    chosen = chosen.to(query.device)
    counted = torch.isfinite(lse) if rows is None else torch.isfinite(lse) & rows[:, None]
    mass = column_mass_op(
        query, key, torch.where(counted, lse.float(), torch.inf), chosen, terms.scale,
        *mask_operands(visibility), terms.position_bias, terms.softcap,
    )  # fmt: skip
    if group != "sum":
        return mass
    summed = mass.new_zeros(mass.shape[0], hkv, mass.shape[2])
    for n in range(h // hkv) if heads is None else ():
        summed += mass[:, n :: h // hkv]
    for n, head in enumerate(heads or ()):
        summed[:, head // (h // hkv)] += mass[:, n]
    return summed
