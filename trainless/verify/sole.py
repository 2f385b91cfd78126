"""The model for one thread alone: while a patch goes off and on by turns, calls of other threads wait.

Gates are gone when the last patch of a model is off, so there are hooks of this module's own as well. A call that waits
is let in when the verification is over. Where that cannot be (a probe that lets threads of its own call the model would
wait for itself), nothing runs any more, and the calls that wait end in an error instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import Unsupported
from ..hosts import Component
from ..hosts.gate import RECHECK, SOLE
from ..patch.station import STATION

PATIENCE = 30.0  # seconds without a call of the verifying thread, after which nothing will come any more


class Sole:
    """Lets calls of one thread through; those of others are held until ``over`` is set, and stand in ``waiting``."""

    def __init__(self) -> None:
        self.thread, self.over = threading.get_ident(), threading.Event()
        self.waiting: set[int] = set()
        self.under_way, self.last = 0, time.monotonic()

    def hold(self) -> None:
        """Wait, in a call of another thread; Unsupported where that would be for ever."""
        me = threading.get_ident()
        if me == self.thread or self.over.is_set():
            return
        self.waiting.add(me)
        try:
            while not self.over.wait(RECHECK):
                if not self.under_way and time.monotonic() - self.last > PATIENCE:
                    raise Unsupported(
                        "verify() of this model runs in another thread, which waits for something else than the model: a "
                        "probe must call the model in its own thread; otherwise call the model when verify() is over"
                    )
        finally:
            self.waiting.discard(me)

    def enter(self, *unused: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if threading.get_ident() == self.thread:
            self.under_way += 1
        self.hold()

    def leave(self, *unused: Any) -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() == self.thread:
            self.under_way = max(0, self.under_way - 1)
            self.last = time.monotonic()


@contextlib.contextmanager
def sole(parts: Sequence[Component]) -> Iterator[None]:
    """Inside, only this thread's calls of ``parts`` run; those of others that are under way end first."""
    mine = Sole()
    handles = []
    try:
        with contextlib.ExitStack() as still:
            for part in parts:
                still.enter_context(vars(part.module)[STATION].gate.closed())
            for part in parts:
                # Gates look here, those too that come while this lasts; without a gate it is the hooks that hold.
                vars(part.module)[SOLE] = mine
                handles.append(part.module.register_forward_pre_hook(mine.enter, prepend=True))
                handles.append(part.module.register_forward_hook(mine.leave, always_call=True))
        yield
    finally:
        mine.over.set()
        for handle in handles:
            handle.remove()
        for part in parts:
            vars(part.module).pop(SOLE, None)
