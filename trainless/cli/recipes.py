"""``trainless recipes``: what comes with the package, what a recipe says, whether a file is right."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from .shared import guarded

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True, rich_markup_mode=None)

File = typer.Argument(metavar="FILE", help="A recipe file.")


def list_() -> None:
    """The packaged recipes, one a line."""
    from ..recipes import load_recipe, packaged
    from ..tables import table

    print(table([[name, load_recipe(name).description] for name in packaged()]))


def show(
    recipe: str = typer.Argument(metavar="R", help="Packaged name or file."),
    origin: bool = typer.Option(False, "--origin", help="Where each value comes from."),
) -> None:
    """A recipe with every parameter written out."""
    from ..recipes import load_recipe

    found = load_recipe(recipe)
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

    print(json.dumps(json_schema(), indent=2))


for _name, _function in (("list", list_), ("show", show), ("check", check), ("schema", schema)):
    app.command(_name)(guarded(_function))
