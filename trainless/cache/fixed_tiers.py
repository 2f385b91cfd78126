"""A layer that packs in two tiers and settles into buffers of fixed size.

For a rule under which a chunk of single tokens goes high or low by the attention of the newest token alone: which ones
do is decided on the device then. Both tiers have groups of their own, ``interval`` tokens make one of each, and the
ring in front of the high ones holds what waits. Chunks of other sizes (a prompt, a turn) stay as they are beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.quant_kv import FixedPacked, FixedTiers, fixed_packed, tiers_decode
from ..seams import Evict, Quantise, tokens_of
from .fixed_packed import GROWTH, FixedPackedLayer
from .store import StoredRun

LAST = 1 << 30  # behind any run


class FixedTiersLayer(FixedPackedLayer):
    """Packs in two tiers as ``PackedLayer`` does. ``fixed`` is the high tier with the ring."""

    _layer_type = None

    def _clear(self) -> None:
        self.tiers: FixedTiers | None = None
        self.runs: list[StoredRun] = []  # those that stand beside the tiers: chunks of other sizes
        self.at = [LAST, LAST]  # which of the runs the high and the low tier were
        super()._clear()

    @staticmethod
    def suits(rule: Quantise, policy: Evict | None, capacity: int | None) -> bool:
        if policy is not None or rule.group or rule.start or rule.residual or not rule.newest:
            return False
        high = tokens_of(rule.high, rule.interval)
        return 0 < high < rule.interval and not 0 < rule.cut < max(high, rule.interval - high)

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a chunk that go high, and low."""
        high = tokens_of(self.rule.high, self.rule.interval)
        return high, self.rule.interval - high

    # ------------------------------------------------------------------ freezing and thawing

    def freeze(self) -> None:
        if self._unsettled() or not (self.packer.active and self.lengths) or self.counts != self.ages:
            return
        if self.capacity is None and (not self.store.runs or self.seen - self.past > 1):
            return
        if any(r.segment.index is not None for r in self.store.runs):
            return
        if self.tail is None:
            self._locate(self.real_seen())
        assert self.tail is not None
        interval, waiting = self.rule.interval, int((self.tail >= 0).sum(2).max())
        if waiting >= interval:
            return
        ring = self._ring(interval, waiting)
        mine = [
            next((r for r in self.store.runs if (r.tier, r.size) == (tier, size) and _full(r)), None)
            for tier, size in enumerate(self.sizes)
        ]
        filled = [r.filled if r is not None else [0] * self._batch() for r in mine]
        most = max(max(f) for f in filled)
        chunks = 0 if self.capacity is None else (waiting + self.capacity - self.seen) // interval
        stored = [0 if run is None else run.segment.key.shape[2] for run in mine]
        groups = max(1, most + chunks, *stored)
        self.until = self.seen + (groups - most + 1) * interval - 1 - waiting
        tiers, places = [], []
        for tier, (size, run, full) in enumerate(zip(self.sizes, mine, filled, strict=True)):
            made = fixed_packed(
                self.keys, self.values, k_bits=self.rule.k_bits[tier], v_bits=self.rule.v_bits[tier],
                group=size, groups=groups, ring=1 if tier else ring,
            )  # fmt: skip
            place = self.tail.new_full((*self.tail.shape[:2], made.slots - made.tail_key.shape[2]), -1)
            if run is not None:
                for name, tensor in run.segment.tensors().items():
                    getattr(made, name)[:, :, : tensor.shape[2]] = tensor
                place[:, :, : run.slots] = run.positions
            made.packed.copy_(torch.tensor([f * size for f in full]))
            made.age.copy_(made.packed)
            tiers.append(made)
            places.append(place)
        others = [run for run in self.store.runs if all(run is not own for own in mine)]
        seen = tuple(None if bool((r.positions >= 0).all()) else _shown(r) for r in others)
        # The runs come back in this order: slots are counted by it.
        self.at = [next((n for n, r in enumerate(self.store.runs) if r is own), LAST) for own in mine]
        self._fill_ring(tiers[0])
        aged = torch.tensor(self.ages, dtype=torch.int32, device=self.tail.device)
        apart = tuple(self._apart(run) for run in others)
        self.store.runs, self.tail, self.high = [], None, None
        self.tiers = FixedTiers(tiers[0], tiers[1], (places[0], places[1]), aged, apart, seen)
        self.fixed, self.runs = tiers[0], others
        self.keys, self.values = self.fixed.tail_key, self.fixed.tail_value
        self._froze(aged)

    def _apart(self, run: StoredRun) -> FixedPacked:
        """The codes of a run to which nothing is added; which slots hold a token its positions say."""
        segment = run.segment
        made = fixed_packed(
            self.keys,
            self.values,
            k_bits=segment.k_bits,
            v_bits=segment.v_bits,
            group=run.size,
            groups=1,
            ring=1,
        )
        for name, tensor in segment.tensors().items():
            setattr(made, name, tensor.detach().contiguous())
        made.packed.fill_(run.slots)
        made.age.fill_(run.slots)
        return made

    def thaw(self) -> None:
        tiers, runs = self.tiers, self.runs
        if tiers is None:
            return
        self.tiers, self.fixed, self.runs = None, None, []
        fixed, aged = tiers.high, tiers.aged
        ages = aged.tolist()
        self._thaws(ages, list(ages))
        self._store.runs = [
            StoredRun(r.tier, held.segments()[0], r.positions, r.filled)
            for held, r in zip(tiers.others, runs, strict=True)
        ]
        for tier in sorted((0, 1), key=lambda tier: self.at[tier]):
            held, place = tiers.sections[tier], tiers.places[tier]
            filled = (held.packed // held.size).tolist()
            if groups := max(filled):
                segment = held.segments()[0].each(lambda t, n=groups: t[:, :, :n].clone())  # type: ignore[misc]
                positions = place[:, :, : groups * held.size].clone()
                self._store.runs.insert(self.at[tier], StoredRun(tier, segment, positions, filled))
        waits = (fixed.age - fixed.packed)[:, None].long()
        width = int(waits.max())
        # Which of those that wait, from the oldest.
        number = torch.arange(width, device=waits.device) - width + waits
        self._unroll(fixed, fixed.packed[:, None] + number, number >= 0, aged[:, None] - waits + number)

    def _where(self) -> Tensor | None:
        self.thaw()
        return super()._where()

    # ------------------------------------------------------------------ a step

    def _enlarge(self) -> None:
        assert self.tiers is not None
        if self._brimful():
            self.tiers = self.tiers._replace(high=self._lengthen())
        tiers = self.tiers
        if self._seen < self.until:
            return
        more = max(1, tiers.high.key.shape[2] // GROWTH)
        high, low = tiers.high.grown(more), tiers.low.grown(more)
        places = tuple(
            torch.nn.functional.pad(place, (0, more * held.size), value=-1)
            for place, held in zip(tiers.places, (high, low), strict=True)
        )
        self.tiers = tiers._replace(high=high, low=low, places=(places[0], places[1]))
        self.fixed = high
        self.until += more * tiers.interval

    @property
    def aged(self) -> Tensor:
        assert self.tiers is not None
        return self.tiers.aged

    def attend(
        self,
        query: Tensor,
        mask: Any,
        *,
        real: Tensor | None = None,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        rotate: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        tiers, new = self.tiers, self.new
        assert tiers is not None and new is not None
        self.new = None
        if real is None:
            real = self._told(mask)
        if real is not None:
            real = real.expand(query.shape[0])
        out = tiers_decode(query, *new, tiers, scale=scale, softcap=softcap, sink_logits=sinks, real=real)
        return out.transpose(1, 2)

    # ------------------------------------------------------------------ what there is

    def _buffers(self) -> list[Tensor]:
        tiers = self.tiers
        if tiers is None:
            return []
        held = [t for section in tiers.sections for t in section.tensors().values()]
        held += [*tiers.places, tiers.aged, *(t for t in tiers.seen if t is not None)]
        return held + [run.positions for run in self.runs]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        order = beam_idx.tolist()
        for run in self.runs:
            run.filled = [run.filled[i] for i in order]

    @property
    def width(self) -> int:
        return super().width if self.tiers is None else int(self.tiers.aged.max())


def _shown(run: StoredRun) -> Tensor:
    """Which slots hold a token, and none of a ring of one slot behind them."""
    return torch.nn.functional.pad(run.positions >= 0, (0, 1))


def _full(run: StoredRun) -> bool:
    """Whether every slot of the groups in use holds a token."""
    held = torch.tensor(run.filled, device=run.positions.device)[:, None, None] * run.size
    unused = torch.arange(run.slots, device=run.positions.device) >= held
    return bool(((run.positions >= 0) | unused).all())
