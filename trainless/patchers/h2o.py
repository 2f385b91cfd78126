"""H2O: keep the cache entries that received most attention, and the most recent ones.

What     c_j = sum over rows i and the heads of a group of A_ij, kept up at prefill and at every decode step; of a
         prompt an estimate of that sum, from a sample of its rows. After each call a layer keeps, per key/value
         head, the last ``recent`` tokens and the ``heavy`` others with the largest c.
Source   "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
         algorithm 1; budgets 0.1 + 0.1 of the prompt from its code.
Seams    kv (evict, scored by column mass); position when rolled.
Exact    bitwise the identity while heavy + recent cover the sequence.
Costs    the sampled rows against the keys at prefill: 128 rows and a 32nd of the others. With scores="full" all rows,
         a second pass over queries and keys, 1.27 to 1.37 of a stock prefill of 4k to 6k tokens. O(L) memory; see
         benchmarks/results.
Differs  The paper adds up every row of the prompt: scores="full". With "sampled" the first 128 rows of a prompt or a
         turn count once each, and of the rows after them the last of every 32 counts 32 times, so that sums of up to
         128 tokens are the paper's and longer ones an estimate of them; generated tokens all count.
         The paper has no grouped-query attention: scores are summed over a group's query heads (gqa=).
         Scores are plain sums, so old tokens, which more rows see, are favoured, as in the paper;
         normalise=True divides by the rows that saw a key. Sequences are scored by the rows of every
         call, several turns included.
         budgets="adaptive" and "pyramid" (see ``Budgets``) are of other papers, which choose once by the end of a
         prompt; here heads go on by h2o's rule within what they got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..seams import Budget, Contribution, Evict, RowSample, Site, check_budget, check_ratio
from ._eviction import budgets_of, budgets_option, check_budgets, evicting, protect_option, ratio_option
from .base import Method, option, register


@register
@dataclass(frozen=True)
class H2O(Method):
    """Keep ``heavy`` most attended and ``recent`` last tokens per key/value head.

    Budgets: an int is tokens, a float in (0, 1] a fraction of the row's own prompt, pads not counted,
    frozen at its first prefill. ``ratio`` in their place is the share of the prompt that stays, half of it by
    either rule. Raises InputError when nothing at all would be kept.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "keep the cache entries that received most attention, and recent ones"
    source: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"recent": 1 << 30, "ratio": None}
    instead: ClassVar[dict[str, tuple[str, ...]]] = {"ratio": ("heavy", "recent")}
    evicts: ClassVar[bool] = True

    heavy: Budget = option(0.1, help="most attended tokens to keep", origin="published")
    recent: Budget = option(0.1, help="last tokens to keep", origin="published")
    scores: Literal["sampled", "full"] = option(
        "sampled",
        help='rows of a prompt that are added up: "sampled": 128, and each 32nd after them; "full": all',
        origin="ours",
    )
    gqa: Literal["sum", "first", "max", "mean"] = option(
        "sum", help="how the query heads of a group share one score", origin="ours"
    )
    normalise: bool = option(
        False, help="divide scores by the rows that could see the key", origin="published"
    )
    positions: Literal["real", "rolled"] = option(
        "real",
        help='"real": keys keep their positions; "rolled": kept tokens look contiguous',
        origin="published",
    )
    ratio: float | None = ratio_option()
    protect: Literal["none", "prompt"] = protect_option()
    budgets: Literal["uniform", "adaptive", "pyramid"] = budgets_option()

    def check(self) -> None:
        check_ratio(self.ratio)
        check_budget("heavy", self.heavy)
        check_budget("recent", self.recent)
        if self.heavy == 0 and self.recent == 0:
            raise InputError("heavy=0 and recent=0 keep nothing; keep at least one token")
        check_budgets(
            self.budgets,
            protect=(self.protect, "none", "what is protected is the same in every head"),
            positions=(self.positions, "real", "keys are turned alike in every head"),
        )
        if self.budgets == "adaptive" and self.heavy == 0 and self.ratio is None:
            raise InputError(
                'budgets="adaptive" with heavy=0: no token is scored, so heads have nothing to share'
            )

    def contribute(self, site: Site) -> Sequence[Contribution]:
        recent, heavy, ratio = self.recent, self.heavy, self.ratio
        if ratio is not None:
            recent, heavy = ratio / 2, 0
        scored = ratio is not None or heavy != 0
        sample = RowSample() if scored and self.scores == "sampled" else None
        rule = Evict(
            recent=recent, heavy=heavy, capacity=ratio, score="column_mass" if scored else None, gqa=self.gqa,
            sample=sample, normalise=self.normalise, rolled=self.positions == "rolled", protect=self.protect == "prompt",
            budgets=budgets_of(self.budgets, site),
        )  # fmt: skip
        return evicting(rule, site, ratio)
