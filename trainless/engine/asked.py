"""What the contributions ask of one softmax: patterns, statistics and edits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..cache import CompressingLayer
from ..kernels.visibility import Visibility
from ..seams import Entry
from .patterns import Pattern, fitted
from .run import Run

Edits = list[tuple[Entry, Any]]  # who edits, and the MassMove or RowEdit


@dataclass
class Asked:
    """What the contributions ask of one softmax. dynamic: patterns that are chosen from statistics of this call.

    edits: what is edited, once that is known; until then ``moves`` are those to ask.
    """

    layer: CompressingLayer | None
    extra: list[Any]
    patterns: list[Pattern]
    wanted: set[str]
    moves: tuple[Entry, ...]
    dynamic: list[Entry]
    edits: Edits | None = None

    def settled(self, run: Run) -> Edits:
        """The edits, asked for now where they have waited for statistics."""
        if self.edits is None:
            self.edits = [(entry, move) for entry in self.moves if (move := run.value(entry)) is not None]
        return self.edits


def chosen_patterns(run: Run, dynamic: list[Entry]) -> Iterator[tuple[Entry, Any]]:
    """Dynamic patterns that do not decline, each asked when the one before has been put in place."""
    for entry in dynamic:
        chosen = run.value(entry)
        if chosen is not None:
            yield entry, fitted(entry.method, run.call, chosen)


def restricted(visible: Visibility, chosen: Any) -> Visibility:
    return visible.restrict(chosen.visible, chosen.batch, getattr(chosen, "heads", 1))
