"""StreamingLLM: the first tokens and the last ones."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from .core import Call
from .evict import Evictor, tokens


class Streaming(Evictor):
    """Keep the first ``sinks`` real tokens and the last ``recent`` ones; no scores.

    The published code evicts before new tokens arrive; here, as the contract has it, a call meets all
    that is kept plus its own tokens, and eviction follows. The total is max(1, sinks + recent): with
    recent=0 the newest token takes one place.
    """

    def __init__(
        self,
        recent: int | float,
        sinks: int | float = 4,
        positions: str = "real",
        layers: Collection[int] | None = None,
        part: str | None = None,
    ) -> None:
        super().__init__(positions, layers, part)
        self.recent, self.sinks = recent, sinks

    def parts(self, length: int) -> tuple[int, int, int]:
        """Four sinks, or half of a share where that is less."""
        if self.ratio is None:
            recent = tokens(self.recent, length)
            return max(1, recent), 0, recent
        total = max(1, tokens(self.ratio, length))
        return total, min(4, total // 2), 1

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        length = self.length(call, row)
        recent, sinks = tokens(self.recent, length), tokens(self.sinks, length)
        total, last = max(1, recent + sinks), max(1, recent)
        if len(candidates) <= total:
            return set(candidates), float("inf")
        return set(candidates[-last:]) | set(candidates[: total - last]), float("inf")
