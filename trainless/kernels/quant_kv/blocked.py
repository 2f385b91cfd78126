"""Attention on packed keys and values in torch, a tile of tokens at a time.

Nothing is dequantised: a tile of codes becomes numbers, no more. K's step and minimum are folded into the query
(q·(step·c + min) = (q·step)·c + q·min), V's step and minimum into the probabilities, and V's root multiplies the
finished sum. Nor are codes taken out of their bytes: byte & mask_p = Σ_{j <= p} code_j · base^j, so two such
numbers differ by one code, and taking differences is left to the query (for K) and the sum (for V).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .format import RAW, Segment, per_byte, unpack

# Numbers in a tile, measured: smaller ones cost more in calls than they save in the cache; larger ones cost memory.
TILE = 1 << 20


def dequantise(segment: Segment, lo: int, hi: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the slots [lo, hi) as numbers, (B, Hkv, hi - lo, D); for a block at a time."""
    key, value = segment.key.flatten(2, 3)[:, :, lo:hi], segment.value.flatten(2, 3)[:, :, lo:hi]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if segment.k_bits != RAW:
        step, least = (_spread(t, segment, lo, hi).to(wide) for t in (segment.key_step, segment.key_min))
        key = unpack(key, segment.k_bits).to(wide).mul_(step).add_(least)
    if segment.v_bits != RAW:
        assert segment.value_step is not None and segment.value_min is not None
        step, least = (t.flatten(2, 3)[:, :, lo:hi, None] for t in (segment.value_step, segment.value_min))
        value = unpack(value, segment.v_bits).to(wide).mul_(step).add_(least)
        value = value.mul_(_spread(segment.value_root, segment, lo, hi).to(wide))
    return key.to(dtype), value.to(dtype)


