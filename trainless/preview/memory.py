"""How many bytes a key/value cache takes, from head counts and the rules of eviction and precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..cache import FixedLayer
from ..engine.runtime import runtime_of
from ..hosts import Component, find_sites
from ..hosts.transformers.families import family_of
from ..kernels.ragged import PAGE
from ..patch.binding import Binding, entries_by_module
from ..seams import AttentionPlan, Entry, Evict, Site, tokens_of

LENGTHS = (4096, 32768)


@dataclass(frozen=True)
class CachePoint:
    """Bytes of keys and values of one sequence of ``tokens`` tokens. beyond: more than the model's positions.

    patched: None where a method chooses by the prompt how many tokens stay.
    """

    tokens: int
    unpatched: int
    patched: int | None
    beyond: bool

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class CacheEstimate:
    """``layers`` that cache, their ``dtype``, the model's ``positions`` if it names a limit, and the points."""

    layers: int
    dtype: str
    positions: int | None
    points: tuple[CachePoint, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "points": [p.to_dict() for p in self.points]}


def estimate(
    parts: Sequence[Component], bindings: Sequence[Binding], lengths: Sequence[int] = LENGTHS
) -> CacheEstimate | None:
    """The cache of the model that ``bindings`` touch, unpatched and under them; None when none caches.

    Counts causal self-attention layers whose head counts are known; a sliding-window layer holds its
    window. Patches that stand on the model already count as part of "patched".
    """
    planned = entries_by_module(bindings)
    for part in parts:
        sites = [s for s in find_sites([part]) if _caches(s)]
        # Towers of a model may be of classes that could cache, and are never given one.
        sites = [s for s in sites if "decoder" in s.parts] or sites
        if any(family_of(s.module).no_kv for s in sites):
            return None  # its cache is declared to hold something else than each layer's tokens once
        if sites and any(s.module in planned for s in sites):
            break
    else:
        return None
    width = next((p.dtype for p in part.module.parameters() if p.is_floating_point()), torch.float32)
    limits = [s.facts.get("max_positions") for s in sites]
    positions = next((n for n in limits if isinstance(n, int) and n > 0), None)
    points = []
    for tokens in lengths:
        before = after = 0
        chosen = False  # whether some method decides by what it reads how many tokens stay
        for site in sites:
            heads, key_width, value_width = _shape(site)
            depths = site.facts.get(
                "depths", 1
            )  # cache layers of one module, where blocks run more than once
            per_token = heads * (key_width + value_width) * width.itemsize
            window = site.facts.get("window_held") or site.facts.get("sliding_window")
            held = min(tokens, window) if window else tokens
            plan = _plan(site, planned[site.module][1] if site.module in planned else [])
            before += round(depths * held * per_token)
            chosen = chosen or (plan.evict is not None and plan.evict.chosen and plan.evict.capacity is None)
            held = held if plan.evict is None else min(held, plan.evict.total(tokens))
            after += round(depths * _bytes(plan, held, tokens, site, per_token, width.itemsize))
        points.append(
            CachePoint(
                tokens, before, None if chosen else after, positions is not None and tokens > positions
            )
        )
    return CacheEstimate(len(sites), str(width).removeprefix("torch."), positions, tuple(points))


def _settles(evict: Evict) -> bool:
    """Whether the layers of a dynamic cache settle into slots under this rule, right after a prompt."""
    return FixedLayer.suits(evict, None) and not evict.once


def _caches(site: Site) -> bool:
    keeps = site.causal or bool(site.facts.get("caches"))
    return keeps and site.role == "self" and all(_shape(site)) and not site.facts.get("borrows")


def _shape(site: Site) -> tuple[int, int, int]:
    """(heads, width of a key, width of a value) in the cache; zeros where the module does not say."""
    found: tuple[int, int, int] | None = site.facts.get("cache_shape")
    if found is None and site.kv_heads is not None and site.head_dim is not None:
        found = site.kv_heads, site.head_dim, site.head_dim
    return found or (0, 0, 0)


def _plan(site: Site, entries: Sequence[Entry]) -> AttentionPlan:
    """The plan that would stand at the site."""
    runtime = runtime_of(site.module)
    standing = list(runtime.plan.entries) if runtime is not None else []
    return AttentionPlan([*standing, *entries])


def _bytes(plan: AttentionPlan, held: int, tokens: int, site: Site, per_token: int, itemsize: int) -> int:
    rule, evict = plan.quantise, plan.evict
    heads, key_width, value_width = _shape(site)
    # Scores that are kept from call to call are float32, one per token and head.
    sums = evict is not None and evict.score is not None and not (evict.last or evict.once)
    if rule is None or tokens < rule.start:
        if evict is None:
            return held * per_token
        if held >= tokens:  # positions are told apart from the first token on that goes
            return held * (per_token + heads * (4 if sums else 0))
        if evict.parts_heads:
            # Pages of its own for each head, of which the last is half empty on average.
            slots = held + (PAGE + 1) // 2 + (PAGE if evict.once else 0)
            return slots * (per_token + heads * (4 if evict.once or evict.score is None else 8))
        if not _settles(evict):
            return held * (per_token + heads * (8 if sums else 4))
        scored = evict.score is not None
        # Slots of fixed number: one more than stay, each with its position and its score.
        return (held + 1) * (per_token + heads * (8 if scored else 4))
    residual = tokens_of(rule.residual, tokens)
    return heads * (rule.nbytes(held, residual, key_width, itemsize, value_width) + (4 * held if sums else 0))
