"""The keys of a recipe: from plain data to drafts, base recipes first."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, did_you_mean, nearest
from ..patchers import Method, get, known, unknown
from .draft import Draft, GivenPatches
from .faults import Faults
from .text import At, RecipeSource
from .typed import shown

SCHEMA = 1
TOP = ("schema", "name", "description", "extends", "fits", "patches")
PATCH = ("use", "with", "where", "id")
FITS = ("model_type", "pipeline")
IDENTIFIER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

Fits = dict[str, list[str]]


@dataclass
class Parsed:
    """What a recipe says, its bases merged in. ``method`` marks a lone method's name."""

    name: str
    description: str = ""
    fits: Fits | None = None
    drafts: list[Draft] = field(default_factory=list)


# extends: (target, its Given) -> what that recipe says, or None after a fault
Opener = Callable[[str, GivenPatches], "Parsed | None"]


class Structure:
    """Reads one mapping; every fault goes to ``faults`` and reading goes on."""

    def __init__(self, source: RecipeSource, faults: Faults, opener: Opener):
        self.source, self.faults, self.opener = source, faults, opener
        self.broken = False  # whether a base recipe is missing

    def fault(self, at: At, reason: str, key: str | None = None) -> None:
        self.faults.add(self.source, at, reason, key=key)

    def mapping(self, data: Any, at: At, key: str, keys: tuple[str, ...]) -> dict[str, Any]:
        """``data`` when it is a mapping, without its unknown keys."""
        if not isinstance(data, Mapping):
            self.fault(at, f"must be a mapping with {', '.join(keys)}; got {shown(data)}", key)
            return {}
        for name in data:
            if name not in keys:
                inner = f"{key}.{name}" if key else str(name)
                self.fault((*at, name), f"unknown key{did_you_mean(str(name), keys)}", inner)
        return {k: v for k, v in data.items() if k in keys}

    def text(self, data: Mapping[str, Any], at: At, name: str, key: str | None = None) -> str | None:
        value = data.get(name)
        if name in data and (not isinstance(value, str) or not value.strip()):
            self.fault((*at, name), f"must be a string; got {shown(value)}", key)
            return None
        return value

    def recipe(self, data: Any, name: str) -> Parsed:
        top = self.mapping(data, (), "", TOP)
        result = Parsed(self.text(top, (), "name") or name)
        if isinstance(data, Mapping):
            version = top.get("schema")
            if "schema" not in top:
                self.fault((), f"is required: write `schema: {SCHEMA}`", "schema")
            elif type(version) is not int or version != SCHEMA:
                self.fault(
                    ("schema",), f"must be {SCHEMA}, the schema this version reads; got {shown(version)}"
                )
        bases = self.bases(top)
        result.description = self.text(top, (), "description") or next(
            (b.description for b in bases if b.description), ""
        )
        given = [b.fits for b in bases if b.fits is not None]
        result.fits = self.fits(top) if "fits" in top else self.meet(given)
        merged: dict[str, Draft] = {}
        for draft in [d for b in bases for d in b.drafts] + self.patches(top, isinstance(data, Mapping)):
            base = merged.get(draft.id)
            if base is not None and base.cls is not draft.cls:
                self.fault(
                    draft.at,
                    f"{draft.id!r} is a patch of {base.cls.name} in the base recipe; choose another id",
                    draft.key,
                )
            merged[draft.id] = base.merged(draft) if base is not None else draft
        result.drafts = [d.copy(partial=d.partial or self.broken) for d in merged.values()]
        return result

    def meet(self, given: list[Fits]) -> Fits | None:
        if not given:
            return None
        both = intersect(given)
        if not both:
            self.fault(("extends",), "the base recipes fit no model in common; say what this one `fits`")
        return both or None

    def bases(self, top: Mapping[str, Any]) -> list[Parsed]:
        if "extends" not in top:
            return []
        value = top["extends"]
        targets = value if isinstance(value, list) else [value]
        if not targets:
            self.fault(("extends",), "must name at least one recipe; got an empty list")
        found = []
        for i, target in enumerate(targets):
            at: At = ("extends", i) if isinstance(value, list) else ("extends",)
            given = GivenPatches(
                target, self.source, at, "extends" + (f"[{i}]" if isinstance(value, list) else "")
            )
            if not isinstance(target, str) or not target.strip():
                given.fault(self.faults, (), f"must name a recipe; got {shown(target)}")
                self.broken = True
                continue
            parsed = self.opener(target, given)
            if parsed is None:
                self.broken = True
            else:
                found.append(parsed)
        return found

    def fits(self, top: Mapping[str, Any]) -> Fits | None:
        fits = self.mapping(top["fits"], ("fits",), "fits", FITS)
        if isinstance(top["fits"], Mapping) and not top["fits"]:
            self.fault(("fits",), f"must have {' or '.join(FITS)}")
        result: Fits = {}
        for kind, names in fits.items():
            if not isinstance(names, list) or not names:
                self.fault(("fits", kind), f"must be a list of names; got {shown(names)}")
                continue
            for i, item in enumerate(names):
                if not isinstance(item, str) or not item:
                    self.fault(("fits", kind, i), f"must be a string; got {shown(item)}")
            result[kind] = [n for n in names if isinstance(n, str)]
        return result or None

    def patches(self, top: Mapping[str, Any], is_mapping: bool) -> list[Draft]:
        patches = top.get("patches")
        if "patches" not in top:
            if is_mapping:
                self.fault((), "is required: a list of at least one `use: METHOD`", "patches")
            return []
        if not isinstance(patches, list) or not patches:
            self.fault(("patches",), f"must be a list with at least one patch; got {shown(patches)}")
            return []
        drafts: dict[str, Draft] = {}
        for i, item in enumerate(patches):
            draft = self.patch(item, ("patches", i), f"patches[{i}]")
            if draft is None:
                continue
            if draft.id in drafts:
                first = drafts[draft.id]
                place = f"line {self.source.line(first.at)}" if self.source.is_file else first.key
                self.fault(
                    draft.at,
                    f"{draft.id!r} is already the patch in {place}; give one an `id`",
                    f"patches[{i}]",
                )
            else:
                drafts[draft.id] = draft
        return list(drafts.values())

    def patch(self, item: Any, at: At, key: str) -> Draft | None:
        """One ``{use, with, where, id}``; ``key`` names it until its id is known."""
        data = self.mapping(item, at, key, PATCH)
        if not isinstance(item, Mapping):
            return None
        cls = self.method(data, at, f"{key}.use" if key else "use")
        name = self.text(data, at, "id", f"{key}.id" if key else "id")
        if name is not None and not IDENTIFIER.fullmatch(name):
            self.fault((*at, "id"), f"{name!r} must consist of letters, digits, _ and -", f"{key}.id")
            name = None
        if cls is not None and name is not None and known(aliases=True).get(name, cls) is not cls:
            self.fault((*at, "id"), f"{name!r} is the name of another method", f"{key}.id")
        label = name or (cls.name if cls is not None else None)
        base = f"{key.split('[')[0]}[{label}]" if label and key else label or key
        given = {}
        for part in ("with", "where"):
            given[part] = self.given(data, part, at, f"{base}.{part}" if base else part)
        if cls is None:
            return None
        return Draft(
            name or cls.name,
            cls,
            self.source,
            at,
            base,
            name is not None,
            given=given["with"],
            where=given["where"],
        )

    def given(self, data: Mapping[str, Any], part: str, at: At, key: str) -> dict[str, GivenPatches]:
        if part not in data:
            return {}
        if not isinstance(data[part], Mapping):
            self.fault((*at, part), f"must be a mapping; got {shown(data[part])}", key)
            return {}
        return {k: GivenPatches(v, self.source, (*at, part, k), f"{key}.{k}") for k, v in data[part].items()}

    def method(self, data: Mapping[str, Any], at: At, key: str) -> type[Method] | None:
        if "use" not in data:
            self.fault(at, "is required: the name of a method", key)
            return None
        use = data["use"]
        if not isinstance(use, str):
            self.fault((*at, "use"), f"must be the name of a method; got {shown(use)}", key)
            return None
        try:
            return get(use)
        except InputError:
            self.fault((*at, "use"), unknown(use, known(aliases=nearest(use, known()) is None)), key)
            return None


def intersect(given: list[Fits]) -> Fits:
    """The models that fit all of ``given``; empty when there are none."""
    kinds = [k for k in FITS if all(k in f for f in given)]
    common = {k: [n for n in given[0][k] if all(n in f[k] for f in given)] for k in kinds}
    return {k: names for k, names in common.items() if names}
