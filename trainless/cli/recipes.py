"""``trainless recipes``: what comes with the package, what a recipe says, whether a file is right."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from .shared import guarded, table

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True, rich_markup_mode=None)


def list_() -> None:
    """The packaged recipes, one a line."""
    from ..recipes import load_recipe, packaged

    print(table([[name, load_recipe(name).description] for name in packaged()]))


def show(
    recipe: str = typer.Argument(help="Packaged name or file."),
    origin: bool = typer.Option(False, "--origin", help="Where each value comes from."),
) -> None:
    """A recipe with every parameter written out."""
    from ..recipes import load_recipe

    found = load_recipe(recipe)
    if not origin:
        print(found.to_yaml(), end="")
        return
    for entry in found.origins():
        note = f" ({entry.note})" if entry.note else ""
        print(table([[f"{entry.path} = {entry.value}", f"{entry.source}{note}"]]))


def check(file: Path = typer.Argument(help="A recipe file.")) -> None:
    """Check a recipe file: every fault with its line, and conflicts between its methods."""
    from ..errors import Conflict, InputError
    from ..recipes import load_recipe

    if not file.exists():
        raise InputError(f"cannot read recipe {str(file)!r}: there is no such file")
    found = load_recipe(str(file))
    clashes = _conflicts(found)
    if clashes:
        raise Conflict("\n".join(f"{file}: {clash}" for clash in clashes))
    methods = ", ".join(use.id for use in found.uses)
    print(f"{file}: right; {len(found.uses)} patches ({methods})")


def schema() -> None:
    """The JSON Schema of recipe files, for editors."""
    from ..recipes import json_schema

    print(json.dumps(json_schema(), indent=2))


for _name, _function in (("list", list_), ("show", show), ("check", check), ("schema", schema)):
    app.command(_name)(guarded(_function))
