"""Which layers a user means by ``"2:-1"``, ``-1`` or ``[0, 4]``; one rule for methods and recipes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import InputError

Layers = str | int | Sequence[int]

_SLICE = re.compile(r"\s*(-?\d{1,9})?\s*:\s*(-?\d{1,9})?\s*(?::\s*(-?\d{1,9})?\s*)?")


def check_layers(spec: Layers, name: str = "layers") -> None:
    """InputError unless ``spec`` is a Python slice in a string, an int or a list of ints."""
    if isinstance(spec, str):
        _parse(spec, name)
        return
    for number in [spec] if isinstance(spec, int) else spec:
        if isinstance(number, bool) or not isinstance(number, int):
            raise InputError(f"{name}={spec!r}: give a slice such as '2:-1', an int or a list of ints")


def layer_numbers(spec: Layers, count: int, name: str = "layers") -> list[int]:
    """The layers that ``spec`` names among ``count`` layers, ascending, each once.

    A slice follows Python's rules, so its ends may lie outside and it may be empty; a layer given by
    its number must exist, and InputError says how many there are.
    """
    check_layers(spec, name)
    if isinstance(spec, str):
        return sorted(range(count)[_parse(spec, name)])
    numbers = [spec] if isinstance(spec, int) else list(spec)
    missing = [n for n in numbers if not -count <= n < count]
    if missing:
        gone = ", ".join(map(str, missing))
        raise InputError(
            f"{name}={spec!r}: layer {gone} does not exist; there are {count} layers, "
            f"0 to {count - 1} (or {-count} to -1)"
        )
    return sorted({n % count for n in numbers})


def _parse(text: str, name: str) -> slice:
    match = _SLICE.fullmatch(text)
    if match is None:
        fix = f"; for one layer write {text.strip()}" if re.fullmatch(r"\s*-?\d+\s*", text) else ""
        raise InputError(f"{name}={text!r}: not a Python slice such as '2:-1' or '::2'{fix}")
    start, stop, step = (int(part) if part else None for part in match.groups())
    if step == 0:
        raise InputError(f"{name}={text!r}: the step of a slice cannot be 0")
    return slice(start, stop, step)
