# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``attention``: one program per query tile, online softmax, log-sum-exp beside it.

Registered as ``trainless::attention_lse``, so a compiler sees one operator. On an H100 it takes
1.7 times as long as the fused attention, which uses instructions of that chip that this form does not reach, and
about half as long on a padded batch (benchmarks/results/kernels-nvidia-h100-80gb-hbm3.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..tiles import (
    finish,
    fold,
    key_range,
    launch,
    load_rows,
    mask_arguments,
    mask_operands,
    product,
    tanh,
    width_of,
)
from ..visibility import Visibility


@triton.jit
def _attention(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d,
    out, out_b, out_h, out_n, out_d, lse, sinks,
    heads, share, lq, lk, d, scale,
    softcap, window, keys, keys_b, keys_k, hidden,
    mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1).to(tl.int64)
    b, h = lane // heads, lane % heads
    first = tl.program_id(0).to(tl.int64) * BM
    rows = first + tl.arange(0, BM)
    offset = lk - lq
    query = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, rows < lq, d, BD)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.full((BM,), 0.0, tl.float32)
    acc = tl.full((BM, BD), 0.0, tl.float32)
    lo, hi = key_range(first, first + BM, lk, offset, window, CAUSAL, WINDOW)
    begin = lo // BN * BN
    if not (WINDOW or KEYS or MASK != 0 or BIAS):
        # Tiles of which every row sees every key: no mask, which is half of the arithmetic of a tile.
        clear = lk // BN * BN
        if CAUSAL:
            clear = tl.maximum(tl.minimum(clear, (first + offset + 1) // BN * BN), begin)
        for start in range(begin, clear, BN):
            cols = start + tl.arange(0, BN).to(tl.int64)
            key = load_rows(k + b * k_b + (h // share) * k_h, cols, k_n, k_d, cols < lk, d, BD)
            z = product(query, key, EXACT) * scale
            if CAP:
                z = softcap * tanh(z / softcap)
            value = load_rows(v + b * v_b + (h // share) * v_h, cols, v_n, v_d, cols < lk, d, BD)
            top, total, acc = fold(z, value, top, total, acc, EXACT)
        begin = clear
    for start in range(begin, hi, BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        key = load_rows(k + b * k_b + (h // share) * k_h, cols, k_n, k_d, cols < lk, d, BD)
        z = finish(
            product(query, key, EXACT) * scale, rows, cols, cols < lk, b, h, lq, lk, offset,
            softcap, window, keys, keys_b, keys_k, hidden,
            mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
            CAUSAL, WINDOW, CAP, KEYS, MASK, BIAS,
        )  # fmt: skip
        value = load_rows(v + b * v_b + (h // share) * v_h, cols, v_n, v_d, cols < lk, d, BD)
        top, total, acc = fold(z, value, top, total, acc, EXACT)
    blind = top == float("-inf")
    base = tl.where(blind, 0.0, top)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32)
        higher = tl.maximum(base, sink)
        shrink = tl.exp(base - higher)
        total = total * shrink + tl.exp(sink - higher)
        acc = acc * shrink[:, None]
        base = higher
    divisor = tl.where(blind, 1.0, total)
    wide = tl.arange(0, BD).to(tl.int64)
    at = out + b * out_b + h * out_h + rows[:, None] * out_n + wide[None, :] * out_d
    result = tl.where(blind[:, None], 0.0, acc / divisor[:, None])
    tl.store(at, result.to(out.dtype.element_ty), mask=(rows[:, None] < lq) & (wide[None, :] < d))
    tl.store(lse + lane * lq + rows, tl.where(blind, float("-inf"), base + tl.log(divisor)), mask=rows < lq)


@torch.library.custom_op("trainless::attention_lse", mutates_args=())
def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    keys: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``api.attention``; keys (B|1, Lk) and mask (B|1, H|1, Lq, Lk) are parts of a Visibility."""
    b, h, lq, d = query.shape
    lk = key.shape[2]
    out = query.new_empty(b, h, lq, d)
    lse = torch.empty(b, h, lq, dtype=torch.float32, device=query.device)
    width = width_of(d)
    sizes = launch("attention", width, query)
    _attention[(triton.cdiv(lq, sizes["BM"]), b * h)](
        query, *query.stride(), key, *key.stride(), value, *value.stride(), out, *out.stride(), lse,
        query if sinks is None else sinks.contiguous(),
        h, h // key.shape[1], lq, lk, d, scale,
        **mask_arguments(query, softcap, causal, window, keys, mask, bias),
        SINKS=sinks is not None, EXACT=query.dtype == torch.float32, BD=width, **sizes,
    )  # fmt: skip
    return out, lse


@attention_lse.register_fake
def _(query, key, value, scale, causal, window, keys, mask, bias, softcap, sinks):
    b, h, lq, d = query.shape
    return query.new_empty(b, h, lq, d), query.new_empty(b, h, lq, dtype=torch.float32)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, terms: Terms
) -> tuple[Tensor, Tensor]:
    """See ``api.attention``."""
    out: tuple[Tensor, Tensor] = attention_lse(
        query, key, value, terms.scale, *mask_operands(visibility), terms.position_bias, terms.softcap,
        terms.sink_logits,
    )  # fmt: skip
    return out
