"""Which pairs a sparse call computes, on top of what its mask lets be seen.

Shapes: B batch, H query heads, Lq queries, Lk keys. Rows and keys are numbered as they stand in the call; under
a causal mask row i is the key i + Lk - Lq.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError


@dataclass(frozen=True, eq=False)
class Subset:
    """Only the chosen queries attend, and only to the chosen keys; the other rows are zero.

    queries: bool (B|1, Lq). keys: bool (B|1, Lk). Each row of the batch has a subset of its own.
    """

    queries: Tensor
    keys: Tensor

    def check(self, b: int, h: int, lq: int, lk: int, causal: bool) -> None:
        for name, tensor, length in (("queries", self.queries, lq), ("keys", self.keys, lk)):
            if tensor.dtype != torch.bool or tensor.dim() != 2 or tensor.shape[1] != length:
                raise InputError(f"{name} {tensor.dtype} {tuple(tensor.shape)}: bool {(b, length)} is needed")
            if tensor.shape[0] not in (1, b):
                raise InputError(f"{name} has batch {tensor.shape[0]}, the call has {b}")

    def allows(self, batch: int, heads: Tensor, rows: Tensor, keys: Tensor, offset: int) -> Tensor:
        """bool (h|1, n, m) for the query heads (h,), rows (n,) and keys (m,) of one row of the batch."""
        asks = self.queries[batch if self.queries.shape[0] > 1 else 0, rows]
        offers = self.keys[batch if self.keys.shape[0] > 1 else 0, keys]
        return (asks[:, None] & offers)[None]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Each block of ``size`` queries attends to the listed blocks of ``size`` keys.

    index: int64 (B|1, H|1, ceil(Lq / size), n), numbers of key blocks, each at most once; -1 for none. It must not be
    written to once it was used: what is made of it, and that it was checked, is kept in ``made`` by the shape of a call,
    so that one pattern serves all layers. start: int64 (B,), where the blocks of each row of the batch begin, of its
    queries and of its keys, of which there are as many then; None: at 0. Rows before it see nothing, nobody their keys.
    """

    index: Tensor
    size: int
    start: Tensor | None = field(default=None, kw_only=True)
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def check(self, b: int, h: int, lq: int, lk: int, causal: bool) -> None:
        if ("checked", b, h, lq, lk) in self.made:
            return
        index, blocks = self.index, -(-lq // self.size) if self.size > 0 else -1
        if self.size < 1 or self.size & (self.size - 1):
            raise InputError(
                f"size={self.size}: a power of two is needed; from 16 on GPUs have a kernel for it"
            )
        fits = index.dim() == 4 and index.shape[0] in (1, b) and index.shape[1] in (1, h)
        if not fits or index.shape[2] != blocks or index.dtype != torch.int64:
            raise InputError(
                f"index {index.dtype} {tuple(index.shape)}: int64 {(b, h, blocks, 'n')} is needed, where batch "
                "and heads may be 1"
            )
        last = -(-lk // self.size) - 1
        if index.numel() and not -1 <= int(index.min()) <= int(index.max()) <= last:
            raise InputError(f"key blocks {int(index.min())} to {int(index.max())}: the call has 0 to {last}")
        if self.start is not None and (
            tuple(self.start.shape) != (b,) or lq != lk or int(self.start.min()) < 0
        ):
            raise InputError(
                f"start {tuple(self.start.shape)}: {(b,)} from 0 on, for a call of as many queries as keys"
            )
        ordered = index.sort(-1).values
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
            raise InputError("index names a key block twice; its keys would be counted twice")
        self.made["checked", b, h, lq, lk] = True

    def allows(self, batch: int, heads: Tensor, rows: Tensor, keys: Tensor, offset: int) -> Tensor:
        """See ``Subset.allows``."""
        listed = self.index[batch if self.index.shape[0] > 1 else 0]
        listed = listed[heads] if listed.shape[0] > 1 else listed
        start = 0 if self.start is None else self.start[batch]
        rows, keys = rows - start, keys - start
        listed = listed[:, rows.clamp_min(0) // self.size]  # (h|1, n, listed)
        there = (rows >= 0)[:, None] & (keys >= 0)
        return (listed[..., None, :] == (keys.clamp_min(0) // self.size)[:, None]).any(-1) & there

    def of_row(self, batch: int, tokens: int) -> Blocks:
        """Those of one row of the batch, for its ``tokens`` from its start on."""
        own = self.index[batch if self.index.shape[0] > 1 else 0][None]
        return Blocks(own[:, :, : -(-tokens // self.size)], self.size)

    def read(self, b: int, h: int, lq: int, lk: int, causal: bool) -> tuple[int, int]:
        """How many blocks of keys a call of this shape computes, over its heads and batch, and how many it would whole.

        Blocks of queries that nothing is listed for count in neither.
        """
        index = self.index
        last = torch.full((index.shape[2],), lk - 1, device=index.device)
        if causal:
            last = (
                (torch.arange(1, len(last) + 1, device=index.device) * self.size - 1).clamp_max(lq - 1)
                + lk
                - lq
            )
        listed = (index >= 0) & (index * self.size <= last[:, None])
        whole = listed.any(-1) * (last // self.size + 1)
        times = (b // index.shape[0]) * (h // index.shape[1])
        read, whole = torch.stack([listed.sum(), whole.sum()]).tolist()
        return read * times, whole * times


@dataclass(frozen=True, eq=False)
class Spans:
    """Each head sees its own number of latest keys, and the first ``sinks`` keys besides. Causal calls only.

    span: int64 (H,), 1 or more: row i sees the keys from i + Lk - Lq - span + 1 to i + Lk - Lq. ``made``: see ``Blocks``.
    """

    span: Tensor
    sinks: int = 0
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def check(self, b: int, h: int, lq: int, lk: int, causal: bool) -> None:
        if ("checked", h, causal) in self.made:
            return
        if self.span.dtype != torch.int64 or tuple(self.span.shape) != (h,) or int(self.span.min()) < 1:
            raise InputError(f"span {self.span.dtype} {tuple(self.span.shape)}: int64 {(h,)}, all 1 or more")
        if self.sinks < 0:
            raise InputError(f"sinks={self.sinks}: a number of keys cannot be negative")
        if not causal:
            raise InputError("spans reach back from each row, so the call has to be causal")
        self.made["checked", h, causal] = True

    def allows(self, batch: int, heads: Tensor, rows: Tensor, keys: Tensor, offset: int) -> Tensor:
        """See ``Subset.allows``."""
        gap = (rows + offset)[:, None] - keys
        return (gap >= 0) & ((gap < self.span[heads, None, None]) | (keys < self.sinks))


Pattern = Subset | Blocks | Spans
