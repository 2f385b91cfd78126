"""Which layers and heads a method acts on: the part that several methods share. Not a method itself."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from ..seams import Site

Heads = str | list[list[int]]


def check_heads(heads: Heads) -> None:
    """InputError unless ``heads`` is "all" or a list of [layer, head] pairs."""
    if heads == "all":
        return
    if isinstance(heads, str):
        raise InputError(f'heads={heads!r}: give "all" or a list of [layer, head]')
    if not heads:
        raise InputError("heads=[]: name at least one [layer, head]")
    for pair in heads:
        fits = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not fits or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in pair):
            raise InputError(f"heads: {pair!r} is not a [layer, head] of two non-negative ints")
    seen = {tuple(pair) for pair in heads}
    if len(seen) != len(heads):
        twice = next(p for p in heads if [tuple(q) for q in heads].count(tuple(p)) > 1)
        raise InputError(f"heads: {list(twice)} is listed twice")


def validate_heads(heads: Heads, sites: Sequence[Site]) -> None:
    """InputError for a [layer, head] that does not exist among ``sites``."""
    if isinstance(heads, str):
        return
    by_layer = {site.layer: site for site in sites}
    for layer, head in heads:
        site = by_layer.get(layer)
        if site is None:
            have = sorted(by_layer)
            raise InputError(
                f"heads: layer {layer} does not exist here; layers {have[0]} to {have[-1]} can be patched"
            )
        if site.heads is not None and head >= site.heads:
            raise InputError(
                f"heads: [{layer}, {head}]: layer {layer} has {site.heads} heads, 0 to {site.heads - 1}"
            )


def heads_at(heads: Heads, site: Site, skip_layers: int = 0) -> tuple[int, ...] | None:
    """The chosen query heads at ``site``, ascending; None for all; () for none.

    ``skip_layers`` leaves out the first layers when heads is "all"; heads listed by hand are used anyway.
    """
    if isinstance(heads, str):
        return None if site.layer >= skip_layers else ()
    return tuple(sorted(head for layer, head in heads if layer == site.layer))
