"""A patch's token at its sites and on its cache layers."""

from __future__ import annotations

import itertools
import threading
from typing import Any

_numbers = itertools.count()


class Lease:
    """A patch's token at its sites: whether it is on the model (applied) and not paused (active).

    Cache layers keep leases to know whether their patch still wants them to evict; a copied cache
    shares the lease with the original, so copying does not copy the patch. ``terms`` is the method with all
    its parameters, by which a cache that comes back from disk finds the patch that it belongs to.
    """

    __slots__ = ("_local", "active", "applied", "name", "number", "terms")

    def __init__(self, name: str, terms: str = ""):
        self.name, self.terms = name, terms
        self.number = next(_numbers)  # patches that come later have a larger one
        self.applied = False
        self.active = False
        self._local = threading.local()

    @property
    def deferring(self) -> bool:
        """Whether this thread is feeding a prefill in chunks: layers then evict after the last one."""
        return getattr(self._local, "deferring", False)

    @deferring.setter
    def deferring(self, value: bool) -> None:
        self._local.deferring = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self

    def __reduce__(self) -> Any:
        return Lease, (self.name, self.terms)  # on disk a cache has no patch

    def __repr__(self) -> str:
        return f"Lease({self.name!r}, {'active' if self.active else 'inactive'})"
