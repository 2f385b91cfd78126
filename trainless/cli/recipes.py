"""``trainless recipes``: what comes with the package, what a recipe says, whether a file is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .shared import Json, as_json, guarded

if TYPE_CHECKING:
    from ..recipes import Recipe

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True, rich_markup_mode=None)

File = typer.Argument(metavar="FILE", help="A recipe file.")


def list_(
    model: str = typer.Argument(None, metavar="[MODEL]", help="Only those that fit this model."),
    as_data: bool = Json,
) -> None:
    """The packaged recipes, one a line; with a model, those made for it.

    Loads no weights.
    """
    from ..recipes import load_recipe, packaged
    from ..tables import table, wrapped

    found = [(name, load_recipe(name)) for name in packaged()]
    reasons: dict[str, str] = {}
    if model is not None:
        from ..errors import TrainlessError
        from ..models import describe, skeleton
        from ..preview.explain import explain, fits

        empty = skeleton(describe(model))
        found = [(name, recipe) for name, recipe in found if fits(empty, recipe)]
        for name, recipe in found:
            try:
                problems = [problem.message for problem in explain(empty, recipe).problems]
            except TrainlessError as error:
                problems = [str(error)]
            if problems:
                reasons[name] = problems[0]
    if as_data:
        print(as_json([_entry(name, recipe, reasons.get(name)) for name, recipe in found]))
        return
    if not found:
        print(f"no packaged recipe is made for {model}; `trainless methods {model}` lists what fits it")
        return
    print(table([[name, recipe.description] for name, recipe in found if name not in reasons]))
    for name, reason in reasons.items():
        print(wrapped(f"{name}: not as it stands: {reason}", 0, 2))


def _entry(name: str, recipe: Recipe, reason: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "description": recipe.description,
        "fits": recipe.fits,
        "methods": [use.method.name for use in recipe.uses],
        "problem": reason,
    }


def show(
    recipe: str = typer.Argument(metavar="R", help="Packaged name or file."),
    origin: bool = typer.Option(False, "--origin", help="Where each value comes from."),
    as_data: bool = Json,
) -> None:
    """A recipe with every parameter written out."""
    from ..recipes import load_recipe

    found = load_recipe(recipe)
    if as_data:
        print(as_json([vars(entry) for entry in found.origins()] if origin else found.resolved()))
        return
    if not origin:
        print(found.to_yaml(), end="")
        return
    from ..tables import wrapped

    for entry in found.origins():
        note = f" ({entry.note})" if entry.note else ""
        print(f"{entry.path} = {entry.value!r}")
        print(wrapped(f"{entry.source}{note}", 4))


def check(file: Path = File) -> None:
    """Check a recipe file: every fault with its line, and conflicts between its methods."""
    from ..errors import Conflict, InputError
    from ..recipes import load_recipe
    from .clashes import clashes

    if not file.exists():
        raise InputError(f"cannot read recipe {str(file)!r}: there is no such file")
    found = load_recipe(str(file))
    if clashing := clashes(found):
        raise Conflict("\n".join(f"{file}: {clash}" for clash in clashing))
    methods = ", ".join(use.id for use in found.uses)
    print(f"{file}: nothing wrong; patches: {methods}")


def schema() -> None:
    """The JSON Schema of recipe files, for editors."""
    from ..recipes import json_schema

    print(as_json(json_schema()))


for _name, _function in (("list", list_), ("show", show), ("check", check), ("schema", schema)):
    app.command(_name)(guarded(_function))
