"""ZipVL: as few tokens as a layer's attention needs take part in its prefill; the others get few bits, or go.

What     a_j = sum over probe rows i and all heads of A_ij; n_j probe rows see token j. p is the fewest tokens whose
         largest a_j make up ``tau`` of the whole sum; T holds the p tokens with the largest a_j / n_j, and the
         probe rows at the end. One T per layer. At prefill the queries of T attend to the keys of T, and every
         other token gets nothing from this layer's attention: its residual stream passes by. Then the cache holds T
         at bits[0] and the others at bits[1] ("quantise"), or T alone ("discard"). Later tokens attend to all that
         is held; whenever ``interval`` of them have come, the newest row scores that chunk in the same way.
Source   "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache
         Compression"; no code of its authors was found. Its second version discards, its first one quantises.
Seams    pattern (dynamic: a subset of the tokens); kv (quantise, or evict: either way the method chooses the
         tokens), on statistics over chosen rows.
Exact    tau=1 or ratio=1 with mode="discard", or with bits=(16, 16), bitwise; a prompt below min_tokens is left
         alone, bitwise.
Costs    the probe rows against all keys, then attention among T: r of the tokens cost r² of the dense call. The
         logits of a prompt token outside T are those of a model without this attention: perplexity over them means
         nothing. Tasks that read dense text lose most: the paper has ChartQA at 58.2 against 66.2 (LLaVA-NeXT-13B).
Differs  The keys of a tier have their parameters over ``group`` tokens and not over a whole prompt, see zipcache.
         The number of probe rows is not published; 64 at the end and 64 random ones here. Rows at the end are always
         in T, or the next token's logits break. The threshold is a share of the probes' own sum, which is
         what the published one comes to with all rows. Prompts below min_tokens are left alone with all that
         follows them. The newest token always stays. ratio in the place of tau is ours: T is that share of the row's
         own prompt in every layer, the rows at the end among it (half of it at most), and of every later chunk.
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
    Evict,
    Pattern,
    Quantise,
    Site,
    State,
    Statistics,
    Tokens,
    check_budget,
    check_ratio,
    tokens_of,
)
from ._eviction import last_rows
from ._packing import check_tiers, width_refusal
from .base import Method, option, register

# What ``waiting`` says of a stored token: its chunk was settled, it came with this call, it came earlier.
SETTLED, NEW, OLD = 0, 1, 2
PROBE_MASS = frozenset({"probe_mass"})


@register
@dataclass(frozen=True)
class ZipVL(Method):
    """Prefill among the tokens that make up ``tau`` of the attention, and compress the cache accordingly.

    probes: (last, random) rows, each tokens or a fraction of the row's own prompt. bits: of important and of other
    tokens, for mode="quantise". ``ratio`` in the place of tau is the share of tokens that are important, the same in
    every layer: what stays of a prompt, or what is held at bits[0]. Raises InputError for a tau of 0, for widths that
    codes do not have and for numbers that are no budgets.
    """

    name: ClassVar[str] = "zipvl"
    summary: ClassVar[str] = "let only the tokens that make up most of a layer's attention take part"
    source: ClassVar[str] = "ZipVL: Dynamic Token Sparsification and KV Cache Compression"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"tau": 1.0, "bits": (16, 16), "ratio": None}
    instead: ClassVar[dict[str, tuple[str, ...]]] = {"ratio": ("tau",)}
    evicts: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    tau: float = option(
        0.975,
        help="share of the attention that the important tokens hold",
        origin="published",
        low=0.0,
        high=1.0,
    )
    bits: tuple[int, int] = option(
        (4, 2), help="bits per number of important and of other tokens", origin="published"
    )
    probes: tuple[Budget, Budget] = option((64, 64), help="last and random rows that choose", origin="ours")
    group: int = option(
        64,
        help='mode="quantise": tokens of a tier that share the parameters of a key channel; 0: all of a chunk',
        origin="ours",
        low=0,
    )
    interval: int = option(100, help="new tokens that are compressed together", origin="published", low=1)
    min_tokens: int | None = option(
        None, help="shorter prompts are left alone; null: 512, and 0 beside ratio", origin="ours", low=0
    )
    mode: Literal["quantise", "discard"] = option(
        "quantise",
        help='what becomes of the other tokens: "quantise" holds them at bits[1], "discard" drops them',
        origin="published",
    )
    seed: int = option(0, help="seed of the random rows", origin="ours", low=0, high=2**63 - 1)
    ratio: float | None = option(
        None, help="share of the tokens that are important, whatever they hold; 1.0: all", origin="ours"
    )

    def check(self) -> None:
        check_ratio(self.ratio)
        if not self.tau > 0:
            raise InputError(f"tau={self.tau!r}: a share above 0 is needed; 1.0 keeps everything")
        check_tiers(self.bits, "important")
        for name, budget in zip(("probes: last", "probes: random"), self.probes, strict=True):
            check_budget(name, budget)

    @property
    def _whole(self) -> bool:
        """Whether every token is important, whatever the attention is."""
        return (self.tau if self.ratio is None else self.ratio) >= 1.0

    @property
    def _least(self) -> int:
        """Tokens of the shortest prompt that is not left alone."""
        if self.min_tokens is None:
            return 512 if self.ratio is None else 0
        return self.min_tokens

    def _rule(self) -> Quantise:
        high = 1.0 if self.ratio is None else float(self.ratio)
        return Quantise(
            self.bits,
            self.bits,
            interval=self.interval,
            start=self._least,
            cut=self.group,
            chosen=True,
            high=high,
        )

    def _discarding(self) -> Evict:
        known = self.ratio is not None and self._least == 0
        return Evict(chosen=True, capacity=float(self.ratio) if known and self.ratio else None)

    def refuses(self, site: Site) -> str | None:
        return width_refusal(self._rule(), site) if self.mode == "quantise" else None

    def contribute(self, site: Site) -> Sequence[Contribution]:
        whole = self._whole
        pattern = Pattern(
            self._taking_part, needs=self._at_prefill, probes=self._rows, statistics=PROBE_MASS,
            lookahead=True, inert=whole,
        )  # fmt: skip
        if self.mode == "discard":
            cache = Cache(
                self._discarding(), value=self._staying, needs=self._when_due, probes=last_rows(1),
                statistics=PROBE_MASS, inert=whole,
            )  # fmt: skip
        else:
            cache = Cache(
                self._rule(), value=self._precise, needs=self._when_packing, probes=last_rows(1),
                statistics=PROBE_MASS, lookahead=True, inert=self._rule().exact,
            )  # fmt: skip
        return [pattern, cache]

    # ------------------------------------------------------------------ the prefill

    def _at_prefill(self, call: AttentionCall, state: State) -> frozenset[str]:
        return PROBE_MASS if call.fresh and any(self._long(call)) else frozenset()

    def _long(self, call: AttentionCall) -> list[bool]:
        return [n >= self._least for n in _own(call)]

    def _rows(self, call: AttentionCall, state: State) -> Tensor:
        """The probe rows of each row of the batch, (B, P) or (P,); the same for a prompt wherever it stands."""
        device = call.query.device
        if call.real is None:
            return self._chosen(call.query.shape[2]).to(device)
        found = []
        for real in call.real:
            columns = real.nonzero().flatten()
            found.append(columns[self._chosen(len(columns)).to(device)])
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)

    def _chosen(self, length: int) -> Tensor:
        last = self._last(length)
        random = min(length - last, tokens_of(self.probes[1], length))
        drawn = torch.randperm(length - last, generator=torch.Generator().manual_seed(self.seed))[:random]
        return torch.cat([drawn.sort().values, torch.arange(length - last, length)])

    def _last(self, length: int) -> int:
        """Rows at the end that choose, and that are always important."""
        most = length if self.ratio is None else max(1, self._share(length) // 2)
        return min(length, most, max(1, tokens_of(self.probes[0], length)))

    def _share(self, length: int) -> int:
        """Tokens that ``ratio`` of ``length`` come to, at least 1."""
        assert self.ratio is not None
        return max(1, tokens_of(float(self.ratio), length))

    def _important(self, mass: Tensor, seen: Tensor, among: Tensor, forced: Tensor) -> Tensor:
        """bool (B, Lk): T of the keys ``among``, and of these the ``forced`` ones in any case.

        mass, seen (B, Lk): what the probe rows gave to each key, and how many of them see it.
        """
        if self.ratio is None:
            return most(mass, seen, among, self.tau) | forced
        totals = [self._share(n) if n else 0 for n in among.sum(1).tolist()]
        places = torch.tensor(totals, device=among.device)[:, None] - forced.sum(1, keepdim=True)
        return best(mass, seen, among & ~forced, places) | forced

    def _taking_part(self, call: AttentionCall, stats: Statistics, state: State) -> Tokens | None:
        """T at prefill; None where it is everything."""
        assert stats.probe_mass is not None and stats.probe_rows is not None
        b, _, _, lq, _ = call.shape
        real = call.real if call.real is not None else call.query.new_ones(b, lq, dtype=torch.bool)
        own = _own(call)
        left = real.long().flip(1).cumsum(1).flip(1)  # real tokens from here on
        last = torch.tensor([self._last(n) for n in own], device=left.device)
        keep = self._important(
            stats.probe_mass.sum(1), stats.probe_rows, real, (left <= last[:, None]) & real
        )
        short = torch.tensor([n < self._least for n in own], device=left.device)
        keep = (keep | short[:, None]) & real
        if torch.equal(keep, real):
            return None
        state.set("important", keep[:, None], keys=2)
        return Tokens(keep)

    # ------------------------------------------------------------------ the cache, quantised

    def _when_packing(self, call: AttentionCall, state: State) -> frozenset[str]:
        due = not call.fresh and not self._whole and getattr(call.layer, "due", False)
        return PROBE_MASS if due else frozenset()

    def _precise(self, call: AttentionCall, stats: Statistics, state: State) -> Tensor | None:
        """bool (B, Hkv or 1, W): which of the tokens that wait are important; None for all of them."""
        if call.fresh:
            return state.take("important")
        if stats.probe_mass is None or stats.probe_rows is None:
            return None
        packing: Tensor = call.layer.packing()
        b, hkv, width = packing.shape
        mass, seen = stats.probe_mass[..., -width:].sum(1), stats.probe_rows[:, -width:]
        each = packing.flatten(0, 1)  # heads differ only where another method evicts
        newest = each & (each.long().flip(1).cumsum(1).flip(1) == 1)
        mass, seen = mass.repeat_interleave(hkv, 0), seen.repeat_interleave(hkv, 0)
        return self._important(mass, seen, each, newest).view(b, hkv, width)

    # ------------------------------------------------------------------ the cache, discarding

    def _staying(self, call: AttentionCall, stats: Statistics, state: State) -> Tensor | None:
        """bool (B, S): the stored tokens that stay after this call; None when no chunk is settled in it."""
        b, _, hkv, _, lk = call.shape
        if call.fresh:
            important = state.take("important")
            settled = torch.full((b, hkv, lk), SETTLED, dtype=torch.uint8, device=call.query.device)
            state.set("waiting", settled, keys=2, fill=NEW)
            state.set("counts", torch.zeros(b, dtype=torch.long))
            state.set("told", torch.tensor(_own(call)))
            state.set("long", torch.tensor(self._long(call)))
            return None if important is None else important[:, 0]
        waiting, counts = state.get("waiting"), state.get("counts")
        assert waiting is not None and counts is not None
        due = self._due(call, state)
        keep = None
        counts = self._waiting(call, state)
        state.set("told", torch.tensor(call.layer.real_seen()))
        if any(due):
            assert stats.probe_mass is not None and stats.probe_rows is not None
            now = torch.tensor(due, device=waiting.device)[:, None]
            arrived, there = waiting[:, 0], stats.probe_rows > 0
            chunk = (arrived != SETTLED) & there & now
            number = torch.arange(arrived.shape[1], device=waiting.device).expand(b, -1)
            if call.layer.positions is not None:
                number = call.layer.positions[:, 0]  # slots may stand in any order
            newest = number.masked_fill(~((arrived == NEW) & there), -1).amax(1, keepdim=True)
            stays = self._important(
                stats.probe_mass.sum(1), stats.probe_rows, chunk, chunk & (number == newest)
            )
            keep = ~chunk | stays
            waiting = torch.where(now[:, None], SETTLED, waiting)
            counts = torch.where(now[:, 0].to(counts.device), 0, counts)
        state.set("waiting", waiting.masked_fill(waiting == NEW, OLD), keys=2, fill=NEW)
        state.set("counts", counts)
        return keep

    def _when_due(self, call: AttentionCall, state: State) -> frozenset[str]:
        return PROBE_MASS if not call.fresh and any(self._due(call, state)) else frozenset()

    def _due(self, call: AttentionCall, state: State) -> list[bool]:
        """For each row of the batch, whether this call completes a chunk."""
        long = state.get("long")
        if long is None:
            return [False] * call.shape[0]
        waiting = self._waiting(call, state).tolist()
        return [ok and count >= self.interval for count, ok in zip(waiting, long.tolist(), strict=True)]

    @staticmethod
    def _waiting(call: AttentionCall, state: State) -> Tensor:
        """For each row, the tokens that belong to no chunk yet: this call's, and those that came in a pause, too."""
        counts, told = state.get("counts"), state.get("told")
        assert counts is not None and told is not None
        return counts + torch.tensor(call.layer.real_seen()) - told


