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
from ..hosts.gate import RECHECK
from ..patch.station import STATION

PATIENCE = 30.0  # seconds without a call of the verifying thread, after which nothing will come any more


class Sole:
    """Lets calls of one thread through; ``bars`` holds up those of others until ``over`` is set."""

    def __init__(self) -> None:
        self.thread, self.over = threading.get_ident(), threading.Event()
        self.under_way, self.last = 0, time.monotonic()

    def bars(self, thread: int) -> bool:
        """Whether a call of ``thread`` has to wait; Unsupported where it would wait for ever."""
        if thread == self.thread or self.over.is_set():
            return False
        if not self.under_way and time.monotonic() - self.last > PATIENCE:
            raise Unsupported(
                "verify() of this model runs in another thread, which waits for something else than the model: a probe "
                "must call the model in its own thread; otherwise call the model when verify() is over"
            )
        return True

    def enter(self, *unused: Any) -> None:
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        if me == self.thread:
            self.under_way += 1
            return
        while self.bars(me):
            self.over.wait(RECHECK)

    def leave(self, *unused: Any) -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() == self.thread:
            self.under_way = max(0, self.under_way - 1)
            self.last = time.monotonic()


@contextlib.contextmanager
def sole(parts: Sequence[Component]) -> Iterator[None]:
    """Inside, only this thread's calls of ``parts`` run; those of others that are under way end first."""
    mine = Sole()
    gates = [vars(part.module)[STATION].gate for part in parts]
    handles = []
    try:
        with contextlib.ExitStack() as still:
            for gate in gates:
                still.enter_context(gate.closed())
            for part, gate in zip(parts, gates, strict=True):
                gate.sole = (
                    mine  # a call that already waits there has passed by the hooks that are put on now
                )
                handles.append(part.module.register_forward_pre_hook(mine.enter, prepend=True))
                handles.append(part.module.register_forward_hook(mine.leave, always_call=True))
        yield
    finally:
        mine.over.set()
        for handle in handles:
            handle.remove()
        for gate in gates:
            gate.sole = None
