"""Masks without a simple form: tensors, flex BlockMasks and predicates, evaluated a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Models write "hidden" as -inf, as the minimum of some floating-point type, or (T5) as half of it. The
# smallest of these is half of float16's; no bias comes near, and exp of it is zero.
HIDDEN = -16000.0


def evaluate(dense: Any, rows: Tensor, lo: int, hi: int, device: torch.device) -> Tensor:
    """bool (B|1, H|1, rows, hi - lo) for the row numbers ``rows`` (n,) and keys [lo, hi)."""
    if isinstance(dense, Tensor):
        piece = dense[:, :, rows, lo:hi]
        return piece if piece.dtype == torch.bool else hidden_apart(piece)
    if isinstance(dense, VisiblePairs | Picked):
        return dense.at(rows, lo, hi)
    return _block_mask_rows(dense, rows, lo, hi, device)


def one_row(dense: Any, batch: int) -> Any:
    """The part of a mask that belongs to one batch row."""
    if dense is None or dense.shape[0] == 1:
        return dense
    if isinstance(dense, Tensor):
        return dense[batch : batch + 1]
    if isinstance(dense, VisiblePairs):
        return dense.one_row(batch)
    return BlockMaskRow(dense, batch)


def hidden_apart(piece: Tensor) -> Tensor:
    """True where an additive mask lets the key be seen."""
    return piece > HIDDEN


class VisiblePairs:
    """A predicate over (query, key) numbers, on top of a mask without structure if there is one.

    batch, heads: 1, or the rows of the batch and the query heads, where the predicate gives (batch, heads, rows, keys).
    """

    def __init__(
        self, predicate: Callable[[Tensor, Tensor], Tensor], under: Any, offset: int, batch: int = 1,
        heads: int = 1,
    ):  # fmt: skip
        self.predicate, self.under, self.offset, self.batch, self.heads = (
            predicate,
            under,
            offset,
            batch,
            heads,
        )
        shape = getattr(under, "shape", (1, 1))
        self.shape = (max(batch, shape[0]), max(heads, shape[1]), *shape[2:])

    def at(self, rows: Tensor, lo: int, hi: int) -> Tensor:
        keys = torch.arange(lo, hi, device=rows.device)
        seen = self.predicate((rows + self.offset)[:, None], keys[None, :])
        seen = seen.expand(self.batch, self.heads, len(rows), len(keys))
        return seen if self.under is None else seen & evaluate(self.under, rows, lo, hi, rows.device)

    def one_row(self, number: int) -> VisiblePairs:
        """The part that belongs to one row of the batch."""
        predicate, own = self.predicate, self.batch > 1

        def row(q: Tensor, k: Tensor) -> Tensor:
            seen = predicate(q, k)
            return seen[number : number + 1] if own else seen

        return VisiblePairs(row, one_row(self.under, number), self.offset, heads=self.heads)


class Picked:
    """Some rows and keys of one row of the batch, by number, out of a description ``seen`` of all of them."""

    def __init__(self, seen: Any, rows: Tensor, cols: Tensor):
        self.seen, self.rows, self.cols = seen, rows, cols
        self.shape = (1, 1 if seen.dense is None else seen.dense.shape[1])

    def at(self, rows: Tensor, lo: int, hi: int) -> Tensor:
        index = self.cols[lo:hi].expand(1, self.shape[1], -1)
        found: Tensor | None = self.seen.columns(index, self.rows[rows])
        if found is None:
            return torch.ones(1, 1, len(rows), hi - lo, dtype=torch.bool, device=rows.device)
        return found


class BlockMaskRow:
    """The part of a flex BlockMask that belongs to one batch row."""

    def __init__(self, mask: Any, batch: int):
        self._mask, self._batch = mask, batch
        self.shape = (1, *mask.shape[1:])

    def mask_mod(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found: Tensor = self._mask.mask_mod(b + self._batch, h, q, k)
        return found


def _block_mask_rows(mask: Any, rows: Tensor, lo: int, hi: int, device: torch.device) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask.mask_mod(b, h, rows[q], k + lo)

    size = (mask.shape[0], mask.shape[1], rows.shape[0], hi - lo)
    found: Tensor = create_mask(shifted, *size, device=str(device))
    return found
