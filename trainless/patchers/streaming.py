"""Streaming: keep the first tokens and the last ones, drop what is between.

What     After each call the cache keeps the first ``sinks`` tokens of the row and the last ``recent``.
Source   "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM).
Seams    kv (evict); position when rolled.
Exact    the identity while sinks + recent cover the sequence.
Costs    no scores; memory and decode time stop growing.
Differs  The paper evicts before new tokens arrive; here a call first attends over all it holds and its own
         tokens, and evicts afterwards, so one prefill sees the whole prompt. "rolled" gives the paper's
         positions (kept tokens look contiguous); "real" leaves keys at their own positions. Rolled keys are
         turned by the distance they moved, which is exact while frequencies do not depend on length.
         It does not extend what the model can see: what is dropped is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..seams import Budget, Contribution, Evict, Site, check_budget, check_ratio
from ._eviction import evicting, protect_option, ratio_option
from .base import Method, option, register


@register
@dataclass(frozen=True)
class Streaming(Method):
    """Keep ``sinks`` first and ``recent`` last tokens per row.

    Budgets: an int is tokens, a float in (0, 1] a fraction of the row's own prompt, frozen at its first
    prefill. ``ratio`` in their place is the share of the prompt that stays: four sinks, or half of it where that
    is less, and the last tokens. Raises InputError when nothing at all would be kept.
    """

    name: ClassVar[str] = "streaming"
    summary: ClassVar[str] = "keep the first few and the last many cache entries"
    source: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks (StreamingLLM)"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"recent": 1 << 30, "ratio": None}
    instead: ClassVar[dict[str, tuple[str, ...]]] = {"ratio": ("sinks", "recent")}
    evicts: ClassVar[bool] = True

    sinks: Budget = option(4, help="first tokens to keep", origin="published")
    recent: Budget = option(0.5, help="last tokens to keep", origin="ours")
    positions: Literal["real", "rolled"] = option(
        "real", help='"real": keys keep their positions; "rolled": kept tokens look contiguous', origin="ours"
    )

    ratio: float | None = ratio_option()
    protect: Literal["none", "prompt"] = protect_option()

    def check(self) -> None:
        check_ratio(self.ratio)
        check_budget("sinks", self.sinks)
        check_budget("recent", self.recent)
        if self.sinks == 0 and self.recent == 0:
            raise InputError("sinks=0 and recent=0 keep nothing; keep at least one token")

    def contribute(self, site: Site) -> Sequence[Contribution]:
        rule = Evict(
            sinks=self.sinks, recent=self.recent if self.ratio is None else 0, capacity=self.ratio,
            rolled=self.positions == "rolled", protect=self.protect == "prompt",
        )  # fmt: skip
        return evicting(rule, site, self.ratio)
