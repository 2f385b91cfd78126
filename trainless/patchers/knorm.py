"""Key norms: compress the prompt once, keeping the tokens whose keys have the smallest norm.

What     s_j = -|k_j|, the Euclidean norm of a token's key, for each key/value head. After the first prefill the tokens
         with the largest s stay; nothing goes after that: generated tokens and later turns all stay.
Source   "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (Devoto et al., arXiv 2406.11430).
Seams    kv (evict once, scored by the layer from its own keys).
Exact    bitwise the identity while capacity covers the prompt.
Costs    no attention statistics: the stock kernel runs at the prefill, and one pass over the keys follows it. The
         cache then grows by one per token. The choice knows no question, so a later one meets the same tokens.
Differs  The first ``sinks`` and the last ``recent`` tokens stay, the newest one in any case; where the capacity
         is a fraction, as by default, each of the two is at most half of it. Scores are float32, ties go to the newer
         token; pads have no part. The paper leaves its first two layers
         whole; here every layer is compressed, and ``where`` names others. Families that normalise their keys (Qwen 3,
         Gemma 3, OLMo 2) have norms that say little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..seams import Budget, Contribution, Site, check_ratio
from ._eviction import by_keys, check_by_keys, evicting, no_keys, ratio_option
from .base import Method, option, register


@register
@dataclass(frozen=True)
class Knorm(Method):
    """Keep ``capacity`` tokens of the prompt: ``sinks``, ``recent``, and the tokens whose keys have the smallest norm.

    capacity: an int is tokens, a float in (0, 1] a fraction of the row's own prompt, pads not counted; ``ratio`` is
    that fraction by another name. There is no ``protect``: only the prompt is compressed. Raises InputError for a
    capacity in tokens that does not hold sinks and recent. Refused where a cache holds latents and not keys.
    """

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "compress the prompt once, keeping the tokens whose keys have the smallest norm"
    source: ClassVar[str] = (
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430)"
    )
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"capacity": 1 << 30, "ratio": None}
    instead: ClassVar[dict[str, tuple[str, ...]]] = {"ratio": ("capacity",)}
    evicts: ClassVar[bool] = True

    capacity: Budget = option(
        0.5, help="tokens of the prompt to keep, sinks and recent included", origin="ours"
    )
    sinks: int = option(4, help="first tokens of the prompt that always stay", origin="ours", low=0)
    recent: int = option(32, help="last tokens of the prompt that always stay", origin="ours", low=0)
    ratio: float | None = ratio_option()

    def check(self) -> None:
        check_ratio(self.ratio)
        check_by_keys(self.capacity, self.sinks, self.recent)

    def refuses(self, site: Site) -> str | None:
        return no_keys(site)

    def contribute(self, site: Site) -> Sequence[Contribution]:
        capacity = self.capacity if self.ratio is None else self.ratio
        return evicting(by_keys("key_norm", capacity, self.sinks, self.recent), site, self.ratio)
