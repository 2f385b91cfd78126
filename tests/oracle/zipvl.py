"""ZipVL: how many tokens matter is read off each layer's attention; the rest gets few bits, or nothing."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .core import Call, masked_softmax
from .evict import tokens
from .packing import Packed, Probes, probe_mass, probe_rows
from .tova import best


class ZipVL(Packed):
    """Per layer and batch row, with a_j the attention that column j receives from the probe rows over all
    heads:

    1. p = the fewest columns whose largest a_j make up ``tau`` of the whole Σ a_j;
    2. important tokens T = the p columns of largest a_j / (number of probe rows that see j), one T for all
       heads, and the last ``last`` rows besides;
    3. in the first call the queries of T attend to the keys of T, under the model's own mask; every other
       row gets zero from this layer's attention;
    4. after it T is packed at bits[0] and the others at bits[1]; mode="discard" drops the others instead,
       and T stays exact;
    5. later tokens attend to all that is kept and wait exact until ``interval`` of them are there; then 1,
       2 and 4 happen to that chunk alone.

    Settled here where sources differ:
    - The caller names the probe rows (``Probes``) of the first call; later calls are probed by their last
      real row unless listed. A row named twice counts twice.
    - ``last`` counts the row's own real tokens (a float: a fraction of the prompt). They come on top of the p
      chosen (forced="added"), or take up its places first ("within"). In later chunks the call's last
      real row takes their part.
    - tau of 1 or more means every column, whatever rounding says of the sums.
    - Ties go to the newer column. In the sums of step 1 order among equals does not matter.
    - A turn of several tokens on a filled cache attends to everything kept: step 3 is for the first call.
    - ``ratio`` in the place of ``tau``: T has that share of the chunk's columns, rounded down and at least one;
      the last rows are among them, at most half of T but always one.
    - A row whose prompt is shorter than ``min_tokens`` is left alone for good (short="off"); its prompt
      waits in the buffer like later tokens (short="buffer"); or its prompt stays exact and what is
      generated is treated as in 5 (short="generated").
    - What waits is one chunk, however long (flush="all"), or whole chunks of ``interval`` (flush="blocks").
    - Value channels are sized over the chunk, T and the others together; the other forms are in ``Packed``.

    List this rule last among those that change logits: it looks at them before the softmax.
    """

    def __init__(
        self,
        tau: float = 0.975,
        bits: tuple[int, int] = (4, 2),
        probes: Probes | None = None,
        last: int | float = 64,
        interval: int = 100,
        min_tokens: int = 512,
        mode: str = "quantise",
        ratio: float | None = None,
        layers: Collection[int] | None = None,
        part: str | None = None,
        *,
        forced: str = "added",
        short: str = "off",
        flush: str = "all",
        **packed: Any,
    ) -> None:
        super().__init__(layers, part, **packed)
        self.tau, self.bits, self.probes, self.last = tau, bits, probes, last
        self.interval, self.min_tokens, self.mode = interval, min_tokens, mode
        self.part_of = ratio
        self.forced, self.short, self.flush = forced, short, flush
        # layer -> every choice made: (call, row, p, important real-token indices)
        self.chosen: dict[int, list[tuple[int, int, int, list[int]]]] = {}
        # layer -> how far the choices are from changing: |share - tau| of the sums next to p, relative
        # margins of the tokens
        self.ratio_gaps: dict[int, list[float]] = {}
        self.token_gaps: dict[int, list[float]] = {}

    def begin(self, call: Call) -> None:
        super().begin(call)
        for log in (self.chosen, self.ratio_gaps, self.token_gaps):
            log[call.site.layer] = []

    def margin(self) -> float:
        every = [g for gaps in (self.ratio_gaps, self.token_gaps) for log in gaps.values() for g in log]
        return min(every, default=math.inf)

    def important(self, layer: int, call: int, row: int) -> list[int]:
        """Real-token indices found important in a call, all its chunks together."""
        return sorted(j for c, r, _, found in self.chosen[layer] if (c, r) == (call, row) for j in found)

    # ------------------------------------------------------------ the choice

    def select(self, call: Call, p: Tensor, row: int, number: int, chunk: list[int], last: int) -> set[int]:
        """T among the columns ``chunk`` (ascending)."""
        rows = probe_rows(self.probes, call, number, row)
        mass, count = probe_mass(call, p, row, rows)
        a = mass.sum(dim=0)
        share = a / count.clamp_min(1)
        if self.part_of is not None:
            size = max(1, tokens(float(self.part_of), len(chunk)))
            last = min(last, max(1, size // 2))
        else:
            size = self._size(call, a[chunk])
        protected = chunk[max(0, len(chunk) - last) :]
        if self.part_of is not None:
            found, gap = best(chunk, share, size, last)
        elif self.forced == "within":
            found, gap = best(chunk, share, max(size, len(protected)), len(protected))
        else:
            found, gap = best(chunk, share, size, 0)
            found |= set(protected)
        self.token_gaps[call.site.layer].append(gap)
        start = self.first(call, row)
        self.chosen[call.site.layer].append((number, row, size, sorted(j - start for j in found)))
        return found

    def _size(self, call: Call, a: Tensor) -> int:
        if self.tau >= 1.0:
            return a.numel()
        part = a.sort(descending=True).values.cumsum(dim=0)
        part = part / part[-1].clamp_min(torch.finfo(a.dtype).tiny)
        size = int((part < self.tau).sum()) + 1
        self.ratio_gaps[call.site.layer].append(float((part - self.tau).abs().min()))
        return min(size, a.numel())

    def _treated(self, call: Call, row: int) -> bool:
        """Whether the row's prompt is long enough (asked in the first call, and after)."""
        state = self.state(call)
        length = int(call.real[row].sum()) if call.past == 0 else int(state["lengths"][row])
        return length >= self.min_tokens

    # ------------------------------------------------------------ the first call's pattern

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        self.state(call)["logits"] = logits
        return logits

    def seen(self, call: Call, seen: Tensor) -> Tensor:
        seen = super().seen(call, seen)
        state = self.state(call)
        logits = state.pop("logits")
        if call.past:
            return seen
        p, narrowed = masked_softmax(logits, seen, call.sinks), seen.clone()
        state["important"] = {}
        for row in range(seen.shape[0]):
            chunk = call.real[row].nonzero().flatten().tolist()
            if not chunk or not self._treated(call, row):
                continue
            last = max(1, tokens(self.last, len(chunk)))
            found = self.select(call, p, row, 0, chunk, last)
            state["important"][row] = found
            inside = torch.zeros(seen.shape[-1], dtype=torch.bool)
            inside[sorted(found)] = True
            narrowed[row] &= inside[:, None] & inside[None, :]
        return narrowed

    # ------------------------------------------------------------ what becomes of the rest

    def scores(self, call: Call, p: Tensor) -> None:
        """Settle the chunks of this call, so that ``choose`` can drop and ``pack`` can pack them."""
        state = self.state(call)
        number = state.get("calls", 0)
        state["plan"] = []  # (row, chunk, T)
        for row in range(p.shape[0]):
            if number == 0:
                if row in state["important"]:
                    chunk = call.real[row].nonzero().flatten().tolist()
                    state["plan"].append((row, chunk, state["important"][row]))
                    continue
                if self.short != "buffer":
                    continue
            elif not self._treated(call, row) and self.short == "off":
                continue
            for chunk in self._due(call, row):
                found = self.select(call, p, row, number, chunk, 1)
                state["plan"].append((row, chunk, found))

    def _due(self, call: Call, row: int) -> list[list[int]]:
        state, columns = self.state(call), self.present(call)[row, 0]
        if call.past:
            lq = call.query.shape[2]
            columns = columns & ~torch.nn.functional.pad(state["settled"][row], (0, lq))
        waiting = columns.nonzero().flatten().tolist()
        if self.short == "generated" and not self._treated(call, row):
            prompt = self.first(call, row) + self.length(call, row)
            waiting = [j for j in waiting if j >= prompt]
        if len(waiting) < self.interval:
            return []
        if self.flush == "all":
            return [waiting]
        whole = len(waiting) // self.interval * self.interval
        return [waiting[i : i + self.interval] for i in range(0, whole, self.interval)]

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        kept = set(candidates)
        if self.mode == "discard":
            for planned, chunk, found in self.state(call)["plan"]:
                if planned == row:
                    kept -= set(chunk) - found
        return kept, math.inf

    def pack(self, call: Call, p: Tensor) -> None:
        state, hkv = self.state(call), call.key.shape[1]
        before = state.get("settled", torch.zeros(p.shape[0], 0, dtype=torch.bool))
        settled = torch.nn.functional.pad(before, (0, p.shape[-1] - before.shape[-1]))
        for row, chunk, found in state["plan"]:
            settled[row, chunk] = True
            if self.mode == "discard":
                continue
            every = dict.fromkeys(range(hkv), chunk)
            for columns, bits in (
                (sorted(found), self.bits[0]),
                ([j for j in chunk if j not in found], self.bits[1]),
            ):
                self.put(call, row, dict.fromkeys(range(hkv), columns), bits, bits, every)
        state["settled"] = settled
