"""Lists of the tiles of keys that each tile of queries computes, made on the device and shared by layers and heads.

A tile that every row of its query tile sees whole needs no mask; these stand first in a list. Nothing here reads a
value, so nothing waits for the device; a pattern keeps the lists that were made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .patterns import Blocks, Spans

ROWS = 128  # rows of a tile of queries: tokens times the query heads that are computed together


@dataclass(frozen=True)
class Tiling:
    """How a call is cut: ``tokens`` queries of ``together`` heads of a group, against ``keys`` keys at a time."""

    tokens: int
    together: int
    keys: int


@dataclass(frozen=True)
class TileLists:
    """entries (N, T, most) int32: numbers of tiles of keys, those without a mask first; N lanes or 1 for all.

    counts, wholes (N, T) int32: how many there are, and how many of them need no mask. order (lanes · T,) int32: all
    tiles of all lanes, lane · T + t, those with most to do first.
    """

    entries: Tensor
    counts: Tensor
    wholes: Tensor
    order: Tensor
    tiling: Tiling


def tiling_of(pattern: Blocks | Spans, h: int, hkv: int, keys: int) -> Tiling:
    """Heads of a group are rows of one tile where they share a list and their number is a power of two."""
    share, size = h // hkv, pattern.size if isinstance(pattern, Blocks) else ROWS
    shared = isinstance(pattern, Spans) or pattern.index.shape[1] == 1
    together = share if shared and share & (share - 1) == 0 and share <= 8 else 1
    return Tiling(min(size, ROWS // together), together, min(size, keys))


def tile_lists(
    pattern: Blocks | Spans, b: int, h: int, lq: int, lk: int, causal: bool, tiling: Tiling
) -> TileLists:
    """The lists of a pattern for calls of this shape; lanes are (batch row, heads / ``tiling.together``)."""
    key = (b, h, lq, lk, causal, tiling)
    found = pattern.made.get(key)
    if found is None:
        some, whole = _seen(pattern, lq, lk, causal, tiling, h)
        found = _lists(some, whole, b, h // tiling.together, tiling)
        pattern.made[key] = found
    return found


def _seen(
    pattern: Blocks | Spans, lq: int, lk: int, causal: bool, tiling: Tiling, h: int
) -> tuple[Tensor, Tensor]:
    """bool (B|1, lanes of a row|1, T, tiles of keys): which have any pair, and in which all pairs are to be computed."""
    device = pattern.index.device if isinstance(pattern, Blocks) else pattern.span.device
    first = torch.arange(0, lq, tiling.tokens, device=device)[:, None] + lk - lq
    last = torch.clamp_max(first + tiling.tokens - 1, lk - 1)
    low = torch.arange(0, lk, tiling.keys, device=device)
    high = low + tiling.keys - 1
    inside = high < lk
    if isinstance(pattern, Blocks):
        index, size = pattern.index, pattern.size
        blocks = -(-lk // size)
        listed = torch.zeros(*index.shape[:3], blocks + 1, dtype=torch.bool, device=device)
        listed.scatter_(3, torch.where(index < 0, blocks, index), True)
        some = listed[:, :, torch.arange(len(first), device=device) * tiling.tokens // size][..., low // size]
        whole = some & inside
        return (some & (low <= last), whole & (high <= first)) if causal else (some, whole)
    span = pattern.span.view(1, -1, tiling.together)
    longest, shortest = (t[..., None, None] for t in (span.amax(2), span.amin(2)))
    some = (low <= last) & ((high > first - longest) | (low < pattern.sinks))
    whole = inside & (high <= first) & ((low > last - shortest) | (high < pattern.sinks))
    return some, whole.expand_as(some)


def _lists(some: Tensor, whole: Tensor, b: int, lanes: int, tiling: Tiling) -> TileLists:
    batch, heads, tiles, most = some.shape
    number = torch.arange(most, device=some.device, dtype=torch.int32)
    # Whole ones first, then those with a mask, each in the order of the keys.
    rank = torch.where(some, torch.where(whole, number, number + most), number + 2 * most)
    entries = rank.sort(-1).values.remainder(most).to(torch.int32)
    counts, wholes = (x.sum(-1, dtype=torch.int32) for x in (some, some & whole))
    shape = (b, lanes, tiles)
    order = counts.expand(shape).reshape(-1).argsort(descending=True, stable=True).to(torch.int32)

    def flat(t: Tensor) -> Tensor:
        if batch == heads == 1:
            return t[0].contiguous()
        return t.expand(b, lanes, *t.shape[2:]).flatten(0, 1).contiguous()

    return TileLists(flat(entries), flat(counts), flat(wholes), order, tiling)
