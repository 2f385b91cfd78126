"""Logits processors that methods bring: where there is somebody to ask them, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InputError, Unsupported
from ..hosts import Component
from ..seams import Contribution, Site

if TYPE_CHECKING:
    from .binding import Binding

Given = Sequence[tuple[Site, Sequence[Contribution]]]
ASKED_BY = "_get_logits_processor"  # what generate of transformers asks for its processors


def check_logits(name: str, parts: list[Component], given: Given) -> None:
    """Unsupported where a method brings a processor to a model without generate; InputError for several."""
    for part, found in _by_part(parts, given):
        kind = type(part.module).__name__
        if not callable(getattr(part.module, ASKED_BY, None)):
            raise Unsupported(
                f"{name}: brings a logits processor, and {kind} has no generate that would ask it; patch the model with "
                "the language head"
            )
        if len(found) > 1:
            raise InputError(
                f"{name}: brings {len(found)} logits processors to one {kind}; give one, at one site, or the same object "
                "at several"
            )


def _by_part(parts: list[Component], given: Given) -> list[tuple[Component, set[int]]]:
    found: dict[int, set[int]] = {}
    for site, contributions in given:
        at = max(
            (n for n, p in enumerate(parts) if site.name.startswith(p.prefix)),
            key=lambda n: len(parts[n].prefix),
        )
        own = {id(c) for c in contributions if c.kind == "logits" and not c.inert}
        if own:
            found.setdefault(at, set()).update(own)
    return [(parts[n], own) for n, own in found.items()]


def logits_notes(bindings: Sequence[Binding]) -> list[str]:
    """What does not reach the processors of these bindings."""
    names = dict.fromkeys(
        b.name
        for b in bindings
        for _, given in b.contributions
        for c in given
        if c.kind == "logits" and not c.inert
    )
    return [
        f"{name}: its logits processor runs inside generate of the patched model; a forward of one's own, or a "
        "custom_generate that calls the model itself, is not served"
        for name in names
    ]
