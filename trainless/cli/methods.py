"""``trainless methods``: every method, or what fits a model."""

from __future__ import annotations

import dataclasses

import typer

from .shared import table


def command(
    model: str = typer.Argument(None, help="Hub id, local folder, GGUF file, or demo:smollm2."),
) -> None:
    """Every method with its parameters; with a model, those that fit come first.

    Loads no weights.
    """
    if model is None:
        for name in _names():
            print(_entry(name))
        return
    import trainless

    from ..models import describe, skeleton

    print(trainless.methods(skeleton(describe(model))))


def _names() -> list[str]:
    from ..patchers import known

    return list(known())


def _entry(name: str) -> str:
    """A method: its name, what it does, and one line for each parameter."""
    from ..patchers import get, parameters_of

    cls = get(name)
    title = name + (f" (also {', '.join(cls.aliases)})" if cls.aliases else "")
    rows = [
        [f"{field.name}{_default(field)}", str(field.metadata.get("help", ""))]
        for field in parameters_of(cls).values()
    ]
    if cls.calibration_of is not None:
        rows.append(["calibration", "file made by `trainless calibrate`"])
    head = "\n".join([title, table([[cls.summary]], indent=2)])
    return head + ("\n" + table(rows, indent=4) if rows else "") + "\n"


def _default(field: dataclasses.Field) -> str:  # type: ignore[type-arg]
    if field.default is not dataclasses.MISSING:
        return f"={field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f"={field.default_factory()!r}"
    return " (required)"
