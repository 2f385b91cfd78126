"""The hooks around a patched attention module: they open what catches its attention call, and close it.

While a compiler traces the call they are part of what it traces; where a plan cannot be traced, the graph breaks here.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch.overrides import _get_current_function_mode

from ...engine.runtime import Runtime
from ...errors import Unsupported
from .calls import REASON, Interception, others_of
from .processors import refusal
from .traced import Traced, traceable

_open = threading.local()  # .modes: the modes that this thread has open, innermost last


def _modes() -> list[Interception]:
    if not hasattr(_open, "modes"):
        _open.modes = []
    modes: list[Interception] = _open.modes
    return modes


def _close(mode: Interception) -> None:
    mode.closed, mode.home = True, None  # a frame keeps its tensors alive
    if _get_current_function_mode() is mode:
        mode.__exit__(None, None, None)


class AttentionHooks:
    """Opens a mode before a patched module's forward and closes it after, exceptions included."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            _enter_uncompiled(self, module, args, kwargs)
        elif self.runtime.prepared.inert:
            return
        elif traceable(self.runtime, module):
            Traced(self.runtime, module, others_of(self.runtime.site, args, kwargs)).__enter__()
        else:
            _enter_uncompiled(self, module, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            _leave_uncompiled(self, module, output)
            return
        if self.runtime.prepared.inert:
            return
        mode = _get_current_function_mode()
        if isinstance(mode, Traced) and mode.module is module:
            mode.__exit__(None, None, None)
            mode.finish()
        else:
            _leave_uncompiled(self, module, output)

    # Around the module that is compiled itself hooks run outside of the graph: they are no graphs of their own.
    skip_code(before.__code__)
    skip_code(after.__code__)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        modes = _modes()
        while modes and not modes[-1].alive():
            _close(modes.pop())
        if self.runtime.plan.inert:
            self.runtime.passed()
            return
        reason = refusal(module, self.runtime.site.facts["denoiser"])
        if reason is not None:
            raise Unsupported(f"{self.runtime.site.name}: {reason}")
        mode = Interception(self.runtime, module, others_of(self.runtime.site, args, kwargs))
        mode.__enter__()
        modes.append(mode)

    def _leave(self, module: nn.Module, output: Any) -> None:
        modes = _modes()
        if not modes or modes[-1].module is not module:
            return
        mode = modes.pop()
        _close(mode)
        if output is not None:  # else the forward has raised, and that error is the one to see
            mode.finish()


_enter_uncompiled = torch.compiler.disable(AttentionHooks._enter, reason=REASON)
_leave_uncompiled = torch.compiler.disable(AttentionHooks._leave, reason=REASON)
