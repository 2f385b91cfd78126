"""From an eviction rule to contributions: the part that evicting methods share. Not a method itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..seams import AttentionCall, Contribution, Evict, Probes, Site, State, Statistics


def evicting(rule: Evict, site: Site) -> list[Contribution]:
    """The kv contribution of ``rule``, and the position contribution when keys are to be rolled.

    A rule that keeps, in whole tokens, at least as much as the model has positions can never evict: it is
    inert and its scores are not computed.
    """
    limit = site.facts.get("max_positions")
    inert = limit is not None and rule.fixed >= limit
    if rule.last:
        found = [
            Contribution("kv", policy=rule, inert=inert, needs={"probe_mass"}, probes=last_rows(rule.last))
        ]
    else:
        found = [Contribution("kv", policy=rule, inert=inert)]
    if rule.rolled:
        found.append(Contribution("position", _shifts, inert=inert))
    return found


def _shifts(call: AttentionCall, stats: Statistics, state: State) -> object:
    shifts = getattr(call.layer, "shifts", None)
    return shifts() if shifts is not None else None


def last_rows(count: int) -> Probes:
    """The last ``count`` rows of a call that are not padding, for each row of the batch."""

    def chosen(call: AttentionCall, state: State) -> Tensor:
        lq, device = call.query.shape[2], call.query.device
        if call.real is None:
            return torch.arange(max(0, lq - count), lq, device=device)
        left = call.real.long().flip(1).cumsum(1).flip(1)  # real rows from here on
        return call.real & (left <= count)

    return chosen
