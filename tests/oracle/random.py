"""Random: tokens drawn by lot."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .core import Call
from .evict import Evictor, tokens

MASK = (1 << 64) - 1


def drawn(seed: int, layer: int, head: int, position: int) -> float:
    """The number of a token, written out in whole numbers without a sign."""
    x = (seed << 16) + layer
    x = (x * 0x9E3779B97F4A7C15 + head * 0xC2B2AE3D27D4EB4F + position * 0x165667B19E3779F9) & MASK
    for _ in range(2):
        x ^= x >> 32
        x = (x * 0xD6E8FEB86659FD93) & MASK
    x ^= x >> 32
    return (x >> 11) / (1 << 53)


class Random(Evictor):
    """After every call the ``capacity`` tokens with the largest numbers stay, the newest among them."""

    def __init__(
        self,
        capacity: int | float = 0.5,
        seed: int = 0,
        layers: Collection[int] | None = None,
        part: str | None = None,
    ) -> None:
        super().__init__("real", layers, part)
        self.capacity, self.seed = capacity, seed

    def scores(self, call: Call, p: Tensor) -> Tensor:
        batch, hkv, lk, _ = call.key.shape
        score = torch.zeros(batch, hkv, lk, dtype=torch.float64)
        for row in range(batch):
            for number, column in enumerate(call.real_keys[row].nonzero().flatten().tolist()):
                for head in range(hkv):
                    score[row, head, column] = drawn(self.seed, call.site.layer, head, number)
        return score

    def parts(self, length: int) -> tuple[int, int, int]:
        return max(1, tokens(self.capacity if self.ratio is None else self.ratio, length)), 0, 1

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        return self._choose_shared(call, row, head, candidates, score)
