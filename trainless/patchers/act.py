"""ACT: take probability away from attention sinks that are not the first token, and give it to the rest.

What     In chosen heads, a key is a sink when its column mean, over the rows that can see it, exceeds a
         threshold. On every row the sinks keep ``beta`` of their probability; what is freed goes to all
         other keys in proportion to what they have, the first token included.
Source   "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
         Training through Attention Calibration" (ACT) and its released code.
Seams    mass, on statistics of the prefill (lse, column mass); heads from calibration.
Exact    bitwise the identity at beta = 1 and wherever a head has no sink.
Costs    at prefill one sweep over the chosen heads gives output and column means together; then the columns of
         the sinks, and for rows that these hold most of, attention to the other keys once more. At decode a few
         columns per row. Nothing is stored of size L x L. See benchmarks/results.
Differs  - Threshold alpha / L as in the paper (alpha = 5); the code's fixed value is ``theta`` (0.1).
         - The first visible key is never a sink; the code drops whichever index it detects first.
         - ``min_rows``: columns that few rows see (recent tokens) are not judged; ours.
         - The paper has no rule for decoding and its code is wrong there (rows then add up to more than
           1). Here the sinks found at prefill are frozen and applied to every later row.
         - The statistics look ahead: early rows are edited by what later rows attend to, so teacher-forced
           likelihoods are contaminated and a prefill cut into chunks is refused. statistics="running"
           judges each row by the rows up to itself, and does neither.
         - Padding: divisors count visible rows, L is the row's own length, "first" its first real token.
         - A calibration file brings the heads and the beta, threshold, min_rows and statistics they were
           chosen with; any of these but the heads may be given beside the file, and then wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..seams import (
    AttentionCall,
    Contribution,
    Mass,
    MassMove,
    Observe,
    RowEdit,
    Site,
    State,
    Statistics,
    StepRow,
)
from ._choice import check_heads, heads_at, validate_heads
from .base import Method, option, register


@register
@dataclass(frozen=True)
class Act(Method):
    """Attention calibration: sinks keep ``beta`` of their probability in ``heads``.

    Raises InputError for a beta outside [0, 1] and for heads that do not exist.
    """

    name: ClassVar[str] = "act"
    summary: ClassVar[str] = (
        "move probability from attention sinks (other than the first token) to other keys"
    )
    source: ClassVar[str] = "Unveiling and Harnessing Hidden Attention Sinks (ACT)"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"beta": 1.0}
    calibration_of: ClassVar[str] = "act"
    calibration_sets: ClassVar[tuple[str, ...]] = ("heads",)
    calibration_settings: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("beta",), ("alpha", "theta"), ("min_rows",), ("statistics",),
    )  # fmt: skip

    beta: float = option(
        0.4, help="what sinks keep of their probability", origin="published", low=0.0, high=1.0
    )
    alpha: float = option(5.0, help="a sink's column mean exceeds alpha / length", origin="published")
    theta: float | None = option(
        None, help="absolute threshold; wins over alpha (the code uses 0.1)", origin="published"
    )
    heads: str | list[list[int]] = option(
        "all", help='"all" or a list of [layer, head]; usually from calibration'
    )
    skip_layers: int = option(
        2, help='first layers left alone when heads is "all"', origin="published", low=0
    )
    min_rows: int = option(8, help="columns that fewer rows see are never sinks", origin="ours", low=0)
    statistics: Literal["prefill", "running"] = option(
        "prefill",
        help='"prefill": over the whole prompt, then frozen; "running": causal means',
        origin="ours",
    )

    def check(self) -> None:
        check_heads(self.heads)
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta={self.beta!r}: sinks keep between 0 and all (1) of their probability")
        for name, value in (("alpha", self.alpha), ("theta", self.theta)):
            if value is not None and (not math.isfinite(value) or value < 0):
                raise InputError(f"{name}={value!r}: a threshold is a finite number, 0 or more")

    def validate(self, sites: Sequence[Site]) -> None:
        validate_heads(self.heads, sites)

    def refuses(self, site: Site) -> str | None:
        return None if site.causal else "not causal: sinks are defined over the rows of a causal prefill"

    def wants_layer(self, site: Site) -> bool:
        return heads_at(self.heads, site, self.skip_layers) != ()

    def contribute(self, site: Site) -> Sequence[Contribution]:
        heads = heads_at(self.heads, site, self.skip_layers)
        inert = self.beta == 1.0
        if self.statistics == "running":
            return [
                Mass(
                    self._running(heads), heads=heads, inert=inert, scope="sequence", in_order=True,
                    step=self._run_on,
                )
            ]  # fmt: skip
        return [
            Mass(
                self._frozen(heads), needs=_at_prefill, heads=heads, inert=inert, scope="sequence",
                lookahead=True, statistics=frozenset({"column_mass"}), step=self._stepped(heads),
            )
        ]  # fmt: skip

    def watch(self, site: Site, record: Callable[[Tensor], None]) -> Contribution:
        """Changes nothing, and tells which chosen heads would be changed: those with a sink.

        ``record`` gets bool (B, h), once per block of rows; h counts the chosen heads at ``site``.
        """
        heads = heads_at(self.heads, site, self.skip_layers)

        def look(call: AttentionCall, stats: Statistics, state: State) -> None:
            if stats.column_mass is not None:
                record(self._sinks(call, _pick(stats.column_mass, heads), stats.rows).any(-1))

        def follow(call: AttentionCall, stats: Statistics, state: State) -> RowEdit:
            running = _RunningSinks(self, call, state, heads)

            def unchanged(p: Tensor, start: int) -> Tensor:
                record(running.sinks(p, start).any(-1).any(-1))
                return p

            return RowEdit(unchanged)

        if self.statistics == "running":
            return Mass(follow, heads=heads, scope="sequence")
        return Observe(look, needs=_at_prefill, heads=heads, statistics=frozenset({"column_mass"}))

    # ------------------------------------------------------------------ sinks of the prefill, then frozen

    def _frozen(self, heads: tuple[int, ...] | None) -> Any:
        def value(call: AttentionCall, stats: Statistics, state: State) -> MassMove | None:
            if call.fresh:  # later calls may carry statistics too, that another method asked for
                assert stats.column_mass is not None
                sinks = self._sinks(call, _pick(stats.column_mass, heads), stats.rows)
                if not bool(sinks.any()):
                    return None
                state.set("sinks", _on_every_head(sinks, call, heads), keys=2)
                return MassMove(sinks, self.beta)
            frozen = state.get("sinks")
            return None if frozen is None else MassMove(_pick(_as_wide(frozen, call), heads), self.beta)

        return value

    def _stepped(self, heads: tuple[int, ...] | None) -> Callable[[Tensor, State, StepRow], Tensor]:
        def step(p: Tensor, state: State, row: StepRow) -> Tensor:
            sinks = state.get("sinks")
            return p if sinks is None else _moved(p, _pick(sinks, heads)[:, :, None], self.beta)

        return step

    def _sinks(self, call: AttentionCall, mass: Tensor, rows: Tensor | None) -> Tensor:
        """bool (B, h, Lk): the sinks, from column mass (B, h, Lk) and visible rows (B, Lk)."""
        assert rows is not None
        mean = mass / rows.clamp_min(1)[:, None]
        real = _real_keys(call)
        length = real.sum(1).to(mass.dtype)[:, None, None]
        threshold = self.theta if self.theta is not None else self.alpha / length
        judged = real & (rows >= self.min_rows) & (real.cumsum(1) > 1)
        return (mean > threshold) & judged[:, None]

    # ------------------------------------------------------------------ running means

    def _running(self, heads: tuple[int, ...] | None) -> Any:
        def value(call: AttentionCall, stats: Statistics, state: State) -> RowEdit:
            return RowEdit(_RunningSinks(self, call, state, heads).edit)

        return value

    def _run_on(self, p: Tensor, state: State, row: StepRow) -> Tensor:
        """One row by the sums in ``state``, which is written in place."""
        total, count, tokens, real = (state.tensors[name] for name in ("sum", "count", "tokens", "real"))
        place, now = row.place[None], row.real[:, None, None]
        earlier = real[:, 0] & (torch.arange(real.shape[2], device=real.device) < place)
        gone = tokens - earlier.sum(1)
        real.index_copy_(2, place, now)
        sinks, new, seen = self._running_sinks(p, place, now[..., None], real[:, 0], gone, total, count)
        total.copy_(new[:, :, 0].detach())
        count.copy_(seen[:, :, 0])
        tokens.add_(row.real)
        return _moved(p, sinks, self.beta)

    def _running_sinks(
        self, p: Tensor, number: Tensor, now: Tensor, real: Tensor, gone: Tensor, total: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks of each row of p (B, h, rows, Lk), and the sums of columns and of rows that see them behind it.

        number (rows,): places of the rows' own keys. now (B, 1, rows, 1): rows that are no padding. real (B, Lk): keys
        that are none. gone (B,): tokens without a key. total (B, h, Lk), count (B, 1, Lk): the sums before.
        """
        seen = (torch.arange(p.shape[3], device=p.device) <= number[:, None]) & real[:, None, None] & now
        total = total[:, :, None] + torch.where(now, p, 0).cumsum(2)
        count = count[:, :, None] + seen.to(p.dtype).cumsum(2)
        length = (seen.sum(-1, keepdim=True) + gone.to(p.dtype)[:, None, None, None]).clamp_min(1)
        threshold = self.theta if self.theta is not None else self.alpha / length
        judged = (
            seen
            & (count >= max(1, self.min_rows))
            & (real.cumsum(1) + gone[:, None] > 1)[:, None, None]
        )  # fmt: skip
        return (total / count.clamp_min(1) > threshold) & judged, total, count


