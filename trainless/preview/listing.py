"""``methods()``: every method as data, and for a model which of them fit it and why the others do not."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, NoMatch, TrainlessError, Unsupported
from ..hosts import Component, components, find_sites, module_sites
from ..patch.binding import match
from ..patchers import Method, broken, get, known, parameters_of
from ..recipes.typed import plain
from ..seams import Site
from ..tables import table, wrapped

WORDS = ("What", "Source", "Seams", "Exact", "Costs", "Differs")  # at the head of a method's file


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter. origin: "published" or "ours", where the default comes from."""

    name: str
    required: bool
    default: Any
    origin: str
    help: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class MethodInfo:
    """One method. ``fits`` is None unless a model was given; then sites/of count its attention sites.

    reason: why it does not fit. note: what it needs before it can be applied to this model. exact, costs:
    what its file says under these words.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    source: str
    hosts: tuple[str, ...]
    identity: dict[str, Any] | None
    calibration: str | None
    parameters: tuple[ParameterInfo, ...]
    exact: str = ""
    costs: str = ""
    fits: bool | None = None
    reason: str = ""
    note: str = ""
    sites: int = 0
    of: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "parameters": [p.to_dict() for p in self.parameters]}

    def __str__(self) -> str:
        names = self.name + (f" (also {', '.join(self.aliases)})" if self.aliases else "")
        if self.fits is False:
            return "\n".join([names, wrapped(f"does not fit: {self.reason}", 2, 4)])
        counted = f": {self.sites}/{self.of} sites" if self.fits else ""
        lines = [names + counted, wrapped(self.summary, 2)]
        if self.note:
            lines.append(wrapped(f"note: {self.note}", 2, 4))
        rows = [[_shown(p), p.help] for p in self.parameters]
        if self.calibration is not None and "calibration" not in {p.name for p in self.parameters}:
            rows.append(["calibration", "file made by `trainless calibrate`"])
        return "\n".join([*lines, table(rows, indent=4)])

    def detail(self) -> str:
        """Everything about the method: what it changes nothing at, what it costs, every parameter with its origin."""
        head = self.name + (f" (also {', '.join(self.aliases)})" if self.aliases else "")
        about = [["source", self.source], ["library", ", ".join(self.hosts)]]
        if self.identity is not None:
            values = ", ".join(f"{k}={v!r}" for k, v in self.identity.items())
            about.append(["identity", values or "see exact"])
        about += [[word, text] for word, text in (("exact", self.exact), ("costs", self.costs)) if text]
        if self.calibration is not None:
            about.append(["calibration", "a file made by `trainless calibrate`"])
        rows = [[_shown(p), f"{p.help} ({p.origin})"] for p in self.parameters]
        return "\n".join([head, wrapped(self.summary, 2), table(about, 2), "  parameters", table(rows, 4)])


class Methods(list[MethodInfo]):
    """The answer of ``methods()``: a list that prints as one entry for each method."""

    def __str__(self) -> str:
        plugins = [wrapped(f"not usable: {plugin}", 0, 2) for plugin in broken()]
        return "\n\n".join([*(str(info) for info in self), *plugins])

    def to_dict(self) -> list[dict[str, Any]]:
        return [info.to_dict() for info in self]


def method_info(name: str) -> MethodInfo:
    """One method by its name or an alias; InputError with the nearest names."""
    return _info(get(name))


def methods(model: Any = None) -> Methods:
    """Every method with its parameters; with a model, those that fit it first, then the others with the reason.

    A method fits when it finds sites; what it needs beyond that (a parameter without a default, a trained
    size) is its ``note``. The model may be on the meta device. Raises InputError for what is no model.
    """
    infos = [_info(cls) for cls in known().values()]
    if model is None:
        return Methods(infos)
    parts = components(model)
    try:
        sites: list[Site] | Unsupported = find_sites(parts)
    except Unsupported as error:
        sites = error
    judged = [
        _judged(info, cls, model, parts, sites) for info, cls in zip(infos, known().values(), strict=True)
    ]
    return Methods(sorted(judged, key=lambda info: not info.fits))


def _info(cls: type[Method]) -> MethodInfo:
    return MethodInfo(
        cls.name, cls.aliases, cls.summary, cls.source, tuple(sorted(cls.hosts)),
        None if cls.identity is None else dict(cls.identity), cls.calibration_of,
        tuple(_parameter(f) for f in parameters_of(cls).values()),
        exact=" ".join(header(cls).get("Exact", [])), costs=" ".join(header(cls).get("Costs", [])),
    )  # fmt: skip


def header(cls: type[Method]) -> dict[str, list[str]]:
    """What a method's file says at its head: word → its paragraphs, list items one by one."""
    text = getattr(sys.modules.get(cls.__module__), "__doc__", None) or ""
    found: dict[str, list[str]] = {}
    word = ""
    for line in text.splitlines()[1:]:
        start = re.match(rf"({'|'.join(WORDS)})  +(.*)", line)  # a sentence may begin with such a word
        body = start[2] if start else line.strip()
        if start:
            word = start[1]
            found[word] = []
        if not word or not body:
            continue
        if body.startswith("- "):
            found[word].append(body[2:])
        elif found[word]:
            found[word][-1] += " " + body
        else:
            found[word].append(body)
    return found


