"""``trainless methods``: every method, one of them, or what fits a model."""

from __future__ import annotations

import typer

from .shared import Json, as_json


def command(
    model: str = typer.Argument(
        None, metavar="[MODEL|METHOD]", help="Hub id, folder, GGUF file, demo:NAME; or a method's name."
    ),
    json: bool = Json,
) -> None:
    """Every method with its parameters; with a model, those that fit come first.

    With a method's name: that one, with what it costs and what it changes nothing at.
    Loads no weights.
    """
    from ..patchers import broken, known
    from ..preview.listing import method_info, methods

    if model in known(aliases=True) or model in {plugin.name for plugin in broken()}:
        one = method_info(model)
        print(as_json(one) if json else one.detail())
        return
    if model is None:
        found = methods()
    else:
        from ..errors import InputError, near
        from ..models import describe, skeleton

        try:
            description = describe(model)
        except InputError as error:
            close = near(model, known(aliases=True))
            hint = f"; or did you mean the method {close[0]!r}?" if close and "/" not in model else ""
            raise InputError(f"{error}{hint}") from None
        found = methods(skeleton(description))
    print(as_json(found) if json else found)
