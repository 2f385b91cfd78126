"""From an eviction rule to contributions: the part that evicting methods share. Not a method itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..seams import (
    AttentionCall,
    Budget,
    Budgets,
    Cache,
    Contribution,
    Evict,
    Position,
    Probes,
    Site,
    State,
    Statistics,
    check_budget,
)
from .base import option

EVERYTHING = 1 << 62  # tokens


def ratio_option() -> Any:
    """The parameter ``ratio``, the same for every evicting method."""
    help = "share of the row's own prompt that stays, all parts together; 1.0: everything, for good"
    return option(None, help=help, origin="ours")


def budgets_option() -> Any:
    """The parameter ``budgets``, the same for every method that scores the tokens of each head."""
    help = (
        '"uniform": every head keeps as much; "adaptive": the heads of a layer share what they may keep; '
        '"pyramid": earlier layers keep more'
    )
    return option("uniform", help=help, origin="published")


def budgets_of(kind: str, site: Site) -> Budgets | None:
    """What the parameter ``budgets`` says of the layer of ``site``."""
    if kind == "adaptive":
        return Budgets("layer")
    return Budgets(pyramid=(site.layer, site.layers)) if kind == "pyramid" else None


def check_budgets(kind: str, **others: Any) -> None:
    """InputError where ``others`` (parameter=(value, the only one that fits, why)) do not go with budgets that differ."""
    for name, (value, fits, why) in others.items():
        if kind != "uniform" and value != fits:
            raise InputError(
                f'budgets={kind!r} with {name}={value!r}: {why}; use {name}={fits!r}, or budgets="uniform"'
            )


def protect_option() -> Any:
    """The parameter ``protect``, the same for every evicting method that goes on after the prompt."""
    help = '"prompt": only what was generated may go, and the budgets are for that'
    return option("none", help=help, origin="ours")


def by_keys(score: str, capacity: Budget, sinks: int, recent: int) -> Evict:
    """The rule of a method that chooses once, by the keys alone; ``score``: see ``Evict``."""
    return Evict(sinks=sinks, recent=recent, capacity=capacity, score=score, once=True)


def check_by_keys(capacity: Budget, sinks: int, recent: int) -> None:
    """InputError for budgets of ``by_keys`` that keep nothing, or less than always stays."""
    check_budget("capacity", capacity)
    if isinstance(capacity, int) and capacity < max(1, sinks + recent):
        raise InputError(
            f"capacity={capacity} is less than the {max(1, sinks + recent)} tokens that always stay (sinks={sinks}, "
            f"recent={recent}); raise capacity or lower them"
        )


def no_keys(site: Site) -> str | None:
    """Why nothing can be said of the keys that the cache of ``site`` holds; None where it holds them as they are."""
    if site.facts.get("keys") == "latent":
        return "its cache holds latents that keys are made of, and the rule compares keys"
    return None


def evicting(rule: Evict, site: Site, ratio: float | None = None) -> list[Contribution]:
    """The kv contribution of ``rule``, and the position contribution when keys are to be rolled.

    A rule that keeps, in whole tokens, at least as much as the model has positions can never evict, and one of
    which a ``ratio`` of 1 was asked must not: it is inert and its scores are not computed.
    """
    limit = site.facts.get("max_positions")
    if ratio == 1.0:
        rule = replace(rule, capacity=EVERYTHING)
    inert = ratio == 1.0 or (limit is not None and rule.fixed >= limit)
    found: list[Contribution] = []
    if rule.last:
        found.append(Cache(rule, inert=inert, needs={"probe_mass"}, probes=scoring_rows(rule)))
    else:
        found.append(Cache(rule, inert=inert))
    if rule.rolled:
        found.append(Position(_shifts, inert=inert))
    return found


def _shifts(call: AttentionCall, stats: Statistics, state: State) -> object:
    shifts = getattr(call.layer, "shifts", None)
    return shifts() if shifts is not None else None


def scoring_rows(rule: Evict) -> Probes:
    """The rows by which ``rule`` scores: the last ones, of a prompt fewer where its budget is small."""
    if not isinstance(rule.capacity, float) or rule.last == 1:
        return last_rows(rule.last)

    def chosen(call: AttentionCall, state: State) -> Tensor:
        lq, device = call.query.shape[2], call.query.device
        if call.real is None:
            return torch.arange(lq - min(lq, rule.parts(lq).last), lq, device=device)
        left = call.real.long().flip(1).cumsum(1).flip(1)
        counts = [rule.parts(n).last for n in call.real.sum(1).tolist()]
        return call.real & (left <= torch.tensor(counts, device=device)[:, None])

    return chosen


def last_rows(count: int) -> Probes:
    """The last ``count`` rows of a call that are not padding, for each row of the batch."""

    def chosen(call: AttentionCall, state: State) -> Tensor:
        lq, device = call.query.shape[2], call.query.device
        if call.real is None:
            return torch.arange(max(0, lq - count), lq, device=device)
        left = call.real.long().flip(1).cumsum(1).flip(1)  # real rows from here on
        return call.real & (left <= count)

    return chosen