def _parameter(field: dataclasses.Field[Any]) -> ParameterInfo:
    default, required = field.default, False
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif default is dataclasses.MISSING:
        default, required = None, True
    meta = field.metadata
    origin, text = str(meta.get("origin", "ours")), str(meta.get("help", ""))
    return ParameterInfo(field.name, required, plain(default), origin, text)


def _shown(parameter: ParameterInfo) -> str:
    return f"{parameter.name} (required)" if parameter.required else f"{parameter.name}={parameter.default!r}"


def _judged(
    info: MethodInfo,
    cls: type[Method],
    model: Any,
    parts: list[Component],
    sites: list[Site] | Unsupported,
) -> MethodInfo:
    if isinstance(sites, Unsupported):
        return dataclasses.replace(info, fits=False, reason=str(sites))
    pool = module_sites(parts) if cls.site_kind == "module" else sites
    try:
        method, missing = with_least(cls)
        found = match(model, parts, pool, method)
    except NoMatch as error:
        return dataclasses.replace(info, fits=False, reason=str(error).removeprefix(f"{cls.name}: "))
    except Exception as error:  # a plug-in's own code; the others are still listed
        return dataclasses.replace(info, fits=False, reason=f"its own code failed ({_said(error)})")
    note = f"needs {', '.join(missing)}" if missing else _needs(method, found.sites)
    return dataclasses.replace(info, fits=True, note=note, sites=len(found.sites), of=found.candidates)


def _needs(method: Method, sites: list[Site]) -> str:
    """What stands in the way of applying the method with its defaults, or ""."""
    try:
        method.check()
        method.validate(sites)
        chosen = [site for site in sites if method.wants_layer(site)]
        if not chosen:
            return f"its default parameters leave none of these {len(sites)} layers"
        if not any(method.contribute(site) for site in chosen):
            return "with its default parameters it does nothing here"
    except InputError as error:
        return str(error).removeprefix(f"{method.name}: ")
    except TrainlessError as error:
        return str(error)
    except Exception as error:  # a plug-in's own code
        return f"its own code fails here ({_said(error)})"
    return ""


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def with_least(cls: type[Method]) -> tuple[Method, list[str]]:
    """The method with its defaults, and the parameters that have none.

    Those are filled from the identity values where they can be; sites are asked for before parameters
    matter, so a method whose parameters are still missing can say where it fits.
    """
    given: dict[str, Any] = {}
    missing = []
    for name, field in parameters_of(cls).items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing.append(name)
            given[name] = (cls.identity or {}).get(name)
    return cls(**given), missing
