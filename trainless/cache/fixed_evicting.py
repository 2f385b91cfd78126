"""A layer that packs and evicts and settles into buffers of fixed size, in a static cache.

Heads keep different tokens, so each head of a row has a ring and groups of its own: a *lane*. What goes is marked by
its position, -1, in its slot; in the ring the later tokens move up, so that groups are made of tokens that are left.
A slot of a group is not used again, so there are as many as the cache was made for: it is the precision that saves
room here, and the evictor only what is read. In a dynamic cache ``PackedLayer`` moves codes together instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.quant_kv import fixed_packed, pack_group, packed_decode
from ..kernels.slots import ADDED, EVERYTHING, FixedSlots, plain
from ..seams import Evict, Lease, Quantise, tokens_of
from .fixed import FixedLayer
from .fixed_packed import FixedPackedLayer
from .freezing import statistics
from .store import StoredRun


class FixedEvictingLayer(FixedPackedLayer):
    """Evicts and packs as ``PackedLayer`` does. L = B · Hkv lanes; slots: those of the groups, then those of the ring."""

    _layer_type = None

    def _clear(self) -> None:
        self.marks: FixedSlots | None = (
            None  # positions and scores of all slots, and the counters of the evictor
        )
        super()._clear()

    @property
    def owners(self) -> tuple[Lease | None, Lease | None]:
        return self.lease, self.packer

    @staticmethod
    def suits(rule: Quantise, policy: Evict | None, capacity: int | None) -> bool:
        if policy is None or capacity is None or policy.rolled:
            return False
        return FixedLayer.suits(policy, capacity) and FixedPackedLayer.suits(rule, None, capacity)

    # ------------------------------------------------------------------ freezing and thawing

    def _tidy(self) -> None:
        """Codes stay where they are: only whole groups fit into buffers."""
        if not self.store.runs:
            super()._tidy()
        self.loose = False

    def freeze(self) -> None:
        active = self.packer.active and self.lease.active
        if self._unsettled() or not (active and self.lengths and self.budgets) or not self._whole_groups():
            return
        if self.tail is None:
            self._locate(self.real_seen())
        assert self.tail is not None and self.capacity is not None
        group, residuals = self.rule.group, [tokens_of(self.rule.residual, n) for n in self.lengths]
        ring, run = max(residuals) + group, self.store.runs[0] if self.store.runs else None
        filled = run.filled if run is not None else [0] * self._batch()
        waiting = int((self.tail >= 0).sum(2).max())
        if waiting >= ring:
            return  # more wait than a step may find
        stored = 0 if run is None else run.segment.key.shape[2]
        groups = max(1, stored, max(filled) + (waiting + self.capacity - self.seen) // group)
        fixed = fixed_packed(
            _lanes(self.keys), _lanes(self.values), k_bits=self.rule.k_bits[0], v_bits=self.rule.v_bits[0],
            group=group, groups=groups, ring=ring,
        )  # fmt: skip
        b, hkv = self.tail.shape[:2]
        device = fixed.age.device

        def lanewise(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device).repeat_interleave(hkv)

        if run is not None:
            for name, tensor in run.segment.tensors().items():
                getattr(fixed, name)[:, :, : tensor.shape[2]] = _lanes(tensor)
        fixed.packed.copy_(lanewise(filled) * group)
        exists = self.tail >= 0
        fixed.age.copy_(fixed.packed + exists.sum(2).flatten())
        order = (
            (~exists).int().argsort(dim=2, stable=True)[:, :, :waiting]
        )  # those that exist first, in order
        place = fixed.packed.view(b, hkv, 1).long() + torch.arange(waiting, device=device)
        place = place % ring
        for into, held in ((fixed.tail_key, self.keys), (fixed.tail_value, self.values)):
            wide = (*order.shape, held.shape[3])
            # Under autocast values come in another dtype than keys.
            held = held.detach().gather(2, order[..., None].expand(wide)).to(into.dtype)
            into.view(b, hkv, ring, -1).scatter_(2, place[..., None].expand(wide), held)
        self.marks = self._marks(run, order, place + groups * group, fixed.slots)
        self.residual = lanewise(residuals)
        self._store.runs, self.tail, self.fixed, self.scores = [], None, fixed, None
        self._show()
        self._froze(self.marks.count)

    def _marks(self, run: StoredRun | None, order: Tensor, place: Tensor, slots: int) -> FixedSlots:
        """Positions and scores by slot; ``order`` of the tail goes to the slots ``place``, both (B, Hkv, waiting)."""
        assert self.tail is not None and self.capacity is not None
        b, hkv = self.tail.shape[:2]
        device, packed = self.tail.device, 0 if run is None else run.slots

        def spread(codes: Tensor | None, tail: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
            made = torch.full((b, hkv, slots), fill, dtype=dtype, device=device)
            if codes is not None:
                made[:, :, :packed] = codes
            return made.scatter_(2, place, tail.gather(2, order).to(dtype))

        positions = spread(None if run is None else run.positions, self.tail, -1, torch.int32)
        scores, wide = None, statistics(self.keys)
        if self._rule().score in ADDED:
            held = self.scores
            if held is None:
                held = torch.zeros(b, hkv, packed + self.tail.shape[2], dtype=wide, device=device)
            scores = spread(held[:, :, :packed], held[:, :, packed:], 0, wide)
        limits = [EVERYTHING] * b if self.policy.once else self._limits()
        none = self.keys.new_zeros(b, hkv, slots, 0)

        def rowwise(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        never, own = self._never(device), self._lots()
        return FixedSlots(
            none, none, positions, positions.new_zeros(b, hkv), rowwise(self.ages), rowwise(self.counts),
            rowwise(limits), rowwise(self.recents), positions.new_zeros(b, hkv, 0), scores,
            None if never is None else never.to(torch.int32), None, None if own is None else own.repeat(b, 1),
        )  # fmt: skip

    def _show(self) -> None:
        """``keys`` and ``values`` as others look at them: the ring."""
        assert self.fixed is not None and self.marks is not None
        b, hkv, _ = self.marks.positions.shape
        self.keys, self.values = (
            t.view(b, hkv, *t.shape[2:]) for t in (self.fixed.tail_key, self.fixed.tail_value)
        )

    def thaw(self) -> None:
        fixed, marks = self.fixed, self.marks
        if fixed is None or marks is None:
            return
        self.fixed = self.residual = self.marks = None
        self._thaws(marks.age.tolist(), marks.count.tolist())
        b, hkv, _ = marks.positions.shape
        base, ring = fixed.slots - fixed.tail_key.shape[2], fixed.tail_key.shape[2]
        packed = fixed.packed.view(b, hkv)
        filled = (packed.amax(1) // fixed.size).tolist()
        groups = max(filled)
        codes, self._store.runs = groups * fixed.size, []
        positions = marks.positions
        if groups:
            segment = fixed.segments()[0].each(lambda t: t.view(b, hkv, *t.shape[2:])[:, :, :groups].clone())
            self._store.runs = [StoredRun(0, segment, positions[:, :, :codes].clone(), filled)]
        # The newest stands last, whatever a lane lacks.
        age = fixed.age.view(b, hkv)
        width = int((age - packed).max())
        token = age[..., None].long() - width + torch.arange(width, device=age.device)
        exists = token >= packed[..., None]
        place = token % ring

        def waiting(t: Tensor) -> Tensor:
            t = t.view(b, hkv, *t.shape[2:])
            found = t.gather(2, place[..., None].expand(*place.shape, t.shape[3]))
            return found.masked_fill(~exists[..., None], 0)

        self.keys, self.values = waiting(fixed.tail_key), waiting(fixed.tail_value)
        self.tail = positions[:, :, base:].gather(2, place).masked_fill(~exists, -1)
        if marks.scores is not None and not self.policy.last:
            tail = marks.scores[:, :, base:].gather(2, place).masked_fill(~exists, 0)
            self.scores = torch.cat([marks.scores[:, :, :codes], tail], 2)

    # ------------------------------------------------------------------ a step

    @property
    def aged(self) -> Tensor:
        assert self.marks is not None
        return self.marks.age

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
        fixed, marks, new = self.fixed, self.marks, self.new
        assert fixed is not None and marks is not None and new is not None and self.residual is not None
        self.new = None
        if real is None:
            real = self._told(mask)
        b, h, _, d = query.shape
        hkv = new[0].shape[1]
        if real is not None:
            real = real.expand(b)
        self._mark(real)
        p = query.new_empty(b * hkv, h // hkv, fixed.slots, dtype=statistics(query))
        out, lse = packed_decode(
            query.reshape(b * hkv, h // hkv, 1, d), _lanes(new[0]), _lanes(new[1]), fixed, scale=scale,
            softcap=softcap, valid=_lanes(marks.positions) >= 0, scores=p,
            real=None if real is None else real.repeat_interleave(hkv),
        )  # fmt: skip
        out, p = out.view(b, h, 1, -1), p.view(b, h, -1)
        if sinks is not None:
            # A sink takes its share of every probability: exp(lse) of exp(lse) + exp(sink) is left.
            left = torch.sigmoid(lse.view(b, h) - sinks.to(lse.dtype))[..., None]
            out, p = (out * left[..., None]).to(query.dtype), p * left
        plain.settle(p, marks, self._rule(), real)
        self._close()
        self._pack_marks()
        pack_group(fixed, self.residual)
        return out.transpose(1, 2)

    def _mark(self, real: Tensor | None) -> None:
        """The position of the token that comes into the ring."""
        fixed, marks = self.fixed, self.marks
        assert fixed is not None and marks is not None
        ring = fixed.tail_key.shape[2]
        at = (fixed.slots - ring + fixed.age.long() % ring).view(*marks.positions.shape[:2], 1)
        new = marks.age if real is None else torch.where(real, marks.age, -1)
        marks.positions.scatter_(2, at, new[:, None, None].expand_as(at))
        if marks.scores is not None:
            marks.scores.scatter_(2, at, 0.0)

    def _close(self) -> None:
        """Move later tokens of the ring up into the place of the one that went."""
        fixed, marks = self.fixed, self.marks
        assert fixed is not None and marks is not None
        ring = fixed.tail_key.shape[2]
        b, hkv, slots = marks.positions.shape
        number = torch.arange(ring, device=fixed.age.device)
        place = (
            fixed.packed[:, None].long() + number
        ) % ring  # (L, T): slots of the ring, oldest token first
        there = number < (fixed.age - fixed.packed)[:, None]
        gone = there & (marks.positions.view(-1, slots)[:, slots - ring :].gather(1, place) < 0)
        after = gone.cumsum(1) > 0  # from the gap on
        source = place.gather(1, (number + after).clamp_max(ring - 1))
        for tensor in (fixed.tail_key, fixed.tail_value):
            wide = (b * hkv, 1, ring, tensor.shape[3])
            moved = tensor.gather(2, source[:, None, :, None].expand(wide))
            tensor.scatter_(2, place[:, None, :, None].expand(wide), moved)
        fixed.age.sub_(gone.any(1).int())
        left = number < (fixed.age - fixed.packed)[:, None]
        for marked, fill in ((marks.positions, -1), (marks.scores, 0)):
            if marked is not None:
                mine = marked.view(-1, slots)[:, slots - ring :]
                mine.scatter_(1, place, mine.gather(1, source).masked_fill(~left, fill))

    def _pack_marks(self) -> None:
        """Positions and scores of the groups that are packed next go where their tokens go."""
        fixed, marks = self.fixed, self.marks
        assert fixed is not None and marks is not None and self.residual is not None
        ring, size, slots = fixed.tail_key.shape[2], fixed.size, fixed.slots
        base = slots - ring
        waits = fixed.age - fixed.packed
        due = ((waits >= self.residual + size) & (fixed.packed < base))[:, None]
        number = fixed.packed[:, None].long() + torch.arange(size, device=fixed.age.device)
        here, there = base + number % ring, number.clamp_max(base - 1)
        for marked, fill in ((marks.positions, -1), (marks.scores, 0)):
            if marked is not None:
                mine = marked.view(-1, slots)
                old = mine.gather(1, here)
                mine.scatter_(1, there, torch.where(due, old, mine.gather(1, there)))
                mine.scatter_(1, here, old.masked_fill(due, fill))

    # ------------------------------------------------------------------ what there is

    def _where(self) -> Tensor | None:
        return self.marks.positions.long() if self.marks is not None else super()._where()

    def _buffers(self) -> list[Tensor]:
        if self.marks is None:
            return []
        marked = (
            t for name, t in self.marks.tensors().items() if name not in ("keys", "values", "tickets", "free")
        )
        return [*super()._buffers(), *marked]

    @property
    def width(self) -> int:
        return super().width if self.marks is None else int(self.marks.count.max())


def _lanes(t: Tensor) -> Tensor:
    """(B, Hkv, …) as (B · Hkv, 1, …)."""
    return t.flatten(0, 1)[:, None]
