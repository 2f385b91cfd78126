"""From plain values to a method: the one place where parameters are read.

Python keywords, YAML and ``--set`` all come through :func:`build`, so they accept the same things and
say the same when they refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import InputError, did_you_mean
from ..patchers import Method
from .typed import Fault, choose, convert, hints_of, is_budget, plain

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], fault: Fault) -> T | None:
    """A ``cls`` (a dataclass of parameters) made of ``values``, or None after reporting every fault.

    ``fault(path, reason)`` gets a path that starts with the parameter's name and is empty when the
    fault belongs to no single parameter. When all types are right, ``check()`` of the instance has the
    last word.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints, owner = hints_of(cls), getattr(cls, "name", cls.__name__)
    found: list[tuple[tuple[Any, ...], str]] = []

    def note(path: tuple[Any, ...], reason: str) -> None:
        found.append((path, reason))

    given: dict[str, Any] = {}
    values = _without_replaced(cls, values, note)
    for key, value in values.items():
        if key not in fields:
            kind = f"parameter of {owner}" if issubclass(cls, Method) else "key"
            note((key,), f"unknown {kind}{_parameters(key, fields)}")
            continue
        faults_before = len(found)
        given[key] = convert(hints[key], value, note, (key,))
        if len(found) == faults_before:
            _bounds(fields[key].metadata, given[key], note, (key,))
    for name, field in fields.items():
        if name in given:
            continue
        if not _needed(field):
            given[name] = _default(field, hints[name])
        elif name not in values:
            note((), f"needs {name!r} ({field.metadata.get('help', 'no default')})")
    if not found:
        try:
            return _checked(cls(**given))
        except InputError as error:
            note(*_placed(str(error), fields))
    for path, reason in found:
        fault(path, _short(reason, path, {**values, **given}))
    return None


def _checked(made: T) -> T:
    check = getattr(made, "check", None)
    if check is not None:
        check()
    return made


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _without_replaced(cls: type, values: Mapping[str, Any], fault: Fault) -> Mapping[str, Any]:
    """The values without those that are null because another parameter stands in their place."""
    for name, others in getattr(cls, "instead", {}).items():
        both = [other for other in others if values.get(other) is not None]
        if values.get(name) is not None and both:
            named = " and ".join(both)
            fault(
                (name,), f"{name}={values[name]!r}: stands in the place of {named}, so give {name} or {named}"
            )
        values = {k: v for k, v in values.items() if k not in others or v is not None}
    return values


def _parameters(key: Any, fields: Mapping[str, Any]) -> str:
    return did_you_mean(str(key), fields) if fields else "; it has none"


def _default(field: dataclasses.Field[Any], hint: Any) -> Any:
    """A default in its declared type (5 for a float is 5.0), so that saving and loading agree."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    wrong: list[str] = []
    typed = convert(hint, value, lambda path, reason: wrong.append(reason))
    return value if wrong else typed


def _bounds(meta: Mapping[str, Any], value: Any, fault: Fault, path: tuple[Any, ...]) -> None:
    """Check ``low``, ``high`` and ``choices`` for a value, or for each element of a list."""
    if isinstance(value, (list, tuple, set, frozenset)):
        for i, item in enumerate(value):
            _bounds(meta, item, fault, (*path, i))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _bounds(meta, item, fault, (*path, key))
    elif value is not None:
        if meta.get("choices") is not None and value not in meta["choices"]:
            choose(meta["choices"], value, fault, path)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = meta.get("low"), meta.get("high")
            if low is not None and value < low:
                fault(path, f"must be at least {low}; got {value}")
            if high is not None and value > high:
                fault(path, f"must be at most {high}; got {value}")


def _placed(message: str, fields: Mapping[str, Any]) -> tuple[tuple[Any, ...], str]:
    """A message of ``check()`` with the parameter it begins with, where it begins with one."""
    head = message.split("=", 1)[0].split(" ", 1)[0].split("[", 1)[0].rstrip(":,")
    return ((head,), message) if head in fields else ((), message)


def _short(reason: str, path: tuple[Any, ...], values: Mapping[str, Any]) -> str:
    """The reason without the name that is printed before it: ``x=3: …`` becomes ``got 3: …``."""
    if path and reason.startswith(f"{path[0]}: "):
        return reason[len(str(path[0])) + 2 :]
    start = f"{path[0]}={values.get(path[0])!r}: " if path else ""
    if not start or not reason.startswith(start):
        return reason
    return f"got {values.get(path[0])!r}: {reason[len(start) :]}"


def values_of(instance: Any) -> dict[str, Any]:
    """The parameters of a method (or Where) as plain data, without those in whose place another stands."""
    replaced = {
        other for name, others in getattr(instance, "instead", {}).items()
        if getattr(instance, name) is not None for other in others
    }  # fmt: skip
    return {
        f.name: plain(getattr(instance, f.name))
        for f in dataclasses.fields(instance)
        if f.init and f.name not in replaced
    }


def understood(cls: type, name: str, value: Any) -> str:
    """How a value was understood: ``64 tokens``, ``20 % of the prompt``, or the value itself."""
    if is_budget(hints_of(cls)[name]) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float):
            return f"{100 * value:.6g} % of the prompt" + (" (everything)" if value == 1.0 else "")
        return f"{value} token" if value == 1 else f"{value} tokens"
    return "null" if value is None else str(value)
