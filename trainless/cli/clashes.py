"""Conflicts inside a recipe, without a model: its methods on a stand-in for every kind of layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import TrainlessError
from ..patch.binding import Binding
from ..patch.conflicts import find_conflicts
from ..recipes import PARTS, Recipe, Use
from ..seams import Lease, Site

LAYERS = 32  # deeper than what recipes name by number; slices from the end work at any depth
_HOSTS = ("transformers", "diffusers")
_ROLES = ("self", "cross", "joint")


def clashes(recipe: Recipe) -> list[str]:
    """Every clash between two methods of ``recipe`` that share a layer, one sentence each.

    What only a model can tell (module names, heads that exist) is not looked at: a method that needs
    it to say what it contributes is left out here and checked by ``explain`` and ``patch``.
    """
    sites = [
        _site(host, part, role, i)
        for host in _HOSTS
        for part in PARTS
        for role in _ROLES
        for i in range(LAYERS)
    ]
    return find_conflicts([b for use in recipe.uses if (b := _binding(use, sites)) is not None])


def _site(host: str, part: str, role: str, layer: int) -> Site:
    return Site(
        name=f"layer {layer}",
        module=nn.Identity(),
        host=host,
        role=role,
        parts=frozenset({part}),
        layer=layer,
        layers=LAYERS,
        causal=part in {"text", "decoder"},
        heads=32,
        kv_heads=32,
        head_dim=64,
    )


def _binding(use: Use, sites: list[Site]) -> Binding | None:
    method, where = use.method, use.where
    if getattr(where, "modules", None):
        return None
    wanted = {where.part} if where.part is not None else set(method.parts) or set(PARTS)
    fitting = [
        site
        for site in sites
        if site.host in method.hosts
        and site.role in method.roles
        and site.parts & wanted
        and method.wants_layer(site)
    ]
    contributions: list[tuple[Site, Any]] = []
    try:
        for site in where.select(fitting) if where else fitting:
            contributions.append((site, list(method.contribute(site))))
    except TrainlessError:
        return None
    return Binding(use, method, Lease(method.name), len(fitting), contributions)
