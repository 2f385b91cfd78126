"""``trainless explain``: what a patch would touch, and what it would cost, without weights."""

from __future__ import annotations

import typer

from .shared import BAD_INPUT, DONE, Json, Patches, Recipes, Sets, Wheres, as_json, chosen


def command(
    model: str = typer.Argument(metavar="MODEL", help="Hub id, folder, GGUF file, or demo:NAME."),
    recipe: list[str] = Recipes,
    patch: list[str] = Patches,
    set_: list[str] = Sets,
    where: list[str] = Wheres,
    json: bool = Json,
) -> int:
    """Which sites each method would patch, conflicts, and an estimate of memory.

    Loads no weights. Exit 1 when a method matches nothing or two methods clash.
    """
    what = chosen(recipe, patch, set_, where)
    if what is None:
        raise typer.BadParameter("name what to explain", param_hint="--patch or --recipe")
    from ..models import describe, skeleton
    from ..preview.explain import explain

    found = explain(skeleton(describe(model)), what)
    print(as_json(found) if json else found)
    return DONE if found.ok else BAD_INPUT
