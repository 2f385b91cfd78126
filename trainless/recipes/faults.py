"""Collecting every fault before raising one error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CalibrationError, InputError, RecipeError, listed
from .text import At, RecipeSource

LONGEST = 200  # characters of a key that a message shows


def key_text(at: At) -> str:
    """A path as people write it: ``patches[h2o].with.heads[3]``."""
    text = ""
    for step in at:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


@dataclass(frozen=True)
class _Fault:
    order: tuple[int, int]
    text: str
    in_file: bool
    calibration: bool


class Faults:
    """Faults from any number of sources, raised together, in the order of reading."""

    def __init__(self) -> None:
        self.found: list[_Fault] = []

    def __bool__(self) -> bool:
        return bool(self.found)

    def add(
        self,
        source: RecipeSource,
        at: At,
        reason: str,
        key: str | None = None,
        line: int | None = None,
        calibration: bool = False,
    ) -> None:
        """``at`` finds the line; ``key`` is what is printed for it (default: ``at`` itself)."""
        if line is None and any(at[:n] in source.refused for n in range(len(at) + 1)):
            return  # the reader has said what is wrong here
        line = source.line(at) if line is None else line
        key = key_text(at) if key is None else key
        key = key if len(key) <= LONGEST else f"{key[: LONGEST - 3]}..."
        if source.is_file:
            text = f"{source.label}:{line} {key or 'document'}: {reason}"
        else:
            text = f"{key}: {reason}" if key else reason
        self.found.append(_Fault((source.order, line), text, source.is_file, calibration))

    def reporter(self, source: RecipeSource) -> Any:
        """A ``report(at, line, reason)`` for the reader of ``source``."""
        return lambda at, line, reason: self.add(source, at, reason, line=line)

    def raise_all(self) -> None:
        """RecipeError when a file is at fault, else CalibrationError or InputError; no fault, no error."""
        if not self.found:
            return
        texts = list(dict.fromkeys(f.text for f in sorted(self.found, key=lambda f: f.order)))
        if any(f.in_file for f in self.found):
            raise RecipeError(texts)
        if all(f.calibration for f in self.found):
            raise CalibrationError(listed(texts))
        raise InputError(listed(texts))
