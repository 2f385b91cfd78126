"""``trainless methods``: every method, or what fits a model."""

from __future__ import annotations

import typer


def command(
    model: str = typer.Argument(None, metavar="[MODEL]", help="Hub id, folder, GGUF file, or demo:NAME."),
) -> None:
    """Every method with its parameters; with a model, those that fit come first.

    Loads no weights.
    """
    from ..listing import methods

    if model is None:
        print(methods())
        return
    from ..models import describe, skeleton

    print(methods(skeleton(describe(model))))
