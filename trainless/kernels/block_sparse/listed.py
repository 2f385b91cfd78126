# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``block_sparse`` over lists of tiles: for patterns of blocks or spans under a plain or causal mask.

The query heads of a group are rows of one tile, so keys and values are read once for all of them. Programs are as many
as the GPU runs at a time and take tiles from the heaviest on. Tiles without a mask come first and have a loop of their
own. On GPUs that have it (compute capability 9.0 on) keys and values come through tensor descriptors (TMA). Registered
as ``trainless::block_sparse_tiles``. Not timed on a GPU.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..tiles import load_rows, width_of
from ..visibility import Visibility
from .lists import Tiling, tile_lists, tiling_of
from .patterns import Blocks, Spans

KEYS = 64  # of a tile


@triton.jit
def _step(
    query, k, v, k_n, k_d, v_n, v_d, b, g, tile, rows, span, first_keys, lk, d, scale, top, total, acc,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SPANS: tl.constexpr, TMA: tl.constexpr, EXACT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax to base 2; scale is positive and to that base."""
    if TMA:
        key = k.load([b, g, tile * BN, 0]).reshape(BN, BD)
        value = v.load([b, g, tile * BN, 0]).reshape(BN, BD)
    else:
        cols = tile * BN + tl.arange(0, BN).to(tl.int64)
        key = load_rows(k, cols, k_n, k_d, cols < lk, d, BD)
        value = load_rows(v, cols, v_n, v_d, cols < lk, d, BD)
    if EXACT:
        z = tl.dot(query, tl.trans(key), input_precision="ieee")
    else:
        z = tl.dot(query, tl.trans(key))
    if MASK:
        at = tile * BN + tl.arange(0, BN)
        seen = (at < lk)[None, :]
        gap = rows[:, None] - at[None, :]
        if CAUSAL:
            seen = seen & (gap >= 0)
        if SPANS:
            seen = seen & ((gap < span[:, None]) | (at < first_keys)[None, :])
        z = tl.where(seen, z, float("-inf"))
    higher = tl.maximum(top, tl.max(z, 1) * scale)
    base = higher
    if MASK:
        base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(z * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    if EXACT:
        acc = acc * shrink[:, None] + tl.dot(p, value, input_precision="ieee")
    else:
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
    return higher, total, acc


@triton.jit
def _tiles(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d, out, sinks, spans,
    entries, counts, wholes, order, items, tiles, most, listed, lanes, heads, share, first_keys, lq, lk, d, scale,
    CAUSAL: tl.constexpr, SPANS: tl.constexpr, SINKS: tl.constexpr, TMA: tl.constexpr, EXACT: tl.constexpr,
    BT: tl.constexpr, TOGETHER: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BT * TOGETHER)
    wide = tl.arange(0, BD).to(tl.int64)
    once = scale * 1.4426950408889634
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chosen = tl.load(order + item)
        lane, tile = (chosen // tiles).to(tl.int64), chosen % tiles
        b, h = lane // lanes, lane % lanes * TOGETHER
        g = h // share
        head = h + row // BT
        token = tile * BT + row % BT
        of = tl.where(listed > 1, lane, 0) * tiles + tile
        from_q = q + b * q_b + head[:, None] * q_h + token.to(tl.int64)[:, None] * q_n + wide[None, :] * q_d
        query = tl.load(from_q, mask=(token < lq)[:, None] & (wide < d)[None, :], other=0.0)
        span = row
        if SPANS:
            span = tl.load(spans + head).to(tl.int32)
        at = token + (lk - lq)
        k_at, v_at = k, v
        if not TMA:
            k_at, v_at = k + b * k_b + g * k_h, v + b * v_b + g * v_h
        b32, g32 = b.to(tl.int32), g.to(tl.int32)
        top = tl.full((BT * TOGETHER,), float("-inf"), tl.float32)
        total = tl.zeros((BT * TOGETHER,), tl.float32)
        acc = tl.zeros((BT * TOGETHER, BD), tl.float32)
        whole = tl.load(wholes + of)
        for n in range(0, whole):
            column = tl.load(entries + of * most + n)
            top, total, acc = _step(
                query, k_at, v_at, k_n, k_d, v_n, v_d, b32, g32, column, at, span, first_keys, lk, d,
                once, top, total, acc,
                False, CAUSAL, SPANS, TMA, EXACT, BN, BD,
            )  # fmt: skip
        for n in range(whole, tl.load(counts + of)):
            column = tl.load(entries + of * most + n)
            top, total, acc = _step(
                query, k_at, v_at, k_n, k_d, v_n, v_d, b32, g32, column, at, span, first_keys, lk, d,
                once, top, total, acc,
                True, CAUSAL, SPANS, TMA, EXACT, BN, BD,
            )  # fmt: skip
        blind = top == float("-inf")
        if SINKS:
            base = tl.where(blind, 0.0, top)
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(base, sink)
            shrink = tl.exp2(base - higher)
            total = total * shrink + tl.exp2(sink - higher)
            acc = acc * shrink[:, None]
        found = tl.where(blind[:, None], 0.0, acc / tl.where(blind, 1.0, total)[:, None])
        to = out + ((b * heads + head[:, None]) * lq + token[:, None]) * d + wide[None, :]
        tl.store(to, found.to(out.dtype.element_ty), mask=(token < lq)[:, None] & (wide < d)[None, :])


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _descriptors(device: torch.device) -> bool:
    """Whether a device reads tiles through descriptors; the interpreter does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _described(tensor: Tensor, keys: int, width: int) -> bool:
    """Whether a descriptor can be made of (B, Hkv, Lk, D) keys or values."""
    fits = (
        all(s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:3]) and tensor.data_ptr() % 16 == 0
    )
    whole = tensor.shape[3] == width and tensor.dtype.itemsize == 2 and width * 2 >= 32 and keys <= 256
    return fits and whole and tensor.stride(3) == 1 and 0 not in tensor.shape and _descriptors(tensor.device)


