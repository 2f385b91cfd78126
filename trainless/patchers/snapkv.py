"""SnapKV: compress the prompt once, keeping what its last tokens look at.

What     c_j = sum over the last ``window`` rows i of the prompt of A_ij, for the tokens j before the window;
         the mean over the query heads of a key/value head; pooled over ``pool`` neighbours. After the first
         prefill each key/value head keeps the ``capacity`` - ``window`` largest and the window. Nothing is
         evicted after that: generated tokens and later turns all stay.
Source   "SnapKV: LLM Knows What You are Looking for Before Generation" and its code, FasterDecoding/SnapKV.
Seams    kv (evict once, scored by the column mass of the window's rows).
Exact    bitwise the identity while capacity covers the prompt.
Costs    the window's rows against the keys once, after the stock prefill; the cache then grows by one per token.
         The choice is made by the end of the prompt: the question has to stand there. A question asked in a
         later turn meets what an earlier one thought worth keeping.
Differs  The code repeats keys over the query heads before caching them, so its cache grows with the group; here
         a group shares the mean of its scores and one kept set. Kept tokens stay in the order of the text, where
         the code orders them by score. Where the capacity is a fraction, as by default, the window is at most half
         of it, and a shorter window both chooses and stays; a number of tokens below the window is refused.
         The code keeps 2048 tokens, so that it leaves ordinary prompts alone; half of the prompt here.
         budgets="adaptive": the heads of a layer share their budgets (see ``Budgets``); "pyramid": by depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..seams import Budget, Contribution, Evict, Site, check_budget, check_ratio
from ._eviction import budgets_of, budgets_option, evicting, ratio_option
from .base import Method, option, register


@register
@dataclass(frozen=True)
class SnapKV(Method):
    """Keep ``capacity`` tokens of the prompt: the last ``window``, and those that they attend to most.

    capacity: an int is tokens, a float in (0, 1] a fraction of the row's own prompt, pads not counted; ``ratio`` is
    that fraction by another name. There is no ``protect``: only the prompt is compressed.
    pool: how many neighbours share a score, odd; 1 for none. Raises InputError for a capacity in tokens that
    does not hold the window.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "compress the prompt once, keeping what its last tokens attend to"
    source: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"capacity": 1 << 30, "ratio": None}
    instead: ClassVar[dict[str, tuple[str, ...]]] = {"ratio": ("capacity",)}
    evicts: ClassVar[bool] = True

    capacity: Budget = option(0.5, help="tokens of the prompt to keep, the window included", origin="ours")
    window: int = option(32, help="last rows of the prompt that choose; they stay", origin="published", low=1)
    pool: int = option(5, help="neighbours that share a score; odd, 1 for none", origin="published", low=1)
    pooling: Literal["avg", "max"] = option("avg", help="how neighbours share a score", origin="published")
    ratio: float | None = ratio_option()
    budgets: Literal["uniform", "adaptive", "pyramid"] = budgets_option()

    def check(self) -> None:
        check_ratio(self.ratio)
        check_budget("capacity", self.capacity)
        if self.pool % 2 == 0:
            raise InputError(f"pool={self.pool}: an odd number has a middle; use {self.pool + 1}")
        if isinstance(self.capacity, int) and self.capacity < self.window:
            raise InputError(
                f"capacity={self.capacity} is less than the window={self.window} that always stays; "
                "raise capacity or shorten the window"
            )

    def contribute(self, site: Site) -> Sequence[Contribution]:
        capacity = self.capacity if self.ratio is None else self.ratio
        rule = Evict(
            recent=self.window, capacity=capacity, score="probe_mass", last=self.window, gqa="mean",
            pool=self.pool, pooling=self.pooling, once=True,
            budgets=budgets_of(self.budgets, site),
        )  # fmt: skip
        return evicting(rule, site, self.ratio)