def _spread(table: Tensor | None, segment: Segment, lo: int, hi: int) -> Tensor:
    """Parameters of the groups to which the slots [lo, hi) belong, one row per slot."""
    assert table is not None
    if segment.index is not None:
        index = segment.index[:, :, lo:hi].long()[..., None]
        return table.gather(2, index.expand(*index.shape[:3], table.shape[-1]))
    size = segment.key.shape[3]
    if lo // size == (hi - 1) // size:
        return table[:, :, lo // size, None]
    first = lo // size * size
    some = table[:, :, lo // size : (hi - 1) // size + 1].repeat_interleave(size, 2)
    return some[:, :, lo - first : hi - first]


def _pieces(segment: Segment, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Tiles (g0, g1, s0, s1): whole groups, or part of one where a group is larger than a tile."""
    b, hkv, groups, size = segment.key.shape[:4]
    tokens = max(1, TILE // max(1, b * hkv * width))
    if size > tokens:
        step = -(-size // -(-size // tokens))
        for g in range(groups):
            for s in range(0, size, step):
                yield g, g + 1, s, min(size, s + step)
        return
    step = max(1, tokens // max(1, size))
    for g in range(0, groups, step):
        yield g, min(groups, g + step), 0, size


class _Numbers:
    """Bytes (…, W) as numbers, one contiguous tile (N, S, W) per code of a byte: tile p holds byte & mask_p.

    The tiles lie in memory that the next piece uses again.
    """

    def __init__(self, bits: int, like: Tensor):
        self.bits, self.like = bits, like
        self.count = 1 if bits == RAW else per_byte(bits)
        self.tiles: list[Tensor] = []
        self.low: Tensor | None = None

    def of(self, codes: Tensor) -> list[Tensor]:
        """codes (B, Hkv, G, S, W), N = B·Hkv·G; what is stored as it is stays as it is."""
        if self.bits == RAW:
            return [codes.to(self.like.dtype).flatten(0, 2)]
        shape, count = codes.shape, codes.numel()
        # The first piece is the largest. A backward pass reads the tiles again, so each piece has its own then.
        if not self.tiles or torch.is_grad_enabled():
            self.tiles = [self.like.new_empty(count) for _ in range(self.count)]
        # Four bytes at a time where they lie so.
        four = (
            shape[-1] % 4 == 0
            and codes.storage_offset() % 4 == 0
            and all(s % 4 == 0 for s in codes.stride()[:-1])
        )
        lanes = codes.view(torch.int32) if four else codes
        found = []
        for p, tile in enumerate(self.tiles):
            part, low = tile[:count].view(shape), codes
            if p < self.count - 1:
                mask = (1 << (self.bits * (p + 1))) - 1
                if self.low is None:
                    self.low = torch.empty(count, dtype=torch.uint8, device=codes.device)
                low = self.low[:count]
                room = (low.view(torch.int32) if four else low).view(lanes.shape)
                torch.bitwise_and(lanes, mask * 0x01010101 if four else mask, out=room)
                low = low.view(shape)
            found.append(part.copy_(low).flatten(0, 2))
        return found


def logits(q: Tensor, segment: Segment, z: Tensor, start: int) -> None:
    """See ``rows.Products``."""
    b, hkv, _, d = q.shape
    z = z[..., start : start + segment.slots]
    if not segment.slots:
        return
    if segment.k_bits == RAW and segment.key.dtype == q.dtype:
        z.copy_(q @ segment.key.flatten(2, 3).mT)
        return
    if segment.index is not None:
        step = max(1, TILE // (b * hkv * d))
        for lo in range(0, segment.slots, step):
            hi = min(segment.slots, lo + step)
            key, _ = dequantise(_keys_only(segment), lo, hi, q.dtype)
            z[..., lo:hi] = q @ key.mT
        return
    size, bits = segment.key.shape[3], segment.k_bits
    numbers = _Numbers(bits, q)
    least, folded, base = None, [], 1.0
    if bits != RAW:
        assert segment.key_step is not None and segment.key_min is not None
        base = float(1 << bits)
        # The query as each group reads it, then as each tile of masked bytes does but for a power of the base.
        parts = (q[:, :, None] * segment.key_step[:, :, :, None].to(q.dtype)).chunk(per_byte(bits), -1)
        folded = [torch.sub(x, y, alpha=1 / base) for x, y in pairwise(parts)]
        folded.append(parts[-1])  # each (B, Hkv, G, r, W)
        least = torch.matmul(q, segment.key_min.to(q.dtype).mT)  # (B, Hkv, r, G)
        least = least.transpose(2, 3)[..., None]
    for g0, g1, s0, s1 in _pieces(segment, d):
        tiles = numbers.of(segment.key[:, :, g0:g1, s0:s1])
        if least is None:
            part = torch.bmm(q[:, :, None].expand(-1, -1, g1 - g0, -1, -1).flatten(0, 2), tiles[0].mT)
        else:
            part = least[:, :, g0:g1].flatten(0, 2)
            for n, tile in enumerate(tiles):
                part = torch.baddbmm(part, folded[n][:, :, g0:g1].flatten(0, 2), tile.mT, alpha=base**-n)
        into = z[..., g0 * size : g1 * size].unflatten(3, (g1 - g0, size))[..., s0:s1]
        into.copy_(part.view(b, hkv, g1 - g0, *part.shape[1:]).transpose(2, 3))


def values(p: Tensor, segment: Segment, start: int) -> Tensor:
    """See ``rows.Products``."""
    slots = segment.slots
    p = p[..., start : start + slots]
    if segment.v_bits == RAW and segment.value.dtype == p.dtype:
        return p @ segment.value.flatten(2, 3)
    b, hkv, r, _ = p.shape
    dv, bits = segment.widths[1], segment.v_bits
    out = p.new_zeros(b, hkv, r, dv)
    if not slots:
        return out
    size, groups = segment.value.shape[3], segment.value.shape[2]
    if segment.index is not None:
        step = max(1, TILE // (b * hkv * dv))
        for lo in range(0, slots, step):
            hi = min(slots, lo + step)
            _, value = dequantise(_values_only(segment), lo, hi, p.dtype)
            out += p[..., lo:hi] @ value
        return out
    if bits == RAW:
        for g0, g1, s0, s1 in _pieces(segment, dv):
            tile = segment.value[:, :, g0:g1, s0:s1].to(p.dtype).flatten(2, 3)
            out += p.unflatten(3, (groups, size))[..., g0:g1, s0:s1].flatten(3) @ tile
        return out
    assert segment.value_step is not None and segment.value_min is not None
    assert segment.value_root is not None
    weights = (p * segment.value_step.to(p.dtype).flatten(2)[:, :, None]).unflatten(3, (groups, size))
    weights = weights.transpose(2, 3)  # (B, Hkv, G, r, S)
    least = (p * segment.value_min.to(p.dtype).flatten(2)[:, :, None]).unflatten(3, (groups, size)).sum(4)
    root = segment.value_root.to(p.dtype)
    base, numbers = float(1 << bits), _Numbers(bits, p)
    for g0, g1, s0, s1 in _pieces(segment, dv):
        tiles = numbers.of(segment.value[:, :, g0:g1, s0:s1])
        own = weights[:, :, g0:g1, :, s0:s1].flatten(0, 2)
        below = torch.bmm(own, tiles[0])
        sums = [below]  # (B·Hkv·g, r, W) for each code: what its masked bytes give, less the codes below it
        for n, tile in enumerate(tiles[1:], 1):
            sums.append(torch.baddbmm(below, own, tile, beta=-(base**-n), alpha=base**-n))
            if n + 1 < len(tiles):
                below = torch.add(below, sums[-1], alpha=base**n)
        part = torch.cat(sums, -1).view(b, hkv, g1 - g0, r, dv)
        out += (part * root[:, :, g0:g1, None]).sum(2)
    # The minimum of a token is the same number in every channel, before the root.
    return out.add_(torch.matmul(least, root))


def _keys_only(s: Segment) -> Segment:
    return Segment(s.k_bits, RAW, s.key, s.key, s.key_step, s.key_min, index=s.index)


def _values_only(s: Segment) -> Segment:
    return Segment(
        RAW, s.v_bits, s.value, s.value, None, None, s.value_step, s.value_min, s.value_root, s.index
    )
