"""Random: keep tokens drawn by lot, the honest baseline that every other rule has to beat.

What     Every token of a row has a number in [0, 1), drawn for its layer, key/value head and place in the row. After
         each call the ``capacity`` tokens with the largest numbers stay.
Source   ours: a control. Other projects have one of the same name.
Seams    kv (evict).
Exact    bitwise the identity with ratio=1, and while capacity covers the sequence.
Costs    no scores; memory and decode time stop growing. What it drops is chosen without looking.
Differs  The draw belongs to the token: a row keeps the same tokens alone and in a padded batch, and what stays is at
         any time a fair sample of all that came. The newest token always stays.
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
class Random(Method):
    """Keep ``capacity`` tokens drawn by lot.

    capacity: an int is tokens, a float in (0, 1] a fraction of the row's own prompt, pads not counted, frozen
    at its first prefill; ``ratio`` is that fraction by another name. Raises InputError when nothing would be kept.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "keep cache entries drawn by lot, as a baseline"
    source: ClassVar[str] = "ours: the control for every other rule"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"ratio": 1.0}
    instead: ClassVar[dict[str, tuple[str, ...]]] = {"ratio": ("capacity",)}
    evicts: ClassVar[bool] = True

    capacity: Budget = option(0.5, help="tokens to keep, in all", origin="ours")
    ratio: float | None = ratio_option()
    seed: int = option(0, help="seed of the draw", origin="ours", low=0, high=2**63 - 1)
    protect: Literal["none", "prompt"] = protect_option()

    def check(self) -> None:
        check_ratio(self.ratio)
        check_budget("capacity", self.capacity)
        if self.capacity == 0:
            raise InputError("capacity=0 keeps nothing; keep at least one token")

    def contribute(self, site: Site) -> Sequence[Contribution]:
        rule = Evict(
            capacity=self.capacity if self.ratio is None else self.ratio, seed=(self.seed << 16) + site.layer,
            protect=self.protect == "prompt",
        )  # fmt: skip
        return evicting(rule, site, self.ratio)
