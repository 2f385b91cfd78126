"""Calls of a patched model and changes of its patches exclude each other, whichever threads they come from.

A change waits until no call is under way, calls wait until a change is done: no call meets a patch that is half
there. A change from inside a call of the same thread would wait for itself, so it is refused.

Torch lists a call's hooks when it begins, and no hook can see that list. What is put on the called model itself between
that moment and our first hook, a few instructions later, is missed by this one call; what is taken off there is still
called, without keyword arguments, and does nothing. Modules inside list theirs later and are not concerned.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..edits.journal import HookEdit, Journal
from ..errors import InputError, Unsupported

_MODULE_FILE = nn.Module.__call__.__code__.co_filename
SOLE = "_trainless_sole"  # where a module keeps who lets one thread alone call it
RECHECK = 0.05  # seconds; a call that Ctrl-C has ended tells nobody


def module_frame() -> FrameType | None:
    """The innermost frame of ``nn.Module.__call__`` on the stack: it lives as long as the module's call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _MODULE_FILE:
        frame = frame.f_back
    return frame


def _current_frames() -> dict[int, FrameType]:
    """The innermost frame of every thread.

    Up to Python 3.11.7 and 3.12.1 the interpreter holds a lock meanwhile that a collection of garbage may want as well,
    and then stands still for good; so none may begin.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def on_stack(frame: FrameType, thread: int) -> bool:
    """Whether a call's frame is still under way in its thread."""
    return any(at is frame for at in _stack(_current_frames().get(thread)))


def catch_up(
    module: nn.Module, before: set[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the hooks that came while a call waited. Torch has listed those of the call when it began."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if number in before:
            continue
        if number in module._forward_pre_hooks_with_kwargs:
            given = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if given is None else given
        else:
            given = hook(module, args)
            args = args if given is None else given if isinstance(given, tuple) else (given,)
    return args, kwargs


class Gate:
    """Stands at a patched model; ``watch`` puts its two hooks there."""

    def __init__(self, name: str):
        self.name = name
        self.module: nn.Module | None = None
        self.changed = threading.Condition()
        self.calls: list[
            tuple[int, FrameType]
        ] = []  # of each call under way: its thread and torch's own frame
        self.changing: int | None = None  # the thread that changes patches

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        raise Unsupported("a patched model cannot be copied: remove the patch first, then patch each copy")

    def __reduce__(self) -> Any:
        raise Unsupported("a patched model cannot be pickled: remove the patch first, or use save_pretrained")

    def watch(self, module: nn.Module, journal: Journal) -> None:
        """Count the calls of ``module``, those under way included; the hooks go into ``journal``."""
        self.module = module
        for register in (
            lambda: module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            lambda: module.register_forward_hook(self._leave, always_call=True),
        ):
            journal.add(HookEdit(module, register, f"hook on {self.name} that counts its calls"))
        # After the hooks: a call that begins in between is found twice, and not passed over.
        under_way = [
            (thread, frame)
            for thread, top in _current_frames().items()
            for frame in _stack(top)
            if frame.f_code.co_filename == _MODULE_FILE and frame.f_locals.get("self") is module
        ]
        with self.changed:
            self.calls += under_way

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Inside, no call is under way in any thread; InputError from inside a call of this thread."""
        me = threading.get_ident()
        with self.changed:
            if self.changing == me:
                nested = True
            else:
                nested = False
                self._forget_ended()
                if any(thread == me for thread, _ in self.calls):
                    raise InputError(
                        f"a patch on {self.name} cannot be put on, taken off, paused or resumed from inside a call of it "
                        "(a hook, or a callback that the model runs); do it between calls"
                    )
                while self.changing is not None or self._running():
                    self.changed.wait(RECHECK)
                    self._forget_ended()
                self.changing = me
        try:
            yield
        finally:
            if not nested:
                with self.changed:
                    self.changing = None
                    self.changed.notify_all()

    def _running(self) -> bool:
        """Whether calls are under way that do not wait for one thread that has the model alone."""
        sole = None if self.module is None else vars(self.module).get(SOLE)
        return any(sole is None or thread not in sole.waiting for thread, _ in self.calls)

    def _forget_ended(self) -> None:
        """Ctrl-C skips the hook that ends a call; its frame has left the stack of its thread all the same."""
        self.calls = [(thread, frame) for thread, frame in self.calls if on_stack(frame, thread)]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if torch.compiler.is_compiling():
            return None  # compiled code is made anew after every change
        if (
            kwargs is None
        ):  # taken off since torch listed the hooks of this call: it calls such hooks without them
            return None
        frame, me = module_frame(), threading.get_ident()
        if frame is None:
            return None
        before: set[int] | None = None
        while True:
            sole = vars(module).get(SOLE)
            if sole is not None and sole.holds(me):
                before = set(module._forward_pre_hooks) if before is None else before
                sole.hold()
            with self.changed:
                inside = any(thread == me for thread, _ in self.calls)
                if inside or (self.changing in (None, me) and vars(module).get(SOLE) is sole):
                    self.calls.append((me, frame))
                    break
                before = set(module._forward_pre_hooks) if before is None else before
                self.changed.wait(RECHECK)
        return None if before is None else catch_up(module, before, args, kwargs)

    def _leave(self, *unused: Any) -> None:
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        with self.changed:
            for at in range(len(self.calls) - 1, -1, -1):
                if self.calls[at][0] == me:
                    del self.calls[at]
                    break
            self.changed.notify_all()
