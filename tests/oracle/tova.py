"""TOVA: the tokens that the newest token attends to most."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .core import Call
from .evict import Evictor, tokens


class Tova(Evictor):
    """After every call the score of column j is the attention that the call's last real row pays it, and the
    ``capacity`` best columns stay. Nothing is accumulated: earlier rows have no say.

    Settled here where sources differ:
    - The last row is each batch row's own newest real token; a row without a real token in a call keeps
      what it has.
    - shared=True averages over all query heads of the layer, so that all key/value heads keep one set;
      shared=False averages over the query heads of each group.
    - A call of several tokens (prefill or turn) is scored by its last row alone, and evicts once.
    - The newest token takes one of the places, whatever its score; ties go to the newer token. The total
      is max(1, capacity).
    """

    def __init__(
        self,
        capacity: int | float,
        shared: bool = True,
        positions: str = "real",
        layers: Collection[int] | None = None,
        part: str | None = None,
    ) -> None:
        super().__init__(positions, layers, part)
        self.capacity, self.shared = capacity, shared

    def scores(self, call: Call, p: Tensor) -> Tensor:
        batch, hkv = call.key.shape[:2]
        score = torch.zeros(batch, hkv, p.shape[-1], dtype=p.dtype)
        for row in range(batch):
            rows = call.real[row].nonzero().flatten()
            if rows.numel() == 0:
                continue
            last = p[row, :, rows[-1]].unflatten(0, (hkv, call.groups)).mean(dim=1)
            score[row] = last.mean(dim=0) if self.shared else last
        return score

    def parts(self, length: int) -> tuple[int, int, int]:
        return max(1, tokens(self.capacity if self.ratio is None else self.ratio, length)), 0, 1

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        assert score is not None
        total = max(1, tokens(self.capacity, self.length(call, row)))
        return best(candidates, score, total, protected=1)


def best(candidates: list[int], score: Tensor, total: int, protected: int) -> tuple[set[int], float]:
    """The last ``protected`` candidates (ascending) and the best of the others, ``total`` in all, ties to
    the newer; and the margin of the choice."""
    if len(candidates) <= total:
        return set(candidates), float("inf")
    protected = min(protected, total)
    last = candidates[len(candidates) - protected :]
    value = score.tolist()
    rest = sorted(candidates[: len(candidates) - protected], key=lambda j: (value[j], j), reverse=True)
    places = total - protected
    if places == 0:
        return set(last), float("inf")
    worst, refused = value[rest[places - 1]], value[rest[places]]
    return set(last) | set(rest[:places]), (worst - refused) / max(refused, 1e-300)
