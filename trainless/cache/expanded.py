"""A packing layer for modules that work on what the cache returns before they attend to it.

Such a module (latents that are expanded into heads, heads that are repeated, values that a mask is made of) has to
be given numbers, and all of them. They are made from the codes for each call, and not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.quant_kv import dequantise
from ..seams import Lease
from .columns import real_columns
from .packed import PackedLayer


class ExpandedLayer(PackedLayer):
    """Packs as ever, and hands out everything as numbers.

    Without an evictor they stand in the columns that the model's own mask is about; beside one, in the order of
    the slots, packed ones first.
    """

    handed: tuple[Tensor, Tensor] | None = None  # what the call under way was given, while it is under way

    @property
    def drops(self) -> bool:
        """Whether a rule of eviction stands beside that of precision."""
        return self.policy.chosen or self.policy.total(1 << 62) < 1 << 62

    @property
    def evicted(self) -> bool:
        return super().evicted and self.drops

    @property
    def packed(self) -> bool:
        return False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = super().update(key_states, value_states, *args, **kwargs)
        if self.served and self.store.runs:
            key, value = self._slots() if self.drops else self._columns()
        self.handed = (key, value)
        return key, value

    def finish(self, high: Tensor | None) -> set[Lease]:
        self.handed = None
        return super().finish(high)

    # What methods remember of each key lies as the keys are handed out: without an evictor, in the columns.

    def _states_grow(self, before: int, added: int) -> None:
        super()._states_grow(before if self.drops else self.seen - added, added)

    def _states_gather(self, index: Tensor) -> None:
        if self.drops:
            super()._states_gather(index)

    def _slots(self) -> tuple[Tensor, Tensor]:
        both = [dequantise(s, 0, s.slots, self.keys.dtype) for s in self.segments if s.slots]
        return torch.cat([k for k, _ in both], 2), torch.cat([v for _, v in both], 2)

    def _columns(self) -> tuple[Tensor, Tensor]:
        columns, (key, value) = self.columns(), self._slots()
        return _placed(key, columns, self.seen), _placed(value, columns, self.seen)

    def columns(self) -> Tensor:
        """(B, Hkv, slots): the column of the model's mask that each slot belongs to, -1 for an empty one.

        While a call is under way its own tokens are in the columns after all that came before, pads or not.
        """
        positions = self.positions
        assert positions is not None
        columns = positions
        if self.pads:
            # The n-th real token of a row stands in the n-th of its columns that are no padding.
            rows = [real_columns(pads, self.seen, positions.device) for pads in self.pads]
            real = torch.stack([torch.nn.functional.pad(row, (0, self.seen - len(row))) for row in rows])
            real = real[:, None].expand(-1, positions.shape[1], -1)
            columns = real.gather(2, positions.clamp_min(0)).masked_fill(positions < 0, -1)
        added = self.seen - self.past
        own = torch.arange(self.past, self.seen, device=columns.device).expand(*columns.shape[:2], added)
        return torch.cat([columns[:, :, : columns.shape[2] - added], own], 2)

    def waiting_columns(self, t: Tensor) -> Tensor:
        """``t`` (B, heads, columns) of the call under way, at the tokens that wait: (B, heads, W)."""
        if self.drops or not self.store.runs:
            return t[..., -self.keys.shape[2] :]
        index = self.columns()[:, :, self.store.slots :]
        index = index if t.shape[1] == 1 else index.repeat_interleave(t.shape[1] // index.shape[1], 1)
        return t.gather(2, index[:, : t.shape[1]].clamp_min(0))

    def mask(self, mask: Any, rows: int, causal: bool) -> tuple[Tensor | None, bool]:
        return super(PackedLayer, self).mask(mask, rows, causal)


def _placed(t: Tensor, columns: Tensor, width: int) -> Tensor:
    """``t`` (B, Hkv, slots, D) with each slot in its column; empty slots go into one too many, cut off again."""
    index = columns.masked_fill(columns < 0, width)[..., None].expand(*t.shape)
    return t.new_zeros(*t.shape[:2], width + 1, t.shape[3]).scatter_(2, index, t)[:, :, :width]
