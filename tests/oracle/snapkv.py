"""SnapKV: what the end of the prompt looks at, chosen once."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .core import Call
from .evict import Evictor, tokens
from .tova import best


class SnapKV(Evictor):
    """At the end of the first call, per batch row and key/value head: the attention of the row's last
    ``window`` real tokens is summed per column, over the columns before the window; averaged over the query
    heads of the group; pooled along the columns; the best ``capacity - window`` columns and the window stay.
    Nothing is evicted after that: generated tokens and later turns all stay.

    Settled here where sources differ:
    - Pooling runs over the row's own real columns before the window, in their order, kernel ``pool`` (odd),
      stride 1, zeros beyond both ends; an average divides by ``pool`` at the ends too.
    - Heads are averaged first and pooled afterwards (``pool_first=True``: the other way round, which is
      the same for "avg" and not for "max").
    - Ties go to the newer column. A row whose budget is below the window keeps its last tokens.
    - A float ``capacity`` or ``window`` is that fraction of the row's own prompt. Under a float ``capacity`` the
      window is at most half of it (at least one token), for choosing and for staying.
    """

    def __init__(
        self,
        capacity: int | float,
        window: int | float = 32,
        pool: int = 5,
        pooling: str = "avg",
        positions: str = "real",
        layers: Collection[int] | None = None,
        part: str | None = None,
        pool_first: bool = False,
    ) -> None:
        super().__init__(positions, layers, part)
        if pool % 2 == 0:
            raise ValueError("a centred pool has an odd kernel")
        self.capacity, self.window, self.pool, self.pooling = capacity, window, pool, pooling
        self.pool_first = pool_first

    def window_of(self, length: int) -> int:
        window = max(1, tokens(self.window, length))
        if isinstance(self.capacity, float):
            window = min(window, max(1, max(1, tokens(self.capacity, length)) // 2))
        return window

    def scores(self, call: Call, p: Tensor) -> Tensor | None:
        if call.past:
            return None
        batch, hkv = call.key.shape[:2]
        score = torch.zeros(batch, hkv, p.shape[-1], dtype=p.dtype)
        for row in range(batch):
            rows = call.real[row].nonzero().flatten()
            window = min(self.window_of(len(rows)), len(rows))
            before = rows[: len(rows) - window]  # columns; in the first call they are the rows
            if before.numel() == 0:
                continue
            heads = p[row][:, rows[len(rows) - window :]][:, :, before].sum(dim=1)
            if self.pool_first:
                heads = self._pooled(heads)
            mean = heads.unflatten(0, (hkv, call.groups)).mean(dim=1)
            score[row][:, before] = mean if self.pool_first else self._pooled(mean)
        return score

    def _pooled(self, c: Tensor) -> Tensor:
        half = self.pool // 2
        around = torch.nn.functional.pad(c, (half, half)).unfold(-1, self.pool, 1)
        return around.amax(dim=-1) if self.pooling == "max" else around.sum(dim=-1) / self.pool

    once = True

    def parts(self, length: int) -> tuple[int, int, int]:
        return max(1, tokens(self.capacity, length)), 0, self.window_of(length)

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        if score is None:
            return set(candidates), float("inf")
        length = self.length(call, row)
        total = max(1, tokens(self.capacity, length))
        return best(candidates, score, total, self.window_of(length))