class _RunningSinks:
    """Edits rows in order: row i by the column means over the rows up to and including i."""

    def __init__(self, act: Act, call: AttentionCall, state: State, heads: tuple[int, ...] | None):
        self.act, self.state = act, state
        b, h, _, lq, lk = call.shape
        h = h if heads is None else len(heads)
        exact = call.statistics_dtype
        device = call.query.device
        self.sum = _or_zeros(state.get("sum"), (b, h, lk), exact, device)
        self.count = _or_zeros(state.get("count"), (b, 1, lk), exact, device)
        # Which stored keys are real tokens; pads stay False for the rest of the sequence.
        known = state.get("real")
        now = torch.ones(b, lq, dtype=torch.bool, device=device) if call.real is None else call.real
        self.real = (
            torch.ones(b, lk, dtype=torch.bool, device=device) if known is None else known[:, 0].clone()
        )
        self.real[:, lk - lq :] = now
        self.now = now
        # Tokens that a sliding window has let go: they still count as tokens, and one of them was the first.
        self.before = _or_zeros(state.get("tokens"), (b,), exact, device)
        self.gone = self.before - self.real[:, : lk - lq].sum(1)

    def edit(self, p: Tensor, start: int) -> Tensor:
        """p (B, h, rows, Lk) probabilities of rows start… of the call; returns them edited."""
        return _moved(p, self.sinks(p, start), self.act.beta)

    def sinks(self, p: Tensor, start: int) -> Tensor:
        """bool, shaped like ``p``: each row's sinks, by the rows up to itself; blocks come in order."""
        rows, lk, lq = p.shape[2], p.shape[3], self.now.shape[1]
        number = torch.arange(lk - lq + start, lk - lq + start + rows, device=p.device)
        now = self.now[:, None, start : start + rows, None]
        sinks, total, count = self.act._running_sinks(
            p, number, now, self.real, self.gone, self.sum, self.count
        )
        self.sum, self.count = total[:, :, -1], count[:, :, -1]
        self.state.set("sum", self.sum, keys=2, cumulative=True)
        self.state.set("count", self.count, keys=2, cumulative=True)
        self.state.set("tokens", self.before + self.now[:, : start + rows].sum(1), cumulative=True)
        self.state.set("real", self.real[:, None], keys=2, fill=True, cumulative=True)
        return sinks


