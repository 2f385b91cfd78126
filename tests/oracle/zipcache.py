"""ZipCache: salient tokens at more bits than the others, told apart by a few probe rows."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .core import Call
from .evict import tokens
from .packing import Packed, Probes, probe_mass, probe_rows
from .tova import best


class ZipCache(Packed):
    """After the first call the whole prompt is packed; later tokens wait exact until ``interval`` of them are
    there, and are then packed as a chunk of their own. In each chunk and key/value head the ``salient``
    tokens of highest saliency get bits[0], the rest bits[1]; keys and values share the sets.

    Saliency of column j: attention summed over the probe rows and the query heads of the group, divided by
    the number of probe rows that see j (normalise="visible") or by the number of all the prompt's rows from
    j on, sampled or not ("published").

    Settled here where sources differ:
    - The caller names the probe rows (``Probes``); they should contain the last one. A row named twice
      counts twice. Calls without a list are probed by their last real row alone, and then
      nothing is divided ("visible" and one row that sees the whole chunk come to the same).
    - ``salient`` as a float is that fraction of the chunk, rounded down (``count="regular"``: the others
      are 1 - salient of it, rounded down); an int is that many of each chunk. Ties go to the newer.
    - A block is never packed again. What waits is one chunk, however long (flush="all"), or whole chunks of
      ``interval`` tokens (flush="blocks"), all by the same row.
    - Key channels: minimum and step over the tokens of the set (and ``k_group``). Value channels: sized
      over the chunk, both sets together. Values then per token and head, because the sets differ by head;
      v_scope="layer" puts the m-th tokens of all heads together, as published code does.
    """

    def __init__(
        self,
        salient: int | float = 0.6,
        bits: tuple[int, int] = (4, 2),
        probes: Probes | None = None,
        interval: int = 100,
        normalise: str = "visible",
        layers: Collection[int] | None = None,
        part: str | None = None,
        *,
        flush: str = "all",
        count: str = "salient",
        **packed: Any,
    ) -> None:
        super().__init__(layers, part, **packed)
        self.salient, self.bits, self.probes, self.interval = salient, bits, probes, interval
        self.normalise, self.flush, self.count = normalise, flush, count
        # layer -> per call, saliency (B, Hkv, Lk); layer -> per choice, its margin
        self.saliency: dict[int, list[Tensor]] = {}
        self.gaps: dict[int, list[float]] = {}

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.saliency[call.site.layer], self.gaps[call.site.layer] = [], []

    def margin(self) -> float:
        """The smallest (worst salient - best regular) / best regular of all choices."""
        return min((gap for gaps in self.gaps.values() for gap in gaps), default=math.inf)

    def places(self, length: int) -> int:
        """Salient tokens of a chunk of ``length``."""
        if isinstance(self.salient, float) and self.count == "regular":
            return length - tokens(1.0 - self.salient, length)
        return min(length, tokens(self.salient, length))

    def pack(self, call: Call, p: Tensor) -> None:
        batch, hkv = call.key.shape[:2]
        number = self.state(call)["calls"] - 1
        saliency = torch.zeros(batch, hkv, p.shape[-1], dtype=p.dtype)
        for row in range(batch):
            rows = probe_rows(self.probes, call, number, row)
            if not rows:
                continue
            mass, count = probe_mass(call, p, row, rows)
            saliency[row] = mass.unflatten(0, (hkv, call.groups)).sum(dim=1)
            if self.normalise == "visible":
                saliency[row] /= count.clamp_min(1)
            elif number == 0:
                later = call.real[row].flip(0).cumsum(0).flip(0)
                saliency[row] /= later.clamp_min(1)
            chunk = self.chunk(call, row, number)
            while any(chunk.values()):
                self._split(call, row, chunk, saliency[row])
                chunk = self.chunk(call, row, number)
        self.saliency[call.site.layer].append(saliency)

    def chunk(self, call: Call, row: int, number: int) -> dict[int, list[int]]:
        """The columns per head that are packed next; empty lists when nothing is due."""
        waiting = {head: self.waiting(call, row, head) for head in range(call.key.shape[1])}
        if number and max(map(len, waiting.values())) < self.interval:
            return {head: [] for head in waiting}
        if number and self.flush == "blocks":
            return {head: columns[: self.interval] for head, columns in waiting.items()}
        return waiting

    def _split(self, call: Call, row: int, chunk: dict[int, list[int]], saliency: Tensor) -> None:
        high, low = {}, {}
        for head, columns in chunk.items():
            chosen, gap = best(columns, saliency[head], self.places(len(columns)), protected=0)
            high[head] = sorted(chosen)
            low[head] = [j for j in columns if j not in chosen]
            self.gaps[call.site.layer].append(gap)
        for columns, bits in ((high, self.bits[0]), (low, self.bits[1])):
            self.put(call, row, columns, bits, bits, chunk)
