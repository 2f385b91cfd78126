"""``recommend``: which method for which goal, by what was measured of it, and what it costs.

The table is data: ``advice.json``, written by ``docs/generate.py`` from ``docs/goals.yaml`` and the results of
the benchmarks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from ..errors import InputError, TrainlessError, did_you_mean
from ..hosts import components
from ..tables import table, wrapped
from .explain import explain


@dataclass(frozen=True)
class Advice:
    """One method for a goal. ``what`` is what ``patch`` takes; ``fits`` is None unless a model was given."""

    label: str
    what: dict[str, Any]
    figures: dict[str, str]
    cost: str
    fits: bool | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def options(self) -> str:
        """The options of a command that ask for it."""
        name = self.what["use"]
        sets = [f"--set {name}.{key}={_text(value)}" for key, value in self.what["with"].items()]
        return " ".join([f"--patch {name}", *sets])


@dataclass(frozen=True)
class Goal:
    """What somebody wants, and the methods to try for it, the first first. baseline: the unpatched model's figures."""

    name: str
    title: str
    advice: str
    measured: str
    baseline: dict[str, str]
    options: tuple[Advice, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "options": [option.to_dict() for option in self.options]}

    def __str__(self) -> str:
        head = f"{self.title} (--goal {self.name})"
        columns = list(self.options[0].figures) if self.options else []
        rows = [["", *columns]]
        if self.baseline:
            rows.append(["unpatched", *self.baseline.values()])
        rows += [
            [option.label, *option.figures.values()] for option in self.options if option.fits is not False
        ]
        figures = table([[*row, ""] for row in rows], 2, tuple(range(1, len(columns) + 1)))
        lines = [head, wrapped(self.advice, 2)]
        if len(rows) > 1 + bool(self.baseline):
            lines += [figures, wrapped(f"measured: {self.measured}", 2, 4)]
        else:
            lines.append("  none of them fits this model as it stands:")
        for option in self.options:
            lines.append(f"  {option.label}")
            if option.fits is False:
                lines.append(wrapped(f"not as it stands: {option.reason}", 4, 6))
            else:
                lines.append(wrapped(option.cost, 4))
                lines.append(wrapped(option.options, 4, 6))
        return "\n".join(lines)


class Recommendation(list[Goal]):
    """The answer of ``recommend``: a list that prints as one table for each goal."""

    def __str__(self) -> str:
        return "\n\n".join(str(goal) for goal in self)

    def to_dict(self) -> list[dict[str, Any]]:
        return [goal.to_dict() for goal in self]


def recommend(model: Any = None, goal: str | None = None) -> Recommendation:
    """Methods by goal, with what was measured of each and what it costs; with a model, those that fit it first.

    model: as for ``patch``, without weights too; then goals for which nothing fits are left out unless
    ``goal`` names one. Raises InputError for an unknown goal, with the nearest.
    """
    names = [entry["name"] for entry in _goals()]
    if goal is not None and goal not in names:
        raise InputError(f"unknown goal {goal!r}{did_you_mean(str(goal), names)}")
    if model is not None:
        components(model)  # something that is no model is an error, not a method that does not fit
    found = [_goal(entry, model) for entry in _goals() if goal in (None, entry["name"])]
    if model is not None and goal is None:
        found = [one for one in found if any(option.fits for option in one.options)]
    return Recommendation(found)


@cache
def _goals() -> list[dict[str, Any]]:
    text = files(__package__).joinpath("advice.json").read_text(encoding="utf-8")
    loaded: list[dict[str, Any]] = json.loads(text)["goals"]
    return loaded


def _goal(entry: dict[str, Any], model: Any) -> Goal:
    options = [Advice(**option) for option in entry["options"]]
    if model is not None:
        options = sorted((_judged(option, model) for option in options), key=lambda option: not option.fits)
    return Goal(**{**entry, "options": tuple(options)})


def _judged(option: Advice, model: Any) -> Advice:
    try:
        problems = [problem.message for problem in explain(model, option.what).problems]
    except TrainlessError as error:
        problems = [str(error)]
    return Advice(**{**vars(option), "fits": not problems, "reason": problems[0] if problems else ""})


def _text(value: Any) -> str:
    return json.dumps(value).replace(" ", "") if not isinstance(value, str) else value
