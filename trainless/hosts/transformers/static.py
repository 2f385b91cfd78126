"""What a static cache can be under a plan, and why it cannot: said by ``explain``, and in the same words at a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin, StaticLayer

from ...cache import FixedEvictingLayer, FixedLayer, FixedPackedLayer, FixedTiersLayer, RaggedLayer
from ...seams import AttentionPlan, Evict, Site
from .version import DummyLayer

INSTEAD = "use a dynamic cache (drop cache_implementation)"
# By how the keys that a class attends to come from its cache: see families.py.
OTHERWISE = {
    "latent": "the layer's cache holds latents, which it makes into keys and values of every head at each call",
    "tiled": "the layer repeats the heads of its cache as a whole",
    "split": "the values that the layer attends to are not those of its cache",
    "read": "the layer makes its mask from the values in its cache",
}


def fixed_kind(plan: AttentionPlan) -> type[FixedPackedLayer]:
    """The class of a layer that packs under this plan and may settle."""
    if plan.evict is not None:
        return FixedEvictingLayer
    return FixedTiersLayer if plan.quantise is not None and plan.quantise.chosen else FixedPackedLayer


def evicting_kind(policy: Evict) -> type[FixedLayer]:
    """The class of a layer that evicts by this rule and may settle."""
    return RaggedLayer if policy.parts_heads else FixedLayer


def settles(plan: AttentionPlan, site: Site, capacity: int | None) -> bool:
    """Whether a layer under this plan may settle into buffers; capacity: tokens of the static cache, None in others."""
    if site.facts.get("keys", "same") != "same":
        return False
    if plan.quantise is not None:
        return fixed_kind(plan).suits(plan.quantise, plan.evict, capacity)
    return plan.evict is not None and evicting_kind(plan.evict).suits(plan.evict, capacity)


def refusal(plan: AttentionPlan, site: Site, kind: type, capacity: int = 1) -> str | None:
    """Why a layer of this ``kind`` in a static cache cannot serve the plan; None where it can.

    capacity: tokens for which the cache was made; the answer is the same for all of them.
    """
    if not plan.needs_layer:
        return None
    if issubclass(kind, DummyLayer):
        return "the layer reads the keys of another layer, which have no number of tokens in a static cache"
    if not issubclass(kind, StaticLayer):
        return None
    if issubclass(kind, LinearAttentionCacheLayerMixin):
        return f"the cache layer is a {kind.__name__}, which also holds the state of a recurrence"
    if kind is not StaticLayer:
        return f"the cache layer is a {kind.__name__}, where a token does not stay at its place"
    if site.facts.get("calls", 1) > 1:
        return "the layer attends more than once for each token"
    if not plan.of["kv"] or settles(plan, site, capacity):
        return None
    keys = site.facts.get("keys", "same")
    return (
        OTHERWISE.get(keys)
        or "what this rule keeps does not fit into buffers whose size is known after the prompt"
    )


def unsettled(plan: AttentionPlan, site: Site, static: bool) -> str | None:
    """Why no step of this plan is one on buffers of fixed size, or by what is remembered; None where they may be.

    static: in a static cache, otherwise in a dynamic one.
    """
    if not plan.needs_layer:
        return None
    if static:
        reasons = (refusal(plan, site, kind) for kind in site.facts.get("static_layers", ()))
        return next((reason for reason in reasons if reason is not None), None)
    if not plan.of["kv"]:
        return "what is remembered of a prompt is read by the straight steps of static caches only"
    if settles(plan, site, None):
        return None
    return (
        OTHERWISE.get(site.facts.get("keys", "same"))
        or "what this rule keeps has no size that is known after the prompt"
    )


def cache_notes(model: nn.Module, planned: Iterable[tuple[Site, AttentionPlan]]) -> list[str]:
    """What calls of these plans will refuse about the caches that a user may ask for."""
    refused: Counter[tuple[str, str]] = Counter()
    keeping: dict[str, None] = {}
    for site, plan in planned:
        keeping |= dict.fromkeys(_keeping(plan) if plan.of["kv"] else [])
        for kind in site.facts.get("static_layers", ()):
            reason = refusal(plan, site, kind)
            if reason is not None:
                refused[" and ".join(_keeping(plan)), reason] += 1
                break
    notes = [
        f"{names}: static caches: no, because {reason} ({count} {'layers' if count > 1 else 'layer'}); {INSTEAD}"
        for (names, reason), count in refused.items()
    ]
    if keeping and _keeps_none(model):
        notes.append(
            f"{' and '.join(keeping)}: this model's own generation config says use_cache=False, and generate() then "
            "refuses, since there is nothing to compress; pass use_cache=True"
        )
    return notes


def _keeping(plan: AttentionPlan) -> list[str]:
    """The methods that need a cache layer."""
    own = [e.method for e in plan.active if e.contribution.stateful or e in plan.of["kv"]]
    return list(dict.fromkeys(own))


def _keeps_none(model: nn.Module) -> bool:
    """Whether generate() keeps no cache unless it is asked to."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.can_generate():
            settings: Any = getattr(module, "generation_config", None)
            return getattr(settings, "use_cache", None) is False
    return False
