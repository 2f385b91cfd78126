"""A compressing cache layer that settles into buffers of fixed size.

What stays after a prompt is moved into the slots of ``kernels.slots``, one more than the budget, with positions, scores
and counters as tensors beside them; see ``freezing`` for when, and for what makes it thaw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.slots import ADDED, EVERYTHING, FixedSlots, SlotRule, fixed_slots, slot_decode
from ..kernels.turning import Rotates, Turn
from ..seams import Evict, Lease
from .freezing import Freezing, statistics
from .held import shifts

ROOM = 64  # tokens that there is room for beyond those held, where nothing goes, at least


class FixedLayer(Freezing):
    """Evicts as its class does, on slots of a number that does not change from step to step.

    A layer in a static cache is frozen from its prompt on, one in a dynamic cache once something has gone: until then
    its calls have the bits of stock ones. Where nothing goes after the prompt, a dynamic one is frozen after the first
    step of one token, with ROOM more slots or an eighth of those held, and settles into larger buffers when these are
    used up.
    """

    _layer_type = None

    def __init__(self, policy: Evict, lease: Lease, capacity: int | None = None):
        self.capacity = capacity
        self.is_compileable = capacity is not None
        super().__init__(policy, lease)

    def _clear(self) -> None:
        self.fixed: FixedSlots | None = None
        self.until = 0  # how many tokens there is room for, in a dynamic cache from which nothing goes after the prompt
        # By which keys are turned when they are read, under a rule that rolls positions.
        self.tables: Turn | None = None
        self.how = SlotRule()  # what is compared when a token has to go, while frozen
        super()._clear()

    @property
    def owners(self) -> tuple[Lease | None, Lease | None]:
        return self.lease, None

    def _buffers(self) -> list[Tensor]:
        return [] if self.fixed is None else list(self.fixed.tensors().values())

    # ------------------------------------------------------------------ freezing and thawing

    @staticmethod
    def suits(policy: Evict, capacity: int | None) -> bool:
        """Whether what stays under this rule fits into slots whose number is known after the prompt."""
        return not (policy.chosen or policy.by_head or policy.replay is not None)

    def freeze(self) -> None:
        """Settle into slots, now that a call is over and what stays is known; does nothing where that has to wait."""
        if self._unsettled() or not (self.lease.active and self.budgets):
            return
        dynamic = self.capacity is None
        if dynamic and (self.positions is None or (self.policy.once and self.seen - self.past > 1)):
            return  # nothing has gone, or a prompt alone is to take no room for later tokens
        if self.policy.rolled and self.tables is None:
            return  # the model's rotation cannot be told by tables
        if self.positions is None:
            self._locate(self.real_seen())
        self._compact()
        assert self.positions is not None
        device, policy = self.keys.device, self.policy
        limits = [EVERYTHING] * self._batch() if policy.once else self._limits()
        room = max(limits)
        if policy.once:
            # In a dynamic cache there is room for some tokens more; then the slots are made anew.
            more = max(ROOM, max(self.counts) // 8) if self.capacity is None else self.capacity - self.seen
            room = max(self.counts) + more
            self.until = self.seen + more
        if self.capacity is not None:
            room = min(room, self.capacity)  # a budget may be for more tokens than there can be
        size = max(room, max(self.counts)) + 1
        rule = self.how = self._rule()
        scores = None
        if rule.score in ADDED:
            scores = self.scores
            if scores is None:
                scores = self.positions.new_zeros(self.positions.shape, dtype=statistics(self.keys))
        self.fixed = fixed_slots(
            self.keys.detach(), self.values.detach(), self.positions, size,
            age=torch.tensor(self.ages, device=device), limit=torch.tensor(limits, device=device),
            recent=torch.tensor(self.recents, device=device), scores=scores, never=self._never(device),
            shifts=shifts(self.positions, self.ages, self.counts) if policy.rolled else None,
            lots=self._lots(),
        )  # fmt: skip
        self.keys, self.values = self.fixed.keys, self.fixed.values
        self.positions, self.scores, self.free = self.fixed.positions, self.fixed.scores, None
        self.whole = self.counts == self.ages
        self._froze(self.fixed.count)

    def thaw(self) -> None:
        fixed = self.fixed
        if fixed is None:
            return
        self.fixed = None
        self._thaws(fixed.age.tolist(), fixed.count.tolist())
        self.positions, self.scores = fixed.positions.long(), fixed.scores
        self.free, self.ordered = None, False
        self._compact()

    # ------------------------------------------------------------------ a step

    @property
    def aged(self) -> Tensor:
        assert self.fixed is not None
        return self.fixed.age

    def steps(self, rows: int, evictor: Any, packer: Any) -> bool:
        room = self.capacity is not None or not self.policy.once or self._seen < self.until
        return room and super().steps(rows, evictor, packer)

    def untouched(self) -> Tensor:
        assert self.fixed is not None
        return (self.fixed.age == self.fixed.count).all()

    def attend(
        self,
        query: Tensor,
        mask: Any,
        *,
        real: Tensor | None = None,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        rotate: Rotates | None = None,
    ) -> Tensor:
        fixed, new = self.fixed, self.new
        assert fixed is not None and new is not None
        self.new = None
        if real is None:
            real = self._told(mask)
        turn = self._turn(rotate) if fixed.shifts is not None else None
        out = slot_decode(
            query,
            *new,
            fixed,
            self.how,
            scale=scale,
            softcap=softcap,
            sink_logits=sinks,
            real=real,
            turn=turn,
        )
        return out.transpose(1, 2)

    def _turn(self, rotate: Rotates | None) -> Turn:
        """The tables by which keys are turned, as far as a dynamic cache has come."""
        assert self.tables is not None
        if self.capacity is None and self._seen >= self.tables.reach and rotate is not None:
            self.tables = rotate.turn(self.keys, self._seen)
            assert self.tables is not None
        return self.tables

    @property
    def nbytes(self) -> int:
        held = super().nbytes
        if self.fixed is None:
            return held
        beside = (t for name, t in self.fixed.tensors().items() if name not in ("keys", "values"))
        return held + sum(t.untyped_storage().nbytes() for t in beside)

    @property
    def width(self) -> int:
        return super().width if self.fixed is None else int(self.fixed.count.max())
