"""ZipCache: hold the tokens that matter at more bits than the others, told apart by a few probe rows.

What     s_j = (sum over probe rows i and the heads of a group of A_ij) / n_j, with n_j the probe rows that see
         token j. Per key/value head the ``salient`` share of a chunk with the largest s_j is packed to bits[0],
         the rest to bits[1]. Keys per channel over every ``group`` tokens of a tier; values per token after division of
         each channel by a_c = sqrt(max_t |V_tc|) over the chunk; x = code·step + min. The prompt is one chunk,
         every ``interval`` later tokens another, scored by the newest row alone.
Source   "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification" and its code:
         4 and 2 bits, 40 % regular tokens, 5 % last and 5 % random rows, interval 100.
Seams    kv (quantise, two tiers); statistics over chosen rows.
Exact    bitwise the identity with bits=(16, 16).
Costs    the probe rows against all keys at prefill, one row per chunk later; bytes are those of the codes, two
         numbers per channel and one divisor for each group of each tier of each chunk, two per token and head;
         positions, 4 bytes per token and head. A decode step reads the codes only, on buffers of fixed size that
         compile whole (not beside an evictor, nor where a tier of ``interval`` tokens has more than a group); the
         GPU form has not been timed; see benchmarks/results.
Differs  The code gives a channel of the keys one minimum and one step for a whole prompt, however long: group=0. Two
         bits then span everything that the channel did over thousands of tokens. Here ``group`` tokens of a tier share
         them, as in KIVI, in the order of the text; the last group of a tier may be smaller.
         Chunks are appended and never packed again; the code packs everything anew every 100 tokens. Its
         normalisation divides by all later rows although a tenth of them were looked at, which favours recent
         tokens up to tenfold: normalise="published" does that. Values have their parameters per token and
         head; the code shares them between heads whose sets differ. Padding is left out. The salient share is
         rounded down. Random rows are drawn with replacement, as in the code, from a seed, and depend on the
         length of the row's own prompt only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..seams import (
    AttentionCall,
    Budget,
    Cache,
    Contribution,
    Quantise,
    Site,
    State,
    Statistics,
    check_budget,
    tokens_of,
)
from ._packing import best_share, check_tiers, width_refusal
from .base import Method, option, register

PROBE_MASS = frozenset({"probe_mass"})


@register
@dataclass(frozen=True)
class ZipCache(Method):
    """Pack ``salient`` tokens to bits[0] and the others to bits[1].

    salient: a share of each chunk in (0, 1], or a number of tokens. probes: (last, random) rows of the prompt,
    each a fraction of it or a number of rows. Raises InputError for widths that codes do not have and for numbers
    that are no budgets.
    """

    name: ClassVar[str] = "zipcache"
    summary: ClassVar[str] = "hold salient tokens at more bits than the others"
    source: ClassVar[str] = "ZipCache: KV Cache Quantization with Salient Token Identification"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"bits": (16, 16)}
    packs: ClassVar[bool] = True

    salient: Budget = option(0.6, help="tokens of a chunk that are held precisely", origin="published")
    bits: tuple[int, int] = option(
        (4, 2), help="bits per number of salient and of other tokens", origin="published"
    )
    probes: tuple[Budget, Budget] = option(
        (0.05, 0.05), help="last and random rows of the prompt that choose", origin="published"
    )
    group: int = option(
        64,
        help="tokens of a tier that share the parameters of a key channel; 0: a chunk's tier is one group",
        origin="ours",
        low=0,
    )
    interval: int = option(100, help="new tokens that are packed together", origin="published", low=1)
    normalise: Literal["visible", "published"] = option(
        "visible",
        help='what a token\'s sum is divided by: "visible": the probe rows that see it; "published": all later rows',
        origin="ours",
    )
    seed: int = option(0, help="seed of the random rows", origin="ours", low=0, high=2**63 - 1)

    def check(self) -> None:
        check_budget("salient", self.salient)
        check_tiers(self.bits, "salient")
        for name, rows in zip(("probes: last", "probes: random"), self.probes, strict=True):
            check_budget(name, rows)
        if self.interval < 1:
            raise InputError(f"interval={self.interval}: a chunk has at least one token")

    def _rule(self) -> Quantise:
        return Quantise(
            self.bits,
            self.bits,
            interval=self.interval,
            cut=self.group,
            chosen=True,
            newest=True,
            high=self.salient,
        )

    def refuses(self, site: Site) -> str | None:
        return width_refusal(self._rule(), site)

    def contribute(self, site: Site) -> Sequence[Contribution]:
        rule = self._rule()
        return [
            Cache(
                rule, value=self._salient, needs=self._when_due, probes=self._rows,
                statistics=PROBE_MASS, lookahead=True, inert=rule.exact,
            )
        ]  # fmt: skip

    @staticmethod
    def _when_due(call: AttentionCall, state: State) -> frozenset[str]:
        return PROBE_MASS if getattr(call.layer, "due", False) else frozenset()

    # ------------------------------------------------------------------ which rows look

    def _rows(self, call: AttentionCall, state: State) -> Tensor:
        """Rows that score, (B, P) with -1 for none: of a prompt the probes, later the newest row."""
        device, (b, _, _, lq, _) = call.query.device, call.shape
        if call.real is None:
            rows = self.probed(lq) if call.fresh else torch.tensor([lq - 1])
            return rows.to(device).expand(b, -1)
        found = []
        for real in call.real:
            columns = real.nonzero().flatten()
            rows = self.probed(len(columns)).to(device) if call.fresh else torch.arange(len(columns))[-1:]
            found.append(columns[rows.to(device)])
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)

    def probed(self, length: int) -> Tensor:
        """Probe rows of a prompt of ``length`` tokens: the last ones, at least one, and random earlier ones."""
        last = min(length, max(1, tokens_of(self.probes[0], length)))
        random = tokens_of(self.probes[1], length) if length > last else 0
        drawn = torch.randint(
            max(1, length - last), (random,), generator=torch.Generator().manual_seed(self.seed)
        )
        return torch.cat([drawn, torch.arange(length - last, length)])

    # ------------------------------------------------------------------ which tokens are salient

    def _salient(self, call: AttentionCall, stats: Statistics, state: State) -> Tensor:
        """bool (B, Hkv, W) over the tokens that wait."""
        assert stats.probe_mass is not None and stats.probe_rows is not None
        packing: Tensor = call.layer.packing()
        width, hkv = packing.shape[2], packing.shape[1]
        score = stats.probe_mass[..., -width:].unflatten(1, (hkv, -1)).sum(2)
        if self.normalise == "visible":
            score = score / stats.probe_rows[:, None, -width:].clamp_min(1)
        elif call.fresh:
            real = call.real if call.real is not None else packing[:, 0].new_ones(packing.shape[0], width)
            score = score / real.long().flip(1).cumsum(1).flip(1).clamp_min(1)[:, None]
        counts = packing.sum(2)
        places = [[tokens_of(self.salient, n) for n in row] for row in counts.tolist()]
        return best_share(score, packing, torch.tensor(places, device=score.device))
