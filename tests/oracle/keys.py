"""Rules on the keys alone: KeyDiff, and small key norms."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import Call
from .evict import Evictor, tokens


class ByKeys(Evictor):
    """At the end of the first call, per batch row and key/value head: the ``capacity`` best of the row's real tokens
    stay, the first ``sinks`` and last ``recent`` among them. Nothing is evicted after that.

    A float ``capacity`` is that fraction of the row's own prompt, and sinks and recent are at most half of it each.
    Ties go to the newer token; the newest always stays. Keys are those that attention meets, after rotation.
    """

    def __init__(self, capacity: int | float = 0.5, sinks: int = 4, recent: int = 32) -> None:
        super().__init__()
        self.capacity, self.sinks, self.recent = capacity, sinks, recent

    def worth(self, keys: Tensor) -> Tensor:
        """(n,) of the row's keys (n, D)."""
        raise NotImplementedError

    def scores(self, call: Call, p: Tensor) -> Tensor | None:
        if call.past:
            return None
        batch, hkv = call.key.shape[:2]
        score = torch.zeros(batch, hkv, p.shape[-1], dtype=torch.float64)
        for row in range(batch):
            there = call.real[row].nonzero().flatten()
            for head in range(hkv):
                score[row, head, there] = self.worth(call.key[row, head, there].double())
        return score

    def parts(self, length: int) -> tuple[int, int, int]:
        capacity = self.capacity if self.ratio is None else self.ratio
        total = max(1, tokens(capacity, length))
        half = total // 2 if isinstance(capacity, float) else length
        return total, min(self.sinks, half), min(self.recent, half)

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        if score is None:
            return set(candidates), float("inf")
        return self._choose_shared(call, row, head, candidates, score)


class KeyDiff(ByKeys):
    """Minus the cosine of a key with the mean of all keys, each of length one."""

    def worth(self, keys: Tensor) -> Tensor:
        unit = keys / keys.norm(dim=1, keepdim=True)
        mean = unit.mean(0)
        return -(unit @ mean) / mean.norm()


class Knorm(ByKeys):
    """Minus the Euclidean norm of a key."""

    def worth(self, keys: Tensor) -> Tensor:
        return -keys.norm(dim=1)