# ---------------------------------------------------------------- helpers


def _moved(p: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """p (B, h, rows, Lk) with ``beta`` of it left on the sinks, and the rest on the other keys in proportion."""
    mass = (p * sinks).sum(-1, keepdim=True)
    room = (p * ~sinks).sum(-1, keepdim=True)
    grown = 1 + (1 - beta) * mass / room.clamp_min(torch.finfo(p.dtype).tiny)
    return torch.where(room > 0, torch.where(sinks, p * beta, p * grown), p)


def _at_prefill(call: AttentionCall, state: State) -> tuple[str, ...]:
    return ("column_mass",) if call.fresh else ()


def _pick(per_head: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    return per_head if heads is None else per_head[:, list(heads)]


def _on_every_head(sinks: Tensor, call: AttentionCall, heads: tuple[int, ...] | None) -> Tensor:
    """(B, H, Lk): sinks of the chosen heads among all, so that a cache can tell whose keys they are."""
    if heads is None:
        return sinks
    every = sinks.new_zeros(sinks.shape[0], call.query.shape[1], sinks.shape[2])
    every[:, list(heads)] = sinks
    return every


def _as_wide(sinks: Tensor, call: AttentionCall) -> Tensor:
    """Sinks as they are stored, padded to the keys of this call."""
    short = call.key.shape[2] - sinks.shape[2]
    return torch.cat([sinks, sinks.new_zeros(*sinks.shape[:2], short)], 2) if short > 0 else sinks


def _real_keys(call: AttentionCall) -> Tensor:
    b, _, _, _, lk = call.shape
    if call.real is None:
        return torch.ones(b, lk, dtype=torch.bool, device=call.query.device)
    return call.real


def _or_zeros(
    held: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device) if held is None else held.to(dtype)
