"""One hierarchy of errors. Each message says the state, the cause and the fix, in a line or two."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TrainlessError(Exception):
    """Base of every error this package raises on purpose."""


class NoMatch(TrainlessError):
    """A method found nothing to bind to. A patch that would do nothing is never applied."""


class Conflict(TrainlessError):
    """Two methods want the same thing at the same site. Names both and the seam."""


class Unsupported(TrainlessError):
    """The thing was found, but cannot be patched. Names it and says why."""


class RecipeError(TrainlessError):
    """A recipe is malformed. Carries every fault found, each with file and line."""

    def __init__(self, faults: str | Iterable[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__(listed(self.faults))


class CalibrationError(TrainlessError):
    """A calibration file is missing, damaged, or was made for another model."""


class ForeignEdit(TrainlessError):
    """Somebody else changed what we changed. Theirs was left alone; ours was undone around it."""


class InputError(TrainlessError, ValueError):
    """A bad argument: name, value, and what is accepted instead."""


LONGEST = 60  # characters of a wrong name that are compared
MOST = 20  # faults that one message names; a file of nonsense can hold a hundred thousand


def listed(faults: Sequence[str]) -> str:
    """The first of ``faults``, one a line, and how many more there are."""
    more = len(faults) - MOST
    lines = [*faults[:MOST], *([f"… and {more:,} more"] if more > 0 else [])]
    return "\n".join(lines)


def near(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names closest to ``word``, the closest first: by spelling, then those that contain it."""
    names = sorted({str(k) for k in known})
    word = str(word)[:LONGEST]
    found = difflib.get_close_matches(word, names, n=most, cutoff=0.5)
    if len(word) > 2:
        found += [name for name in names if word in name and name not in found]
    return found[:most]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``word``, or None when nothing is close."""
    found = near(word, known, 1)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the two next names that are close, or what there is when nothing is."""
    known = sorted({str(k) for k in known})
    found = near(word, known)
    if found:
        others = f" Near it too: {', '.join(map(repr, found[1:]))}" if found[1:] else ""
        return f"; did you mean {found[0]!r}?{others}"
    if len(known) <= MOST:
        return f"; known: {', '.join(known)}"
    close = difflib.get_close_matches(str(word)[:LONGEST], known, n=3, cutoff=0.0)
    return f"; the nearest of {len(known)} names: {', '.join(close)}"
