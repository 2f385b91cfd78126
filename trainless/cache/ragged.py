"""A compressing cache layer whose heads hold different numbers of tokens, each in storage of its own length.

Where all heads of all rows hold as much, it is a ``FixedLayer`` like any other. Where they do not, what a call leaves is
moved into the lanes of ``kernels.ragged``, so that bytes follow what each head holds; a step of one token writes, attends
and settles there. Anything else is done on padded tensors, as wide as the fullest head, for as long as it takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.ragged import RaggedSlots, ragged_decode, ragged_slots
from ..kernels.ragged.state import PAGE, padded
from ..kernels.turning import Rotates
from ..seams import Evict
from .choosing import UNDECIDED
from .fixed import FixedLayer
from .freezing import statistics
from .held import kept_a_head


class RaggedLayer(FixedLayer):
    """Dynamic caches only. A head's storage has fewer than two pages beyond what it holds, or beyond its budget one."""

    _layer_type = None
    settles_uneven = True

    def _clear(self) -> None:
        self.ragged: RaggedSlots | None = None
        super()._clear()

    @staticmethod
    def suits(policy: Evict, capacity: int | None) -> bool:
        return capacity is None and policy.parts_heads

    def _buffers(self) -> list[Tensor]:
        return super()._buffers() if self.ragged is None else list(self.ragged.tensors().values())

    # ------------------------------------------------------------------ freezing and thawing

    def freeze(self) -> None:
        if self.uneven:
            self.freeze_heads()
        else:
            super().freeze()

    def freeze_heads(self) -> None:
        """Give each head storage of its own length, where heads differ and nothing has to wait."""
        if not self.uneven:
            return
        if self._unsettled() or not (self.lease.active and self.budgets):
            return
        goes_on = not self.policy.once
        if goes_on and (self.limits is None or bool((self.limits == UNDECIDED).any())):
            return  # a row's budget is still to be shared by its heads
        self._compact()
        assert self.positions is not None
        device = self.keys.device
        rule = self.how = self._rule()
        scores = None
        if rule.score is not None:
            scores = self.scores
            if scores is None:
                scores = self.positions.new_zeros(self.positions.shape, dtype=statistics(self.keys))
        self.ragged = ragged_slots(
            self.keys, self.values, self.positions, age=torch.tensor(self.ages, device=device),
            limit=self.limits if goes_on else None, room=0 if goes_on else PAGE,
            recent=torch.tensor(self.recents, device=device), scores=scores, never=self._never(device),
        )  # fmt: skip
        nothing = self.keys.shape[0], self.keys.shape[1], 0
        held = self.ragged.count.view(self.ragged.rows, -1)
        # Shape, dtype and device are asked of these; the numbers are in the lanes.
        self.keys = self.keys.new_empty(*nothing, self.keys.shape[3])
        self.values = self.values.new_empty(*nothing, self.values.shape[3])
        self.positions, self.scores, self.free = self.positions.new_empty(*nothing), None, None
        self.whole = False
        self._froze(held)

    def thaw(self) -> None:
        ragged = self.ragged
        if ragged is None:
            super().thaw()
            return
        self.ragged = None
        lanes = ragged.rows, -1
        self._thaws(ragged.age.view(lanes)[:, 0].tolist(), ragged.count.view(lanes).amax(1).tolist())
        self.keys, self.values, self.positions, self.scores = padded(ragged)
        self.free, self.ordered = None, False
        self._compact()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.ragged is not None:
            self.thaw()
        super().reorder_cache(beam_idx)

    # ------------------------------------------------------------------ a step

    @property
    def aged(self) -> Tensor:
        return super().aged if self.ragged is None else self.ragged.age.view(self.ragged.rows, -1)[:, 0]

    def steps(self, rows: int, evictor: Any, packer: Any) -> bool:
        if self.ragged is None:
            return super().steps(rows, evictor, packer)
        if torch.compiler.is_compiling() or not super(FixedLayer, self).steps(rows, evictor, packer):
            return False
        if self.policy.once:
            sizes = torch.tensor(self.ragged.sizes, device=self.keys.device)
            if bool((self.ragged.count + 1 >= sizes).any()):
                self._make_room()
        return True

    def _make_room(self) -> None:
        assert self.ragged is not None and self.counters is not None
        self.ragged = self.ragged.grown(PAGE)
        self.counters.nbytes = self.nbytes

    def untouched(self) -> Tensor:
        if self.ragged is None:
            return super().untouched()
        return torch.zeros((), dtype=torch.bool, device=self.keys.device)

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
        if self.ragged is None:
            return super().attend(
                query, mask, real=real, scale=scale, softcap=softcap, sinks=sinks, rotate=rotate
            )
        new, self.new = self.new, None
        assert new is not None
        if real is None:
            real = self._told(mask)
        out = ragged_decode(
            query, *new, self.ragged, self.how, scale=scale, softcap=softcap, sink_logits=sinks, real=real
        )
        return out.transpose(1, 2)

    @property
    def nbytes(self) -> int:
        return super().nbytes if self.ragged is None else self.ragged.nbytes

    @property
    def width(self) -> int:
        if self.ragged is None:
            return super().width
        return kept_a_head(self.ragged.count.view(self.ragged.rows, -1))
