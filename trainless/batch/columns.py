"""Columns of other people's tables: which one is the prompt, and what becomes of those that are no fields."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, did_you_mean
from .items import FIELDS, ItemFaults

_HINT = "; --keep-columns keeps such columns in the records, as meta"


@dataclass(frozen=True)
class Columns:
    """``prompt``: the field that holds the prompt, if it is not called so; ``keep``: other columns become ``meta``."""

    prompt: str | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if self.prompt in FIELDS and self.prompt != "prompt":
            raise InputError(f"--prompt-field {self.prompt}: this is a field with a meaning of its own")

    @property
    def known(self) -> tuple[str, ...]:
        """The fields that a line may have, by the names that they have there."""
        return tuple(self.prompt or name if name == "prompt" else name for name in FIELDS)

    def check(self, names: Sequence[str], where: str, faults: ItemFaults) -> bool:
        """Faults of the header of a table; False when there are some."""
        before = len(faults.found)
        if self.prompt is not None and self.prompt not in names and "messages" not in names:
            faults.add(where, f"there is no column {self.prompt!r}{did_you_mean(self.prompt, names)}")
        for name in names:
            if name not in self.known and not self.keep:
                faults.add(where, f"unknown column {name!r}{did_you_mean(name, self.known)}{_HINT}")
        for name in {n for n in names if names.count(n) > 1}:
            faults.add(where, f"column {name!r} stands twice")
        return len(faults.found) == before

    def fields(self, row: Mapping[str, Any], where: str, faults: ItemFaults) -> dict[str, Any] | None:
        """The row with the prompt under its name and all other columns in ``meta``; None after a fault."""
        before = len(faults.found)
        if self.prompt is not None and row.get(self.prompt) is None and row.get("messages") is None:
            faults.add(where, f"the prompt is missing: there is nothing in {self.prompt!r}")
        found: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, value in row.items():
            if name in self.known:
                found["prompt" if name == self.prompt else name] = value
            elif self.keep:
                rest[name] = _plain(name, value, where, faults)
            else:
                faults.add(where, f"unknown field {name!r}{did_you_mean(str(name), self.known)}")
        if rest:
            own = found.get("meta")
            if own is not None and not isinstance(own, Mapping):
                faults.add(where, "meta must be an object where other columns are kept beside it")
            elif both := sorted(rest.keys() & set(own or ())):
                faults.add(where, f"column {both[0]!r} is in meta already; rename one of them")
            else:
                found["meta"] = {**(own or {}), **rest}
        return found if len(faults.found) == before else None


def _plain(name: str, value: Any, where: str, faults: ItemFaults) -> Any:
    """A value of a table as plain JSON data: dates and decimals in words, what is no number as nothing."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(name, entry, where, faults) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry, where, faults) for entry in value]
    if value is not None and not isinstance(value, (str, int, float, bool)):
        kind = type(value).__name__
        faults.add(where, f"column {name!r} holds {kind}, which no record can keep; leave the column out")
    return value
