"""From an eviction rule to contributions: the part that evicting methods share. Not a method itself."""

from __future__ import annotations

from ..seams import AttentionCall, Contribution, Evict, Site, State, Statistics


def evicting(rule: Evict, site: Site) -> list[Contribution]:
    """The kv contribution of ``rule``, and the position contribution when keys are to be rolled.

    A rule that keeps, in whole tokens, at least as much as the model has positions can never evict: it is
    inert and its scores are not computed.
    """
    limit = site.facts.get("max_positions")
    fixed = [b for b in (rule.sinks, rule.recent, rule.heavy) if isinstance(b, int)]
    inert = limit is not None and sum(fixed) >= limit
    found = [Contribution("kv", policy=rule, inert=inert)]
    if rule.rolled:
        found.append(Contribution("position", _shifts, inert=inert))
    return found


def _shifts(call: AttentionCall, stats: Statistics, state: State) -> object:
    shifts = getattr(call.layer, "shifts", None)
    return shifts() if shifts is not None else None
