"""One hierarchy of errors. Each message says the state, the cause and the fix, in a line or two."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
        super().__init__("\n".join(self.faults))


class CalibrationError(TrainlessError):
    """A calibration file is missing, damaged, or was made for another model."""


class ForeignEdit(TrainlessError):
    """Somebody else changed what we changed. Theirs was left alone; ours was undone around it."""


class InputError(TrainlessError, ValueError):
    """A bad argument: name, value, and what is accepted instead."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``word``, or None when nothing is close."""
    found = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or the sorted list of names when nothing is close."""
    known = sorted({str(k) for k in known})
    close = nearest(word, known)
    return f"; did you mean {close!r}?" if close else f"; known: {', '.join(known)}"
