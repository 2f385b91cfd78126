"""Strict conversion of plain values to annotated types, with reasons in words.

Nothing is coerced in silence: ``"4"`` is not 4, ``1.0`` is not 1, 1 is not true. An int is accepted
where a float is declared. ``int | float`` is a Budget, kept as given: 1 is one token, 1.0 everything.
"""

from __future__ import annotations

import collections.abc
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from ..errors import InputError, nearest
from ..seams import check_budget

Fault = Callable[[tuple[Any, ...], str], None]  # (path inside the value, reason)

SEQUENCES: tuple[Any, ...] = (
    list,
    tuple,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.Collection,
)
MAPPINGS: tuple[Any, ...] = (dict, collections.abc.Mapping)


def arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is none is its own only alternative."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_budget(hint: Any) -> bool:
    return {int, float} <= set(arms(hint))


def plural(hint: Any) -> str:
    names = {int: "ints", float: "numbers", str: "strings", bool: "booleans", Any: "values"}
    if hint in names:
        return names[hint]
    return f"items, each {describe(hint)}"


def describe(hint: Any) -> str:
    """What an annotation accepts, as it is said in messages."""
    names: dict[Any, str] = {int: "an int", float: "a number", bool: "true or false", str: "a string"}
    names |= {Path: "a path", type(None): "null", None: "null", Any: "any value"}
    origin, args = get_origin(hint), get_args(hint)
    try:
        if hint in names:
            return names[hint]
    except TypeError:  # an unhashable Literal argument
        pass
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        rest = [a for a in args if not (is_budget(hint) and a in (int, float))]
        said = ["tokens as an int or a fraction as a float in (0, 1]"] if is_budget(hint) else []
        said += [describe(a) for a in sorted(rest, key=lambda a: a is type(None))]
        return " or ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        return f"a list of {len(args)} ({', '.join(describe(a) for a in args)})"
    if (origin or hint) in SEQUENCES:
        return f"a list of {plural(args[0])}" if args else "a list"
    if (origin or hint) in MAPPINGS:
        return f"a mapping of {plural(args[0])} to {plural(args[1])}" if args else "a mapping"
    return getattr(hint, "__name__", str(hint))


def shown(value: Any) -> str:
    """A value as messages quote it: short, and with its kind where that is what is wrong."""
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    kind = {str: "a string", float: "a float", bool: "a boolean", type(None): "null"}.get(type(value))
    return f"null ({text})" if kind == "null" else f"{text}, {kind}" if kind else text


def of_numpy(value: Any) -> Any:
    """A number or array of numpy as Python has it; a float32 in its shortest decimals, 0.1 and not 0.10000000149."""
    if isinstance(value, np.ndarray):
        return [of_numpy(item) for item in value] if value.ndim else of_numpy(value[()])
    if isinstance(value, np.floating) and not isinstance(value, float):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def convert(hint: Any, value: Any, fault: Fault, path: tuple[Any, ...] = ()) -> Any:
    """``value`` as ``hint`` declares it; each mismatch is reported to ``fault`` and None returned for it."""
    value = of_numpy(value)
    if hint is Any:
        return value
    options = arms(hint)
    if len(options) > 1:
        return _union(hint, options, value, fault, path)
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return _literal(args, value, fault, path)
    if origin in SEQUENCES and _fits(hint, value):
        return _sequence(origin, args, value, fault, path)
    if origin in MAPPINGS and _fits(hint, value):
        key_hint, item_hint = args or (Any, Any)
        return {
            convert(key_hint, k, fault, (*path, k)): convert(item_hint, v, fault, (*path, k))
            for k, v in value.items()
        }
    if not _fits(hint, value):
        fault(path, f"must be {describe(hint)}; got {shown(value)}")
        return None
    if isinstance(value, float) and not math.isfinite(value):
        fault(path, f"must be finite; got {value}")
        return None
    for plain in (int, float, str):  # numpy scalars and enums become plain values
        if origin is plain:
            try:
                return plain(value)
            except OverflowError:
                fault(path, f"must be finite; got {shown(value)}")
                return None
    return Path(value) if origin is Path else value


def _fits(hint: Any, value: Any) -> bool:
    """Whether the outermost shape of ``value`` is that of ``hint``."""
    origin = get_origin(hint) or hint
    if origin in (None, type(None)):
        return value is None
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in SEQUENCES:
        return isinstance(value, (list, tuple))
    if origin in MAPPINGS:
        return isinstance(value, Mapping)
    if origin is Literal:
        return isinstance(value, (str, int)) and any(type(a) is type(value) for a in get_args(hint))
    if origin is Path:
        return isinstance(value, (str, Path))
    return isinstance(value, origin) if isinstance(origin, type) else True


def _literal(allowed: tuple[Any, ...], value: Any, fault: Fault, path: tuple[Any, ...]) -> Any:
    for option in allowed:
        if type(option) is type(value) and option == value:
            return option
    choose(allowed, value, fault, path)
    return None


def choose(
    allowed: Iterable[Any], value: Any, fault: Fault, path: tuple[Any, ...], said: str | None = None
) -> None:
    """Report that ``value`` is none of ``allowed``, with the nearest one; ``said``: all that is accepted."""
    allowed = list(allowed)
    close = nearest(value, [a for a in allowed if isinstance(a, str)]) if isinstance(value, str) else None
    hint = f"; did you mean {close!r}?" if close else ""
    said = said or " or ".join(repr(a) for a in allowed)
    fault(path, f"must be {said}; got {shown(value)}{hint}")


def _union(hint: Any, options: tuple[Any, ...], value: Any, fault: Fault, path: tuple[Any, ...]) -> Any:
    if is_budget(hint) and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            check_budget(str(path[0]) if path else "value", value)
        except InputError as error:
            fault(path, str(error))
            return None
        return int(value) if isinstance(value, int) else float(value)
    fitting = [a for a in options if _fits(a, value)]
    # int before float, so that an int stays one where both are allowed beside other things.
    tried: list[list[tuple[tuple[Any, ...], str]]] = []
    for option in sorted(fitting, key=lambda a: a is float):
        faults: list[tuple[tuple[Any, ...], str]] = []

        def note(where: tuple[Any, ...], why: str, into: list[tuple[tuple[Any, ...], str]] = faults) -> None:
            into.append((where, why))

        result = convert(option, value, note, path)
        if not faults:
            return result
        tried.append(faults)
    if len(fitting) == 1 and get_origin(fitting[0]) is Literal:
        choose(get_args(fitting[0]), value, fault, path, describe(hint))
    elif len(tried) == 1:
        for where, why in tried[0]:
            fault(where, why)
    else:
        fault(path, f"must be {describe(hint)}; got {shown(value)}")
    return None


def _sequence(origin: Any, args: tuple[Any, ...], value: Any, fault: Fault, path: tuple[Any, ...]) -> Any:
    fixed = origin is tuple and args and not (len(args) == 2 and args[1] is Ellipsis)
    if fixed and len(args) != len(value):
        fault(path, f"must be {describe(tuple[args])}; got {shown(value)}")  # type: ignore[valid-type]
        return None
    hints = args if fixed else [args[0] if args else Any] * len(value)
    items = [convert(h, v, fault, (*path, i)) for i, (h, v) in enumerate(zip(hints, value, strict=True))]
    return origin(items) if origin in (tuple, set, frozenset) else items


def plain(value: Any) -> Any:
    """``value`` as YAML and JSON know it: lists for tuples and sets, strings for paths."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, resolved; not to be changed: it is done once for a class."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)