@torch.library.custom_op("trainless::block_sparse_tiles", mutates_args=())
def block_sparse_tiles_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entries: Tensor,
    counts: Tensor,
    wholes: Tensor,
    order: Tensor,
    spans: Tensor | None,
    sinks: Tensor | None,
    tokens: int,
    together: int,
    keys: int,
    first_keys: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """See ``lists.TileLists`` and ``lists.Tiling``; spans (H,), first_keys: those of ``Spans``."""
    b, h, lq, d = query.shape
    hkv, lk = key.shape[1:3]
    width, exact = width_of(d), query.dtype == torch.float32
    out = torch.empty(b, h, lq, d, dtype=query.dtype, device=query.device)
    items, tiles = order.shape[0], counts.shape[1]
    tma = all(_described(t, keys, width) for t in (key, value))
    k, v = key, value
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        block = [1, 1, keys, width]
        k, v = (TensorDescriptor(t, list(t.shape), list(t.stride()), block) for t in (key, value))
    _tiles[(min(items, 2 * _processors(query.device)),)](
        query, *query.stride(), k, *key.stride(), v, *value.stride(), out, query if sinks is None else sinks,
        query if spans is None else spans, entries, counts, wholes, order, items, tiles, entries.shape[2],
        entries.shape[0], h // together, h, h // hkv, first_keys, lq, lk, d, scale,
        CAUSAL=causal, SPANS=spans is not None, SINKS=sinks is not None, TMA=tma, EXACT=exact, BT=tokens,
        TOGETHER=together, BN=keys, BD=width, num_warps=8 if tokens * together >= 128 else 4,
        num_stages=3 if not exact else 1,
    )  # fmt: skip
    return out


@block_sparse_tiles_op.register_fake
def _(query, *rest):
    return query.new_empty(query.shape)


def serves(visibility: Visibility, terms: Terms) -> bool:
    """Whether a call has nothing that a tile without a mask would leave out."""
    plain = visibility.keys is None and visibility.dense is None and visibility.window is None
    return plain and terms.plain and terms.scale > 0


def block_sparse(
    query: Tensor, key: Tensor, value: Tensor, pattern: Blocks | Spans, *, causal: bool, terms: Terms
) -> Tensor:
    """See ``api.block_sparse``."""
    b, h, lq, _ = query.shape
    hkv, lk = key.shape[1:3]
    if 0 in (b, h, lq, lk):
        return query.new_zeros(query.shape)
    tiling: Tiling = tiling_of(pattern, h, hkv, KEYS if query.dtype != torch.float32 else 32)
    lists = tile_lists(pattern, b, h, lq, lk, causal, tiling)
    spans, first_keys = (pattern.span, pattern.sinks) if isinstance(pattern, Spans) else (None, 0)
    found: Tensor = block_sparse_tiles_op(
        query, key, value, lists.entries, lists.counts, lists.wholes, lists.order, spans, terms.sink_logits,
        tiling.tokens, tiling.together, tiling.keys, first_keys, terms.scale, causal,
    )  # fmt: skip
    return found
