"""Packed tokens of a cache layer: runs of equal groups, appended chunk by chunk and never packed again.

A run holds the groups of one tier and one size. Rows of a batch fill its groups independently of each other, so
that rows whose chunks are complete at different times take no more room than the fullest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.quant_kv import Segment, quantise


@dataclass
class StoredRun:
    """positions (B, Hkv, slots): of the tokens, -1 in empty slots. filled: groups in use, per row."""

    tier: int
    segment: Segment
    positions: Tensor
    filled: list[int]

    @property
    def slots(self) -> int:
        return self.positions.shape[2]

    @property
    def size(self) -> int:
        return self.segment.key.shape[3]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.segment, self.positions = self.segment.each(change), change(self.positions)


class Store:
    """The runs of a layer, in the order in which their slots are counted."""

    def __init__(self) -> None:
        self.runs: list[StoredRun] = []

    @property
    def slots(self) -> int:
        return sum(run.slots for run in self.runs)

    @property
    def segments(self) -> list[Segment]:
        return [run.segment for run in self.runs]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, parameters and positions, from their storages."""
        held = [t for run in self.runs for t in (run.positions, run.segment.index) if t is not None]
        beside = sum(t.untyped_storage().nbytes() for t in held)
        return beside + sum(s.code_bytes + s.parameter_bytes for s in self.segments)

    def positions(self) -> list[Tensor]:
        return [run.positions for run in self.runs]

    def place(self, positions: Tensor) -> None:
        """Set the positions (B, Hkv, slots) of all runs."""
        start = 0
        for run in self.runs:
            run.positions = positions[:, :, start : start + run.slots].contiguous()
            start += run.slots

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        for run in self.runs:
            run.each(change)

    def reorder(self, rows: list[int]) -> None:
        for run in self.runs:
            run.filled = [run.filled[i] for i in rows]

    # ------------------------------------------------------------------ packing

    def add(
        self, tier: int, bits: tuple[int, int], size_of: Callable[[int], int], key: Tensor, value: Tensor,
        positions: Tensor, chosen: Tensor, ids: list[Tensor], new: Tensor, root: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Pack the tokens ``chosen`` (B, Hkv, W) of key and value (B, Hkv, W, D).

        size_of: from the tokens of the fullest row and head to those of a group. ids: for each run, a number per slot
        (B, Hkv, slots), changed along with the runs; new (B, Hkv, W): the numbers of the new tokens. root: see
        ``quantise``.
        """
        counts = chosen.sum(2)
        most = int(counts.max()) if counts.numel() else 0
        if not most:
            return
        size = size_of(most)
        groups = -(-most // size)
        # Chosen tokens first, in their order; what a row or head has fewer of is empty.
        order = (~chosen).int().argsort(dim=2, stable=True)[:, :, :most]
        valid = torch.arange(groups * size, device=chosen.device) < counts[..., None]

        def take(t: Tensor, fill: int = 0) -> Tensor:
            index = order if t.dim() == 3 else order[..., None].expand(*order.shape, t.shape[3])
            found = t.gather(2, index)
            if groups * size > most:
                shape = list(found.shape)
                shape[2] = groups * size - most
                found = torch.cat([found, found.new_zeros(shape)], 2)
            seen = valid if t.dim() == 3 else valid[..., None]
            return found.masked_fill(~seen, fill)

        keys, values = (take(t).unflatten(2, (groups, size)) for t in (key, value))
        segment = quantise(keys, values, *bits, valid.unflatten(2, (groups, size)), root)
        used = (-(-counts.amax(1) // size)).tolist()
        self._append(tier, segment, take(positions, -1), used, ids, take(new))

    def _append(
        self, tier: int, segment: Segment, positions: Tensor, used: list[int], ids: list[Tensor], new: Tensor
    ) -> None:
        size = segment.key.shape[3]
        number = next(
            (
                n
                for n, run in enumerate(self.runs)
                if run.tier == tier and run.size == size and run.segment.index is None
            ),
            None,
        )
        if number is None:
            self.runs.append(StoredRun(tier, segment, positions, used))
            ids.append(new)
            return
        run = self.runs[number]
        held = run.segment.key.shape[2]
        if all(f == held for f in run.filled) and len(set(used)) == 1:
            pairs = zip(run.segment.tensors().items(), segment.tensors().values(), strict=True)
            joined: dict[str, Any] = {name: torch.cat([a, b], 2) for (name, a), b in pairs}
            run.segment = Segment(segment.k_bits, segment.v_bits, **joined)
            run.positions = torch.cat([run.positions, positions], 2)
            ids[number] = torch.cat([ids[number], new], 2)
        else:
            starts = list(run.filled)
            groups = max(held, *(f + u for f, u in zip(starts, used, strict=True)))

            def merge(a: Tensor, b: Tensor, unit: int, fill: int = 0) -> Tensor:
                shape = list(a.shape)
                shape[2] = groups * unit
                out = a.new_full(shape, fill)
                out[:, :, : a.shape[2]] = a
                for row, (start, count) in enumerate(zip(starts, used, strict=True)):
                    out[row, :, start * unit : (start + count) * unit] = b[row, :, : count * unit]
                return out

            pairs = zip(run.segment.tensors().items(), segment.tensors().values(), strict=True)
            joined = {name: merge(a, b, 1) for (name, a), b in pairs}
            run.segment = Segment(segment.k_bits, segment.v_bits, **joined)
            run.positions = merge(run.positions, positions, size, -1)
            ids[number] = merge(ids[number], new, size)
        run.filled = [f + u for f, u in zip(run.filled, used, strict=True)]

    # ------------------------------------------------------------------ dropping

    def drop(self, keep: Tensor) -> Tensor:
        """Keep the slots ``keep`` (B, Hkv, slots) only, moved together; returns the old slots of the new ones."""
        start, runs, index = 0, [], []
        for run in self.runs:
            mine = keep[:, :, start : start + run.slots]
            counts = mine.sum(2)
            width = int(counts.max())
            if width == run.slots:
                order = torch.arange(run.slots, device=keep.device).expand_as(mine)
                run.positions = run.positions.masked_fill(~mine, -1)
            else:
                order = (~mine).int().argsort(dim=2, stable=True)[:, :, :width]
                valid = torch.arange(width, device=keep.device) < counts[..., None]
                if width:
                    run.segment = _chosen(run.segment, order, valid)
                    run.positions = run.positions.gather(2, order).masked_fill(~valid, -1)
                    run.filled = [1] * keep.shape[0]
            if width:
                runs.append(run)
                index.append(order + start)
            start += mine.shape[2]
        self.runs = runs
        return torch.cat(index, 2) if index else keep.new_zeros(*keep.shape[:2], 0, dtype=torch.long)


def _chosen(segment: Segment, order: Tensor, valid: Tensor) -> Segment:
    """The slots ``order`` (B, Hkv, n) of a segment, each with the parameters of the group that it came from."""
    b, hkv, n = order.shape

    def slots(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        flat = t.flatten(2, 3)
        wide = flat.dim() == 4
        found = flat.gather(2, order[..., None].expand(b, hkv, n, flat.shape[3]) if wide else order)
        return found.masked_fill(~(valid[..., None] if wide else valid), 0).unflatten(2, (1, n))

    group = order // segment.key.shape[3] if segment.index is None else segment.index.long().gather(2, order)
    tables = next((t for t in (segment.key_step, segment.value_root) if t is not None), None)
    key, value = slots(segment.key), slots(segment.value)
    assert key is not None and value is not None
    if tables is None:
        return Segment(segment.k_bits, segment.v_bits, key, value)
    # Groups of which nothing is left take their parameters with them.
    alive = torch.zeros(b, hkv, tables.shape[2], dtype=torch.long, device=order.device)
    alive.scatter_reduce_(2, group, valid.long(), "amax")
    most = int(alive.sum(2).max())
    left = (1 - alive).argsort(dim=2, stable=True)[:, :, :most]
    rank = (alive.cumsum(2) - 1).clamp_min(0)

    def table(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.gather(2, left[..., None].expand(b, hkv, most, t.shape[3]))

    index = rank.gather(2, group).clamp_max(most - 1).to(torch.int32)
    return Segment(
        segment.k_bits, segment.v_bits, key, value, table(segment.key_step), table(segment.key_min),
        slots(segment.value_step), slots(segment.value_min), table(segment.value_root), index,
    )  # fmt: skip
