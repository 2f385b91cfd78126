"""The description of a mask: which query sees which key, evaluated a few rows at a time.

Shapes: B batch, H query heads, Lq queries, Lk keys. Query i and key j are positions in this call; under
a causal mask query i sees keys j <= i + Lk - Lq. Nothing here allocates a queries x keys tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .dense import VisiblePairs, evaluate, hidden_apart, one_row

# Rows looked at together when a whole mask has to be walked.
STEP = 256


@dataclass(frozen=True, eq=False)
class Visibility:
    """Query i sees key j when every part that is present agrees.

    causal: j <= i + lk - lq. window: i + lk - lq - j < window if causal, else |…| <= window.
    keys: bool (B|1, Lk), keys that exist. dense: bool or additive float (B|1, H|1, Lq, Lk), or a flex
    BlockMask, when the mask has no simpler form. real: bool (B, Lq), query rows that are not padding
    (None: all); it changes ``counts`` only. mask: what the model passed, for fused operators.
    """

    lq: int
    lk: int
    device: torch.device
    causal: bool = False
    window: int | None = None
    keys: Tensor | None = None
    dense: Any = None
    real: Tensor | None = None
    mask: Any = None

    @property
    def offset(self) -> int:
        """How many keys precede the first query."""
        return self.lk - self.lq

    @property
    def structured(self) -> bool:
        """True when causal, window and keys say everything."""
        return self.dense is None

    @property
    def additive(self) -> bool:
        """True when the mask adds finite values to the logits (ALiBi and the like)."""
        return isinstance(self.dense, Tensor) and self.dense.dtype != torch.bool

    @property
    def kind(self) -> str:
        """A short name for reports."""
        if self.dense is not None:
            return "additive mask" if self.additive else "dense mask"
        parts = ["causal" if self.causal else "full"]
        parts += ["window"] if self.window is not None else []
        parts += ["padding"] if self.keys is not None else []
        return " + ".join(parts)

    def restrict(
        self, predicate: Callable[[Tensor, Tensor], Tensor], batch: int = 1, heads: int = 1
    ) -> Visibility:
        """This, and in addition only pairs with ``predicate(q (rows, 1), k (1, columns))``, bool.

        Both are counted as keys are: query row i has the number i + lk - lq. batch, heads: where they are not 1, the
        predicate gives (batch, heads, rows, columns). InputError with a mask that adds to logits which it does not
        hide: that has no place in a predicate.
        """
        if self.additive and bool(((self.dense != 0) & hidden_apart(self.dense)).any()):
            raise InputError("a pattern cannot be combined with an additive mask that carries finite values")
        return replace(self, dense=VisiblePairs(predicate, self.dense, self.offset, batch, heads), mask=None)

    def row_of_batch(self, batch: int) -> Visibility:
        """The part that belongs to one batch row, with a batch of 1 and without ``real``."""
        keys = self.keys
        keys = keys if keys is None or keys.shape[0] == 1 else keys[batch : batch + 1]
        return replace(self, keys=keys, dense=one_row(self.dense, batch), real=None, mask=None)

    # ------------------------------------------------------------- evaluation

    def span(self, i0: int, i1: int) -> tuple[int, int]:
        """Keys [lo, hi) outside which no row of [i0, i1) sees anything."""
        lo, hi = 0, self.lk
        if self.causal:
            hi = max(0, min(hi, i1 + self.offset))
        if self.window is not None:
            lo = i0 + self.offset - self.window + (1 if self.causal else 0)
            lo = min(max(0, lo), hi)
            if not self.causal:
                hi = max(lo, min(hi, i1 + self.offset + self.window))
        return lo, hi

    def at(self, rows: Tensor, lo: int = 0, hi: int | None = None) -> Tensor | None:
        """bool (B|1, H|1, rows, hi - lo) for row numbers ``rows`` (n,); None when all is visible."""
        hi = self.lk if hi is None else hi
        found: Tensor | None = None
        if self.causal or self.window is not None:
            found = self._band(rows[:, None] + self.offset, torch.arange(lo, hi, device=rows.device))
            found = found[None, None]
        if self.keys is not None:
            keys = self.keys[:, None, None, lo:hi]
            found = keys if found is None else found & keys
            found = found.expand(-1, -1, rows.shape[0], -1)
        if self.dense is not None:
            dense = self._dense_at(rows, lo, hi)
            found = dense if found is None else found & dense
        return found

    def rows(self, i0: int, i1: int, lo: int = 0, hi: int | None = None) -> Tensor | None:
        """``at`` for the rows [i0, i1)."""
        return self.at(torch.arange(i0, i1, device=self.device), lo, hi)

    def bias_at(self, rows: Tensor, lo: int = 0, hi: int | None = None) -> Tensor | None:
        """The finite values that an additive mask adds, (B|1, H|1, rows, hi - lo); None without one.

        Entries that are not visible hold zero.
        """
        if not self.additive:
            return None
        piece = self.dense[:, :, rows, lo : self.lk if hi is None else hi]
        return piece.masked_fill(~hidden_apart(piece), 0)

    def columns(self, index: Tensor, rows: Tensor, heads: Tensor | None = None) -> Tensor | None:
        """Whether each of ``rows`` (n,) sees the keys ``index`` (B, h, S): bool (B, h, n, S) or None.

        heads (h,): the query heads that ``index`` belongs to, None for all of them in order.
        """
        found: Tensor | None = None
        if self.causal or self.window is not None:
            found = self._band(rows[:, None] + self.offset, index[:, :, None, :])
        if self.keys is not None:
            keys = self.keys.expand(index.shape[0], -1)
            keys = keys.gather(1, index.flatten(1)).view(index.shape)[:, :, None, :]
            found = keys if found is None else found & keys
            found = found.expand(-1, -1, rows.shape[0], -1)
        if self.dense is not None:
            dense = self._pick(self._dense_at(rows, 0, self.lk), index, heads)
            found = dense if found is None else found & dense
        return found

    def bias_columns(self, index: Tensor, rows: Tensor, heads: Tensor | None = None) -> Tensor | None:
        """``bias_at`` for the keys ``index`` (B, h, S): (B, h, n, S) or None."""
        piece = self.bias_at(rows)
        return None if piece is None else self._pick(piece, index, heads)

    # ------------------------------------------------------------- counts

    def counts(self, batch: int) -> Tensor:
        """(B, Lk) int64: how many rows that are not padding see each key (in any head)."""
        real = self.real
        if real is None:
            real = torch.ones(1, self.lq, dtype=torch.bool, device=self.device)
        if self.structured:
            seen = self._counts_structured(real.long())
        else:
            seen = torch.zeros(1, self.lk, dtype=torch.long, device=self.device)
            for i0 in range(0, self.lq, STEP):
                i1 = min(self.lq, i0 + STEP)
                block = self.rows(i0, i1)
                assert block is not None  # a dense mask always evaluates
                seen = seen + (block.any(1) & real[:, i0:i1, None]).sum(1)
        return seen.expand(batch, -1).contiguous() if seen.shape[0] != batch else seen

    def seen(self, padding: Tensor | None = None) -> Tensor:
        """int64 (B|1, H|1, Lq): how many keys each row sees. padding: bool (B, Lk), keys that exist, besides."""
        here = self if padding is None else replace(self, keys=padding)
        if here.structured:
            one = torch.ones(1, here.lk, dtype=torch.bool, device=here.device)
            lo, hi = here._limits()
            total = (one if here.keys is None else here.keys).long().cumsum(1)
            total = torch.cat([total.new_zeros(total.shape[0], 1), total], 1)
            return (total[:, hi] - total[:, lo]).clamp_min(0)[:, None]
        found = [torch.zeros(1, 1, 0, dtype=torch.long, device=here.device)]
        for i0 in range(0, here.lq, STEP):
            block = here.rows(i0, min(here.lq, i0 + STEP))
            assert block is not None  # a dense mask always evaluates
            found.append(block.sum(-1).expand(*block.shape[:2], -1))
        batch, heads = found[-1].shape[:2]
        return torch.cat([f.expand(batch, heads, -1) for f in found], -1)

    def empty(self) -> Tensor | None:
        """bool (B|1, H|1, Lq): rows that see no key at all; None when there is surely none."""
        if self.lk == 0:
            return torch.ones(1, 1, self.lq, dtype=torch.bool, device=self.device)
        if self.structured and self.keys is None and self.window is None:
            if not self.causal or self.offset >= 0:
                return None
            return (torch.arange(self.lq, device=self.device) + self.offset < 0)[None, None]
        if self.structured:
            return self.seen() <= 0
        found = []
        for i0 in range(0, self.lq, STEP):
            block = self.rows(i0, min(self.lq, i0 + STEP))
            assert block is not None
            found.append(~block.any(-1))
        return torch.cat(found, -1) if found else None

    # ------------------------------------------------------------- internals

    def _band(self, row: Tensor, key: Tensor) -> Tensor:
        """Causal and window for row numbers already shifted by ``offset``."""
        gap = row - key
        if self.causal:
            return gap >= 0 if self.window is None else (gap >= 0) & (gap < self.window)
        assert self.window is not None
        return gap.abs() <= self.window

    def _limits(self) -> tuple[Tensor, Tensor]:
        """Keys [lo, hi) that each row may see, (Lq,) each, from causal and window alone."""
        row = torch.arange(self.lq, device=self.device) + self.offset
        lo, hi = torch.zeros_like(row), torch.full_like(row, self.lk)
        if self.causal:
            hi = row + 1
        elif self.window is not None:
            hi = row + self.window + 1
        if self.window is not None:
            lo = row - self.window + (1 if self.causal else 0)
        return lo.clamp(0, self.lk), hi.clamp(0, self.lk)

    def _counts_structured(self, real: Tensor) -> Tensor:
        # Which rows see key j is an interval of rows: a difference of two running sums of ``real``.
        total = torch.cat([real.new_zeros(real.shape[0], 1), real.cumsum(1)], 1)
        key = torch.arange(self.lk, device=self.device) - self.offset
        lo, hi = torch.zeros_like(key), torch.full_like(key, self.lq)
        if self.causal:
            lo = key
        elif self.window is not None:
            lo = key - self.window
        if self.window is not None:
            hi = key + self.window + (0 if self.causal else 1)
        seen = total[:, hi.clamp(0, self.lq)] - total[:, lo.clamp(0, self.lq)]
        return seen if self.keys is None else seen * self.keys

    def _dense_at(self, rows: Tensor, lo: int, hi: int) -> Tensor:
        return evaluate(self.dense, rows, lo, hi, self.device)

    @staticmethod
    def _pick(block: Tensor, index: Tensor, heads: Tensor | None) -> Tensor:
        b, h = index.shape[:2]
        if heads is not None and block.shape[1] > 1:
            block = block[:, heads]
        block = block.expand(b, h, -1, -1)
        return block.gather(-1, index[:, :, None, :].expand(-1, -1, block.shape[2], -1))