def _own(call: AttentionCall) -> list[int]:
    """Tokens of this call that are not padding, for each row of the batch."""
    if call.real is None:
        return [call.query.shape[2]] * call.query.shape[0]
    return [int(n) for n in call.real.sum(1).tolist()]


def most(mass: Tensor, seen: Tensor, among: Tensor, tau: float) -> Tensor:
    """bool (B, Lk): of the keys ``among``, the p with the largest mass / seen, ties to the newer.

    mass, seen (B, Lk): what the probe rows gave to each key, and how many of them see it. p is the fewest keys
    whose largest mass makes up ``tau`` of the whole.
    """
    a = mass.double().masked_fill(~among, 0)
    whole = a.sum(1, keepdim=True)
    falling = a.sort(1, descending=True).values.cumsum(1)
    size = ((falling < tau * whole).sum(1, keepdim=True) + 1).clamp_max(among.sum(1, keepdim=True))
    return best(a, seen, among, size)


def best(mass: Tensor, seen: Tensor, among: Tensor, size: Tensor) -> Tensor:
    """bool (B, Lk): of the keys ``among``, the ``size`` (B, 1) with the largest mass / seen, ties to the newer."""
    a = mass.double()
    share = (a / seen.clamp_min(1)).masked_fill(~among, -1)
    length = share.shape[1]
    # Newest first, then a stable sort: among equals the newer one is chosen.
    order = length - 1 - share.flip(1).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(length, device=order.device).expand_as(order)
    return torch.zeros_like(among).scatter(1, order, rank < size) & among
