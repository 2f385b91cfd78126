"""KV quantisation: hold the cache at a few bits per number, the newest tokens as they are.

What     Tokens older than the last ``residual`` are packed in groups of ``group``, each once: keys per
         channel over the group, values per token after division of each channel by a_c = sqrt(max_t |V_tc|);
         both asymmetric, x = code·step + min. Attention reads the codes where they lie: K's parameters are
         folded into the query, V's into the probabilities.
Source   "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (keys per channel, values per token,
         a residual of recent tokens); channel-separable values from "ZipCache".
Seams    kv (quantise).
Exact    bitwise the identity with k_bits = v_bits = 16, and until residual + group tokens are held.
Costs    bits / 16 of the bytes of a 16-bit cache, and 2 · (1 / group + 1 / head width) numbers of
         parameters per number held, one more per group for values; positions, 4 bytes per token and head
         after a prompt. Steps of one token run on buffers of fixed size, without positions: as large as a
         static cache was made for; in a dynamic one they grow by 32 tokens that wait, up to residual +
         group, and by the group that is due, or a sixteenth of those there are. They compile whole;
         beside an evictor in a static cache only, where the codes of evicted tokens keep their room. A
         decode step reads the codes only, which on a CPU is faster than stock from some thousand tokens
         on; without the extra ``numba`` only in layers with many or wide key heads. The GPU form has not
         been timed; see benchmarks/results.
Differs  Never packs a token twice and never unpacks the cache as a whole. The residual holds between
         ``residual`` and residual + group - 1 tokens, so groups are always full. A prompt is attended to in
         full precision; a later turn meets what is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import InputError
from ..seams import Budget, Cache, Contribution, Quantise, Site, check_bits, check_budget
from ._packing import width_refusal
from .base import Method, option, register


@register
@dataclass(frozen=True)
class KVQuant(Method):
    """Pack keys to ``k_bits`` and values to ``v_bits``, all but the newest ``residual`` tokens.

    A residual in (0, 1] is a fraction of the row's own prompt. Raises InputError for widths that codes do not
    have, and for an empty group or a residual that is no number of tokens.
    """

    name: ClassVar[str] = "kvquant"
    summary: ClassVar[str] = "hold the cache at a few bits per number"
    source: ClassVar[str] = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"k_bits": 16, "v_bits": 16}
    packs: ClassVar[bool] = True

    k_bits: int = option(4, help="bits per number of a key: 2, 4, 8 or 16 (as it is)", origin="ours")
    v_bits: int = option(4, help="bits per number of a value: 2, 4, 8 or 16 (as it is)", origin="ours")
    group: int = option(
        64,
        help="tokens that share the parameters of a key channel; with few, parameters outweigh codes",
        origin="ours",
    )
    residual: Budget = option(128, help="newest tokens that stay as they are", origin="published")

    def check(self) -> None:
        check_bits("k_bits", self.k_bits)
        check_bits("v_bits", self.v_bits)
        if self.group < 1:
            raise InputError(f"group={self.group}: at least one token shares the parameters of a channel")
        check_budget("residual", self.residual)

    def _rule(self) -> Quantise:
        bits = (self.k_bits, self.k_bits), (self.v_bits, self.v_bits)
        return Quantise(*bits, group=self.group, residual=self.residual, interval=self.group)

    def refuses(self, site: Site) -> str | None:
        return width_refusal(self._rule(), site)

    def contribute(self, site: Site) -> Sequence[Contribution]:
        rule = self._rule()
        limit = site.facts.get("max_positions")
        fixed = self.residual if isinstance(self.residual, int) else 0
        never = limit is not None and limit < fixed + self.group
        return [Cache(rule, inert=rule.exact or never)]
