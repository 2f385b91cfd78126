"""A resolved recipe: methods with all their parameters, and where each value came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..patchers import parameters_of
from .draft import Draft, Use
from .structure import SCHEMA, Fits
from .text import write
from .values import understood, values_of


@dataclass(frozen=True)
class Origin:
    """One value, e.g. ``h2o.recent``, and its source: a default, ``file:line``, ``--set`` or Python.

    note: the comment on that line of the file, or for a published default the paper or code.
    """

    path: str
    value: Any
    source: str
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """What :func:`trainless.recipes.resolve` returns. ``uses`` are in the order of the recipe."""

    name: str
    uses: list[Use]
    fits: Fits | None = None
    description: str = ""
    drafts: list[Draft] = dataclasses.field(default_factory=list, repr=False, compare=False)
    # --set arguments as (use id, parameter)
    overrides: list[tuple[str, str]] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def resolved(self) -> dict[str, Any]:
        """Plain data with every parameter written out; loading it gives this recipe again."""
        data: dict[str, Any] = {"schema": SCHEMA, "name": self.name}
        if self.description:
            data["description"] = self.description
        if self.fits:
            data["fits"] = self.fits
        return {**data, "patches": [use.resolved() for use in self.uses]}

    def to_yaml(self) -> str:
        """``resolved()`` as the text of a recipe file."""
        return write(self.resolved())

    @property
    def digest(self) -> str:
        """64 hex digits that depend on what is patched and how, and on nothing else.

        Methods, parameters, ``where``, their order, and the contents (not the path) of calibration
        files count; name, description, ids and ``fits`` do not.
        """
        text = json.dumps([use.fingerprint() for use in self.uses], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def origins(self) -> list[Origin]:
        """Every parameter of every patch and where its value came from."""
        found = []
        for use, draft in zip(self.uses, self.drafts, strict=True):
            values, fields = values_of(use.method), parameters_of(type(use.method))
            if use.calibration is not None:
                values["calibration"] = str(use.calibration)
            for name, value in values.items():
                path, given = f"{use.id}.{name}", draft.given.get(name)
                if given is not None:
                    found.append(
                        Origin(path, value, given.source.origin(given.at), given.source.note(given.at))
                    )
                elif name in use.from_calibration:
                    found.append(Origin(path, "as calibrated", str(use.calibration)))
                else:
                    kind = fields[name].metadata.get("origin", "ours")
                    note = use.method.source if kind == "published" else ""
                    found.append(Origin(path, value, f"default ({kind})", note))
            for name, value in use.where.given().items():
                given = draft.where[name]
                source = given.source
                found.append(
                    Origin(f"{use.id}.where.{name}", value, source.origin(given.at), source.note(given.at))
                )
        return found

    def understood(self) -> list[str]:
        """One line for each ``--set``: ``h2o.recent = 64 tokens``."""
        uses = {use.id: use for use in self.uses}
        lines = []
        for id_, name in self.overrides:
            use = uses[id_]
            if name.startswith("where."):
                lines.append(f"{id_}.{name} = {use.where.given()[name.removeprefix('where.')]}")
            elif name == "calibration":
                lines.append(f"{id_}.{name} = {use.calibration}")
            else:
                lines.append(
                    f"{id_}.{name} = {understood(type(use.method), name, values_of(use.method)[name])}"
                )
        return lines

    def check_fits(self, *names: str) -> None:
        """InputError unless the recipe fits a model that answers to one of ``names``.

        ``names``: the model's types (a vision-language model has its own and its text model's), or the
        pipeline's class and the classes it derives from.
        """
        if self.fits is None:
            return
        accepted = [name for group in self.fits.values() for name in group]
        if not set(names) & set(accepted):
            kinds = "; ".join(f"{kind} {_some(group)}" for kind, group in self.fits.items())
            it = " / ".join(names) or "of no type that a recipe can name"
            raise InputError(f"recipe {self.name} fits {kinds}; this model is {it}")


def _some(names: list[str], most: int = 8) -> str:
    """The first names of a list, and how many there are besides."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (
        f" and {rest} others" if rest > 1 else "".join(f", {n}" for n in names[most:])
    )
