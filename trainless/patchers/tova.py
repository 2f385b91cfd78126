"""TOVA: keep the cache entries that the newest token attends to.

What     s_j = mean over the heads of the layer of A_ij, i the last row of the call: the newest token. After
         each call the ``capacity`` tokens with the largest s stay, the same ones for every head.
Source   "Transformers are Multi-State RNNs", the policy TOVA (token omission via attention).
Seams    kv (evict, scored by the column mass of the last row, which replaces the scores of earlier calls).
Exact    bitwise the identity while capacity covers the sequence.
Costs    one row of queries against the keys per call, over the budget; the rest is the stock kernel at prefill.
         What it evicts at one step is chosen by one row, so a token that matters again later may be gone.
Differs  A prompt is attended to densely and then compressed once by its last row; the paper's policy drops one
         token a step from the beginning. The newest token always stays, where the paper lets it compete.
         shared=False gives every key/value head its own set, by the mean over its query heads; the paper
         averages over all heads of a layer, as here by default.
         budgets="adaptive" and "pyramid" (see ``Budgets``) are of other papers, which choose once by the end of a
         prompt; here heads go on by this rule within what they got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..seams import Budget, Contribution, Evict, Site, check_budget, check_ratio
from ._eviction import budgets_of, budgets_option, check_budgets, evicting, protect_option, ratio_option
from .base import Method, option, register


@register
@dataclass(frozen=True)
class Tova(Method):
    """Keep the ``capacity`` tokens that the newest one attends to most.

    capacity: an int is tokens, a float in (0, 1] a fraction of the row's own prompt, pads not counted, frozen
    at its first prefill; ``ratio`` is that fraction by another name. Raises InputError when nothing at all would be kept.
    """

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "keep the cache entries that the newest token attends to most"
    source: ClassVar[str] = "Transformers are Multi-State RNNs (TOVA)"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"capacity": 1 << 30, "ratio": None}
    instead: ClassVar[dict[str, tuple[str, ...]]] = {"ratio": ("capacity",)}
    evicts: ClassVar[bool] = True

    capacity: Budget = option(0.5, help="tokens to keep, in all", origin="ours")
    shared: bool = option(
        True, help="one kept set per layer, scored by the mean over its heads", origin="published"
    )

    ratio: float | None = ratio_option()
    protect: Literal["none", "prompt"] = protect_option()
    budgets: Literal["uniform", "adaptive", "pyramid"] = budgets_option()

    def check(self) -> None:
        check_ratio(self.ratio)
        check_budget("capacity", self.capacity)
        if self.capacity == 0:
            raise InputError("capacity=0 keeps nothing; keep at least one token")
        check_budgets(
            self.budgets, protect=(self.protect, "none", "what is protected is the same in every head")
        )
        if self.budgets == "adaptive" and self.shared:
            raise InputError(
                'budgets="adaptive" with shared=True: heads that keep the same tokens have nothing to share; use '
                "shared=False"
            )

    def contribute(self, site: Site) -> Sequence[Contribution]:
        rule = Evict(
            capacity=self.capacity if self.ratio is None else self.ratio, score="probe_mass", last=1, gqa="mean",
            shared=self.shared, protect=self.protect == "prompt",
            budgets=budgets_of(self.budgets, site),
        )  # fmt: skip
        return evicting(rule, site, self.ratio)
