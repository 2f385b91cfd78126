# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``block_sparse``: one program per tile of queries, which walks over the keys of its pattern only.

The three patterns differ in where a program finds its rows and the next tile of keys: in lists of chosen tokens,
in a list of blocks, or in the range of a span behind the sinks. Registered as ``trainless::block_sparse``. On an
H100 it pays where little is left: benchmarks/results/block-sparse-nvidia-h100-80gb-hbm3.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..tiles import finish, fold, launch, load_rows, mask_arguments, mask_operands, product, width_of
from ..visibility import Visibility
from . import listed
from .patterns import Blocks, Pattern, Subset

SUBSET, BLOCKS, SPANS = 0, 1, 2


@triton.jit
def _block_sparse(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d,
    out, out_b, out_h, out_n, out_d, sinks,
    rows_of, cols_of, limits, asks, offers, tiles,
    index, index_b, index_h, listed, size,
    spans, first_keys,
    heads, share, lq, lk, d, scale,
    softcap, window, keys, keys_b, keys_k, hidden,
    mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, EXACT: tl.constexpr, MODE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1).to(tl.int64)
    b, h = lane // heads, lane % heads
    first = tile * BM
    offset = lk - lq
    near = first * 0
    span = near
    behind = near
    if MODE == 0:
        at = first + tl.arange(0, BM)
        rows = tl.load(rows_of + b * asks + at, mask=at < asks, other=lq)
        steps = tl.cdiv(tl.load(limits + b * tiles + tile), BN)
    else:
        rows = first + tl.arange(0, BM)
        if MODE == 1:
            steps = listed * (size // BN)
        else:
            span = tl.load(spans + h)
            near = tl.maximum(first + offset - span + 1, 0) // BN * BN
            behind = tl.cdiv(tl.minimum(near, first_keys), BN)
            steps = behind + tl.cdiv(tl.maximum(tl.minimum(first + BM + offset, lk) - near, 0), BN)
    query = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, rows < lq, d, BD)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.full((BM,), 0.0, tl.float32)
    acc = tl.full((BM, BD), 0.0, tl.float32)
    for step in range(0, steps):
        within = tl.arange(0, BN).to(tl.int64)
        if MODE == 0:
            place = step * BN + within
            cols = tl.load(cols_of + b * offers + place, mask=place < offers, other=lk)
            there = cols < lk
        elif MODE == 1:
            block = tl.load(index + b * index_b + h * index_h + first // size * listed + step // (size // BN))
            cols = block * size + step % (size // BN) * BN + within
            there = (block >= 0) & (cols < lk)
        else:
            cols = tl.where(step < behind, step * BN, near + (step - behind) * BN) + within
            there = cols < lk
        key = load_rows(k + b * k_b + (h // share) * k_h, cols, k_n, k_d, there, d, BD)
        z = finish(
            product(query, key, EXACT) * scale, rows, cols, there, b, h, lq, lk, offset,
            softcap, window, keys, keys_b, keys_k, hidden,
            mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
            CAUSAL, WINDOW, CAP, KEYS, MASK, BIAS,
        )  # fmt: skip
        if MODE == 2:
            gap = (rows + offset).to(tl.int32)[:, None] - cols.to(tl.int32)[None, :]
            z = tl.where((gap < span) | (cols[None, :] < first_keys), z, float("-inf"))
        value = load_rows(v + b * v_b + (h // share) * v_h, cols, v_n, v_d, there, d, BD)
        top, total, acc = fold(z, value, top, total, acc, EXACT)
    blind = top == float("-inf")
    base = tl.where(blind, 0.0, top)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32)
        higher = tl.maximum(base, sink)
        shrink = tl.exp(base - higher)
        total = total * shrink + tl.exp(sink - higher)
        acc = acc * shrink[:, None]
    divisor = tl.where(blind, 1.0, total)
    wide = tl.arange(0, BD).to(tl.int64)
    to = out + b * out_b + h * out_h + rows[:, None] * out_n + wide[None, :] * out_d
    result = tl.where(blind[:, None], 0.0, acc / divisor[:, None])
    tl.store(to, result.to(out.dtype.element_ty), mask=(rows[:, None] < lq) & (wide[None, :] < d))


@torch.library.custom_op("trainless::block_sparse", mutates_args=())
def block_sparse_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mode: int,
    chosen: Tensor,
    offered: Tensor | None,
    size: int,
    first_keys: int,
    scale: float,
    causal: bool,
    window: int | None,
    keys: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """mode SUBSET: chosen (B, n) and offered (B, m) are row and key numbers, ascending, Lq and Lk beyond their end;
    BLOCKS: chosen is the index (B|1, H|1, blocks, n) of blocks of ``size``; SPANS: chosen is span (H,).
    """
    b, h, lq, d = query.shape
    lk = key.shape[2]
    width = width_of(d)
    sizes = launch("block_sparse", width, query)
    bm, bn = sizes["BM"], sizes["BN"]
    out = query.new_zeros(b, h, lq, d)  # rows outside a subset are never written
    nothing = chosen.new_zeros(1)
    lists: dict[str, object] = {
        "rows_of": nothing, "cols_of": nothing, "limits": nothing, "asks": 0, "offers": 0, "tiles": 0,
        "index": nothing, "index_b": 0, "index_h": 0, "listed": 0, "size": size, "spans": nothing,
        "first_keys": first_keys,
    }  # fmt: skip
    tiles = triton.cdiv(lq, bm)
    if mode == SUBSET:
        assert offered is not None
        if 0 in (chosen.shape[1], offered.shape[1]):
            return out
        tiles = triton.cdiv(chosen.shape[1], bm)
        limits = _limits(chosen, offered, tiles, bm, lq, lk, causal)
        lists |= {
            "rows_of": chosen.contiguous(), "cols_of": offered.contiguous(), "limits": limits,
            "asks": chosen.shape[1], "offers": offered.shape[1], "tiles": tiles,
        }  # fmt: skip
    elif mode == BLOCKS:
        bm, bn = min(bm, size), min(bn, size)
        sizes |= {"BM": bm, "BN": bn}
        tiles = triton.cdiv(lq, bm)
        index = chosen.contiguous()
        each = index.shape[2] * index.shape[3]
        by_head = each if index.shape[1] > 1 else 0
        lists |= {
            "index": index, "index_b": each * index.shape[1] if index.shape[0] > 1 else 0, "index_h": by_head,
            "listed": index.shape[3],
        }  # fmt: skip
    else:
        lists |= {"spans": chosen.contiguous()}
    if tiles == 0:
        return out
    _block_sparse[(tiles, b * h)](
        query, *query.stride(), key, *key.stride(), value, *value.stride(), out, *out.stride(),
        query if sinks is None else sinks.contiguous(), **lists,
        heads=h, share=h // key.shape[1], lq=lq, lk=lk, d=d, scale=scale,
        **mask_arguments(query, softcap, causal, window, keys, mask, bias),
        SINKS=sinks is not None, EXACT=query.dtype == torch.float32, MODE=mode, BD=width, **sizes,
    )  # fmt: skip
    return out


def _limits(chosen: Tensor, offered: Tensor, tiles: int, bm: int, lq: int, lk: int, causal: bool) -> Tensor:
    """(B, tiles): how many of the offered keys any row of each tile may see."""
    if not causal:
        rows = chosen[:, ::bm] < lq
        return torch.where(rows, (offered < lk).sum(1, keepdim=True), 0)
    real = torch.where(chosen < lq, chosen, -1)
    padded = torch.nn.functional.pad(real, (0, tiles * bm - real.shape[1]), value=-1)
    last = padded.view(-1, tiles, bm).amax(2)
    last = torch.where(last < 0, -1, last + lk - lq)  # a tile behind the last chosen row
    return torch.searchsorted(offered.contiguous(), last.clamp_max(lk - 1).contiguous(), right=True)


@block_sparse_op.register_fake
def _(query, key, value, mode, chosen, offered, size, first_keys, scale, *rest):
    return query.new_empty(query.shape)


def block_sparse(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, *, visibility: Visibility, terms: Terms
) -> Tensor:
    """See ``api.block_sparse``."""
    if not isinstance(pattern, Subset) and listed.serves(visibility, terms):
        return listed.block_sparse(query, key, value, pattern, causal=visibility.causal, terms=terms)
    b = query.shape[0]
    mode, chosen, offered, size, first_keys = SPANS, None, None, 1, 0
    if isinstance(pattern, Subset):
        mode = SUBSET
        chosen, offered = _numbers(pattern.queries.expand(b, -1)), _numbers(pattern.keys.expand(b, -1))
    elif isinstance(pattern, Blocks):
        mode, chosen, size = BLOCKS, pattern.index, pattern.size
    else:
        chosen, first_keys = pattern.span, pattern.sinks
    out: Tensor = block_sparse_op(
        query, key, value, mode, chosen, offered, size, first_keys, terms.scale,
        *mask_operands(visibility), terms.position_bias, terms.softcap, terms.sink_logits,
    )  # fmt: skip
    return out


def _numbers(chosen: Tensor) -> Tensor:
    """bool (B, L) as the numbers of its True entries (B, L), ascending, L beyond their end; no value is read."""
    length = chosen.shape[1]
    return torch.where(chosen, torch.arange(length, device=chosen.device), length).sort(1).values
