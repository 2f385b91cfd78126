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
from torch import nn

from ..errors import Unsupported
from ..hosts import Component
from ..hosts.gate import RECHECK, SOLE, catch_up
from ..patch.station import STATION

PATIENCE = 30.0  # seconds without a call of the verifying thread, after which nothing will come any more


class Sole:
    """Lets calls of one thread through; those of others are held until ``over`` is set, and stand in ``waiting``."""

    def __init__(self) -> None:
        self.thread, self.over = threading.get_ident(), threading.Event()
        self.waiting: set[int] = set()
        self.under_way, self.last = 0, time.monotonic()

    def holds(self, thread: int) -> bool:
        return thread != self.thread and not self.over.is_set()

    def hold(self) -> None:
        """Wait, in a call of another thread; Unsupported where that would be for ever."""
        me = threading.get_ident()
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

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if (
            torch.compiler.is_compiling() or kwargs is None
        ):  # None: taken off since the call began, see ``gate``
            return None
        me = threading.get_ident()
        if me == self.thread:
            self.under_way += 1
        if not self.holds(me):
            return None
        before = set(module._forward_pre_hooks)
        self.hold()
        return catch_up(module, before, args, kwargs)

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
                station = vars(part.module).get(STATION)  # none at a text encoder that nothing touches
                if station is not None:
                    still.enter_context(station.gate.closed())
            for part in parts:
                # Gates look here, those too that come while this lasts; without a gate it is the hooks that hold.
                vars(part.module)[SOLE] = mine
                handles.append(
                    part.module.register_forward_pre_hook(mine.enter, prepend=True, with_kwargs=True)
                )
                handles.append(part.module.register_forward_hook(mine.leave, always_call=True))
        yield
    finally:
        mine.over.set()
        for handle in handles:
            handle.remove()
        for part in parts:
            vars(part.module).pop(SOLE, None)
