"""Quantised cache without a choice of tokens: whole groups at few bits, the newest tokens exact."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from .core import Call
from .evict import tokens
from .packing import Packed


class KvQuant(Packed):
    """After every call the oldest whole groups of ``group`` tokens are packed, as long as at least ``residual``
    tokens stay exact. So after n tokens floor((n - residual) / group) · group are packed, however the
    calls were cut; a call's own tokens are always exact while it runs.

    Settled here where sources differ:
    - Groups count the row's own real tokens, oldest first, from its first one; with an evictor, the tokens
      that are kept and not packed, per key/value head, in their order. A group may be broken by later
      evictions; its minimum and step stay.
    - flush="full" packs as published code for two-bit caches does: whenever ``residual`` or more tokens
      wait, the largest multiple of ``residual`` of them (whole groups), so that fewer than that stay.
    - Keys: one minimum and step per channel and group. Values: channels sized over the group
      (v_sizes="group") or over all that is packed after one call ("chunk"), then one minimum and step per
      token and head; see ``Packed`` for the other forms.
    - 16 bits leave keys or values exact. A float ``residual`` is that fraction of the row's own prompt.
    """

    def __init__(
        self,
        k_bits: int = 4,
        v_bits: int = 4,
        group: int = 64,
        residual: int | float = 128,
        layers: Collection[int] | None = None,
        part: str | None = None,
        *,
        flush: str = "keep",
        v_sizes: str = "group",
        **packed: Any,
    ) -> None:
        super().__init__(layers, part, **packed)
        self.k_bits, self.v_bits, self.group, self.residual = k_bits, v_bits, group, residual
        self.flush, self.v_sizes = flush, v_sizes

    def due(self, waiting: int, residual: int) -> int:
        """How many of ``waiting`` tokens are packed now."""
        if self.flush == "full":
            whole = waiting // residual * residual if residual else waiting
            return whole // self.group * self.group
        return max(0, waiting - residual) // self.group * self.group

    def pack(self, call: Call, p: Tensor) -> None:
        batch, hkv = call.key.shape[:2]
        for row in range(batch):
            residual = tokens(self.residual, self.length(call, row))
            chunk = {}
            for head in range(hkv):
                waiting = self.waiting(call, row, head)
                chunk[head] = waiting[: self.due(len(waiting), residual)]
            for start in range(0, max(map(len, chunk.values())), self.group):
                groups = {head: columns[start : start + self.group] for head, columns in chunk.items()}
                sizes = chunk if self.v_sizes == "chunk" else groups
                self.put(call, row, groups, self.k_bits, self.v_bits, sizes)
