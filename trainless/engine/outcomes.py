"""What traced calls come to, numbered: the kernel of a call, and which of the patches there changed it.

Both follow from the sizes of a call, so they are known while it is traced and not before. The graph then counts in
the place of its outcome, on the device; numbers are the same for all sites, so that code made for one plan serves
the next that is like it.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from ..kernels.dispatch import constant

SLOTS = 64


class Outcome(NamedTuple):
    """acted: numbers of the patches, among those active at a site, that changed the call."""

    kernel: str
    reasons: str
    acted: tuple[int, ...]


_known: list[Outcome] = []
_changing = threading.Lock()


@constant
def slot_of(kernel: str, reasons: str, acted: tuple[int, ...]) -> int:
    """The number of an outcome, given when it is first met. The last one stands for all that come after it."""
    outcome = Outcome(kernel, reasons, acted)
    with _changing:
        if outcome not in _known and len(_known) < SLOTS:
            _known.append(outcome)
        return _known.index(outcome) if outcome in _known else SLOTS - 1


def outcome_at(slot: int) -> Outcome:
    return _known[slot]
