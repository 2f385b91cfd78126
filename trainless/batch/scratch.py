"""Results of a run without a folder: kept in memory, shown at the end, and gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import Unsupported
from .keys import Settings
from .tally import tally


class Scratch:
    """What ``Store`` is for a folder, for texts that only go to the terminal."""

    folder = None

    def __init__(self) -> None:
        self.damaged: list[str] = []
        self.gone = 0
        self._records: dict[str, dict[str, Any]] = {}

    def check(
        self, settings: Settings | None, overwrite: bool, about: Mapping[str, Any] | None = None
    ) -> None:
        """There is nothing to clash with."""

    def records(self, sizes: Mapping[str, int] | None = None) -> dict[str, dict[str, Any]]:
        return self._records

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._records.update((str(record["key"]), dict(record)) for record in records)

    def save_image(self, key: str, image: Any) -> str:
        raise Unsupported("pictures need a folder; give one with -o")

    def report(self, keys: Iterable[str], interrupted: bool) -> dict[str, Any]:
        return tally(self._records, keys, interrupted)
