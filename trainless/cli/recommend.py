"""``trainless recommend``: which method for which goal, by what was measured."""

from __future__ import annotations

import typer

from .shared import Json, as_json


def command(
    model: str = typer.Argument(None, metavar="[MODEL]", help="Those that fit this model come first."),
    goal: str = typer.Option(None, "--goal", metavar="GOAL", help="Only this one, such as memory."),
    json: bool = Json,
) -> None:
    """Which method for which goal: measured figures, and what each costs.

    Goals: memory, length, generation, speed, hallucination, size, picture-cost.
    The figures are from this project's own small models; `trainless bench`
    measures yours. Loads no weights.
    """
    from ..preview.advice import recommend

    empty = None
    if model is not None:
        from ..models import describe, skeleton

        recommend(goal=goal)  # an unknown goal is said before anything is read
        empty = skeleton(describe(model))
    found = recommend(empty, goal)
    if not found:
        print(f"nothing that was measured here fits {model}; `trainless methods {model}` lists what does")
        return
    print(as_json(found) if json else found)
