"""``patch``: resolve → bind → check → commit; and ``unpatch``, which takes everything off again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import ForeignEdit
from ..hosts import components
from ..recipes import resolve
from .binding import bind
from .conflicts import check
from .handle import Patch
from .station import STATION


def patch(model: Any, what: Any, *, where: Mapping[str, Any] | None = None, **parameters: Any) -> Patch:
    """Patch ``model`` in place and return the handle; in a ``with`` statement it comes off at the end.

    model: a loaded torch module, a diffusers pipeline (its denoiser is patched) or a transformers
    pipeline. what: a method name, a packaged recipe's name, a path, a mapping, or a list of names and
    ``{use, with, where}`` mappings. where: which of its sites a single method uses, ``{layers, part,
    modules}``. parameters: those of the method, when ``what`` names one.

    Raises NoMatch (nothing to bind), Unsupported (found, but cannot be patched), Conflict, InputError,
    RecipeError, CalibrationError; the model is then exactly as it was.
    """
    recipe = resolve(what, parameters, where=where)
    parts, bindings = bind(model, recipe)
    check(bindings)
    made = Patch(model, recipe, parts, bindings)
    made._commit()
    return made


@contextlib.contextmanager
def patched(
    model: Any, what: Any, *, where: Mapping[str, Any] | None = None, **parameters: Any
) -> Iterator[Patch]:
    """``patch`` for the length of a ``with`` block; the patch comes off even when the block raises."""
    with patch(model, what, where=where, **parameters) as made:
        yield made


def patches_on(model: Any) -> list[Patch]:
    """The patches on a model or pipeline, in the order in which they came."""
    found: list[Patch] = []
    for part in components(model):
        for module in part.module.modules():
            station = vars(module).get(STATION)
            found += [p for p in station.patches if p not in found] if station is not None else []
    return found


def unpatch(model: nn.Module | Any) -> None:
    """Remove every patch from ``model``; all are removed before a ForeignEdit is raised."""
    problems = []
    for made in reversed(patches_on(model)):
        try:
            made.remove()
        except ForeignEdit as error:
            problems.append(str(error))
    if problems:
        raise ForeignEdit("; ".join(problems))
