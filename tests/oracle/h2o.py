"""H2O: the tokens that gathered most attention so far, and the last ones."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .core import Call
from .evict import Evictor, tokens


class H2O(Evictor):
    """Score c_j = Σ_i A_ij over every real row i since the sequence began (prefill, decode steps and
    later turns), per query head, as long as j is kept; heads of a group share one score by
    ``gqa``: sum, first, max or mean of the accumulated scores. After every call keep the last ``recent``
    tokens and the ``heavy`` best of the rest.

    Settled here where sources differ:
    - A step's row counts before that step evicts; a newly arrived token starts with its own attention.
    - Ties go to the newer token. The newest token is always kept: with recent=0 it takes one of the
      heavy places. The total is max(1, heavy + recent).
    - normalise=True divides c_j by the number of real rows that could see j (under the model's own mask).
    - sample=(whole, every): of a call's real rows the first ``whole`` add once each; from there on only every
      ``every``-th adds, so many times; None: all once. Chunks of one prefill are one call here.
    - gqa="max" reduces accumulated scores, so that it does not matter how rows were cut into calls.
      ``reduce="call"`` takes the maximum of each call's column sums and adds those up instead.
    """

    def __init__(
        self,
        heavy: int | float = 0.1,
        recent: int | float = 0.1,
        gqa: str = "sum",
        normalise: bool = False,
        positions: str = "real",
        layers: Collection[int] | None = None,
        part: str | None = None,
        reduce: str = "selection",
        sample: tuple[int, int] | None = (128, 32),
    ) -> None:
        super().__init__(positions, layers, part)
        self.sample = sample
        self.heavy, self.recent, self.gqa, self.normalise, self.reduce = heavy, recent, gqa, normalise, reduce

    def scores(self, call: Call, p: Tensor) -> Tensor:
        state = self.state(call)
        rows = call.real[:, None, :, None]
        mass = (p * rows * self.times(call)[:, None, :, None]).sum(dim=2)
        if self.reduce == "call":
            mass = self._share(mass, call)
        count = (call.visible & rows).sum(dim=2)[:, :: call.groups]
        if call.past:
            lq = call.query.shape[2]
            mass = mass + torch.nn.functional.pad(state["mass"], (0, lq))
            count = count + torch.nn.functional.pad(state["count"], (0, lq))
        state["mass"], state["count"] = mass, count
        score = mass if self.reduce == "call" else self._share(mass, call)
        return score / count.clamp_min(1) if self.normalise else score

    def times(self, call: Call) -> Tensor:
        """How often each row adds, (B, Lq)."""
        found = call.real.long()
        if self.sample is None:
            return found
        whole, every = self.sample
        for row in range(found.shape[0]):
            for number, i in enumerate(call.real[row].nonzero().flatten().tolist()):
                if number >= whole:
                    found[row, i] = every if (number - whole + 1) % every == 0 else 0
        return found

    def _share(self, mass: Tensor, call: Call) -> Tensor:
        grouped = mass.unflatten(1, (call.key.shape[1], call.groups))
        if self.gqa == "first":
            return grouped[:, :, 0]
        if self.gqa == "max":
            return grouped.amax(dim=2)
        return grouped.sum(dim=2) if self.gqa == "sum" else grouped.mean(dim=2)

    def parts(self, length: int) -> tuple[int, int, int]:
        """Half of a share by either rule."""
        if self.ratio is not None:
            total = max(1, tokens(self.ratio, length))
            return total, 0, total // 2
        recent = tokens(self.recent, length)
        return max(1, recent + tokens(self.heavy, length)), 0, recent

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        assert score is not None
        length = self.length(call, row)
        recent, heavy = tokens(self.recent, length), tokens(self.heavy, length)
        total, last = max(1, recent + heavy), max(1, recent)
        if len(candidates) <= total:
            return set(candidates), float("inf")
        value = score.tolist()
        rest = sorted(candidates[:-last], key=lambda j: (value[j], j), reverse=True)
        places = total - last
        if places == 0:
            return set(candidates[-last:]), float("inf")
        worst, best = value[rest[places - 1]], value[rest[places]]
        return set(candidates[-last:]) | set(rest[:places]), (worst - best) / max(best, 1e-300)
