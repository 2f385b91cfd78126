"""ACT: attention that other sinks than the first token receive is handed back to the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .core import Call, Rule, Site


class Act(Rule):
    """Column means a_k = (1/n_k) Σ_i A_ik over the n_k real rows i that see column k; sinks are
    S = {k : a_k > alpha/L} (or > theta, which wins when given). In every row, with s = Σ_{k∈S} A_ik,

        A'_ik = beta · A_ik                              for k in S
        A'_ij = A_ij · (1 + (1 - beta) · s / (1 - s))    for every other j, the first token included.

    Settled here where sources differ:
    - L is the row's own number of real tokens in the prefill; padding counts neither as row nor as key.
    - The first real token is never a sink (published code drops the first detected index instead).
    - A column needs ``min_rows`` rows that see it; the comparison with the threshold is strict.
    - S is found in the first call of a sequence and frozen: later calls use it in every row, and later
      tokens never join.
    - heads: "all" means every query head of the layers from ``skip_layers`` on, the last one included; a
      list of [layer, head] is taken as it is, whatever ``skip_layers`` says.
    - A row whose whole mass lies on S stays as it is: nobody could take what is freed.
    - statistics="running": row i is edited with its own S_i, from the means over the rows up to and
      including i that see the column, the threshold alpha / (real tokens up to and including i), and
      min_rows compared with the number of rows so far that see the column. It goes on in later calls,
      and later tokens may join.
    - forced: layer -> bool (B, H, n), sinks found elsewhere; they are applied, nothing is measured. Columns
      from n on are no sinks.
    """

    def __init__(
        self,
        beta: float = 0.4,
        alpha: float = 5.0,
        theta: float | None = None,
        heads: str | Sequence[Sequence[int]] = "all",
        skip_layers: int = 2,
        min_rows: int = 8,
        statistics: str = "prefill",
        layers: Collection[int] | None = None,
        part: str | None = None,
        forced: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__(layers, part)
        self.forced = forced
        self.beta, self.alpha, self.theta = beta, alpha, theta
        self.heads, self.skip_layers, self.min_rows = heads, skip_layers, min_rows
        self.statistics = statistics
        # layer -> per call, the sinks: bool (B, H, Lk), or (B, H, Lq, Lk) with running statistics
        self.sinks: dict[int, list[Tensor]] = {}
        # layer -> per call that measured, the smallest |a_k - threshold| / threshold among columns that
        # could be sinks: how far the set is from changing
        self.margins: dict[int, list[float]] = {}

    def applies(self, site: Site) -> bool:
        if isinstance(self.heads, str):
            return super().applies(site) and site.layer >= self.skip_layers
        return super().applies(site) and any(layer == site.layer for layer, _ in self.heads)

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.sinks[call.site.layer] = []
        self.margins[call.site.layer] = []

    def probabilities(self, call: Call, p: Tensor) -> Tensor:
        sinks = self._running(call, p) if self.statistics == "running" else self._frozen(call, p)
        self.sinks[call.site.layer].append(sinks)
        inside = sinks if sinks.dim() == 4 else sinks[:, :, None, :].expand_as(p)
        mass = (p * inside).sum(dim=-1, keepdim=True)
        rest = (p * ~inside).sum(dim=-1, keepdim=True)
        grown = p * (rest + (1 - self.beta) * mass) / torch.where(rest > 0, rest, torch.ones_like(rest))
        edited = torch.where(inside, self.beta * p, grown)
        return torch.where((mass > 0) & (rest > 0), edited, p)

    def _frozen(self, call: Call, p: Tensor) -> Tensor:
        state = self.state(call)
        batch, heads, _, lk = p.shape
        if self.forced is not None:
            state["sinks"] = self.forced[call.site.layer][..., :lk]
        elif call.past == 0:
            rows = (call.seen & call.real[:, None, :, None]).to(p)
            count = rows.sum(dim=2)
            mean = (p * rows).sum(dim=2) / count.clamp_min(1)
            length = call.real.sum(dim=1)[:, None, None]
            state["sinks"] = self._choose(call, mean, count, length)
        known = state["sinks"]
        later = torch.zeros(batch, heads, lk - known.shape[-1], dtype=torch.bool)
        return torch.cat([known, later], dim=-1)

    def _running(self, call: Call, p: Tensor) -> Tensor:
        state = self.state(call)
        batch, heads, _, lk = p.shape
        rows = (call.seen & call.real[:, None, :, None]).to(p)
        mass, count = (p * rows).cumsum(dim=2), rows.cumsum(dim=2)
        length = call.real.cumsum(dim=1)[:, None, :, None].to(p)
        if call.past:
            new = torch.zeros(batch, heads, 1, lk - state["mass"].shape[-1], dtype=p.dtype)
            mass = mass + torch.cat([state["mass"], new], dim=-1)
            count = count + torch.cat([state["count"], new], dim=-1)
            length = length + state["length"]
        state["mass"], state["count"], state["length"] = mass[:, :, -1:], count[:, :, -1:], length[:, :, -1:]
        return self._choose(call, mass / count.clamp_min(1), count, length)

    def _choose(self, call: Call, mean: Tensor, count: Tensor, length: Tensor) -> Tensor:
        """Sinks among columns; ``mean`` and ``count`` (B, H, Lk) or (B, H, Lq, Lk), ``length`` to match."""
        threshold = self.alpha / length.clamp_min(1).to(mean) if self.theta is None else self.theta
        first = call.real_keys.int().argmax(dim=1)
        possible = torch.ones_like(mean, dtype=torch.bool)
        for row, column in enumerate(first.tolist()):
            possible[row, ..., column] = False
        if not isinstance(self.heads, str):
            chosen = {head for layer, head in self.heads if layer == call.site.layer}
            for head in set(range(mean.shape[1])) - chosen:
                possible[:, head] = False
        possible &= count >= max(1, self.min_rows)
        gap = ((mean - threshold).abs() / threshold)[possible]
        self.margins[call.site.layer].append(float(gap.min()) if gap.numel() else float("inf"))
        return possible & (mean > threshold)
