"""The ``input`` seam: what modules inside a patched site are given, changed by hooks that follow the modules.

Adapters (LoRA) replace the modules that they adapt, and put them back, while a patch is on. So the hook
stands at whatever bears the name when the site is called, and moves when that is another module.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ...edits.journal import Edit, HookEdit
from ...engine.runtime import Runtime
from ...errors import Unsupported

REASON = "trainless changes inputs outside compiled regions"


class Inputs(Edit):
    """Stands at one site; itself the journal's edit for the hooks inside the site.

    ``tensors`` of a contribution are found in ``runtime.tensors`` and handed to its value.
    """

    def __init__(self, runtime: Runtime):
        self.runtime, self.where = runtime, f"hooks inside {runtime.site.name}"
        self.placed: dict[str, tuple[nn.Module, Any]] = {}
        self.hooks: dict[str, Any] = {}  # one per name for good: compiled code holds on to it
        self.local = threading.local()
        # Not as decorators: they import the compiler, and importing this package must not.
        self.outside = [torch.compiler.disable(hook, reason=REASON) for hook in (self._begin, self._end)]

    def is_ours(self) -> bool:
        return True  # a hook that somebody has removed needs no removing

    def undo(self) -> None:
        for _, handle in self.placed.values():
            handle.remove()
        self.placed.clear()

    # ------------------------------------------------------------------ around the site's call

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._begin(module, args, kwargs)
        elif not self._traced():
            self.outside[0](module, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._end(module, args, output)
        elif not self._traced():
            self.outside[1](module, args, output)

    def _traced(self) -> bool:
        """Whether a compiler can trace the call: every hook stands where it is to stand, and will be passed."""
        inputs = self.runtime.inputs
        if not inputs:
            return True
        if not self.runtime.prepared.sized or getattr(self.runtime.site.module, "fused_projections", False):
            return False
        for given in inputs:
            standing = self.placed.get(given.module)
            if standing is None or standing[0] is not self.runtime.site.module.get_submodule(given.module):
                return False
        return True

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(dict.fromkeys(e.contribution.module for e in self.runtime.plan.of["input"]))
        for name in names:
            self._place(name)
        if names and self.runtime.site.kind == "module" and not self.runtime.plan.of["around"]:
            self.runtime.passed()
        self.local.called, self.local.acted = set(), set()
        self.local.counts = {owner: tally.acted for owner, tally in self.runtime.tallies.items()}
        self.local.passed = self.runtime.call.passed

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        called, counts = getattr(self.local, "called", None), getattr(self.local, "counts", {})
        self.local.called = None
        if output is None or called is None:
            return  # the forward has raised, and that error is the one to see
        live = self.runtime.site.kind == "module"
        for entry in self.runtime.plan.of["input"]:
            name, owner = entry.contribution.module, entry.owner
            acted = counts.get(owner, 0)
            tally = self.runtime.tallies.get(owner)  # type: ignore[call-overload]
            if tally is None:
                continue
            # A step cache may serve the site's output from an earlier call: then nothing was computed at all.
            if name not in called and (live or self.runtime.call.passed > self.local.passed):
                raise Unsupported(
                    f"{entry.method}: {self.runtime.site.name} computed its output without calling {name!r}, so "
                    "the patch would act in part only; take fused projections apart (unfuse_qkv_projections)"
                )
            if name in called and entry in self.local.acted and tally.acted == acted:
                with self.runtime.counting:
                    tally.acted += 1

    # ------------------------------------------------------------------ at the modules inside

    def place(self) -> None:
        """Put the hooks where they stand before the first call, which may be one that a compiler traces."""
        for entry in self.runtime.entries:
            if entry.contribution.kind == "input":
                self._place(entry.contribution.module)

    def _place(self, name: str) -> None:
        try:
            module = self.runtime.site.module.get_submodule(name)
        except AttributeError:
            raise Unsupported(f"{self.runtime.site.name} has no module {name!r} any more; unpatch") from None
        standing = self.placed.get(name)
        if standing is not None:
            at, handle = standing
            hooks = handle.hooks_dict_ref()
            if at is module and hooks is not None and handle.id in hooks:
                return
            handle.remove()
        hook = self.hooks.setdefault(name, self._hook(name))
        self.placed[name] = (module, module.register_forward_pre_hook(hook, with_kwargs=True))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not torch.compiler.is_compiling():
                return changed_by(args, kwargs)
            return (changed_by if self._traced() else outside)(args, kwargs)

        def changed_by(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = None
            tracing = torch.compiler.is_compiling()
            for given in self.runtime.inputs:
                if given.module != name:
                    continue
                found = given.value(args, kwargs, given.tensors())
                if found is None:  # it declines this call
                    continue
                args, kwargs = changed = found
                if not tracing and getattr(self.local, "called", None) is not None:
                    self.local.acted.add(given.entry)
            if not tracing:
                called = getattr(self.local, "called", None)
                if called is not None:
                    called.add(name)
            return changed

        outside = torch.compiler.disable(changed_by, reason=REASON)
        return hook


def watch_inputs(runtime: Runtime) -> None:
    """Install the hooks at the site, once; without active contributions they do nothing."""
    standing = next((edit for edit in runtime.journal.edits if isinstance(edit, Inputs)), None)
    if standing is not None:
        standing.place()
        return
    module, name = runtime.site.module, runtime.site.name
    inputs = Inputs(runtime)
    inputs.place()
    runtime.journal.add(inputs)
    edits = {
        f"pre-hook on {name}": lambda: module.register_forward_pre_hook(inputs.before, with_kwargs=True),
        f"forward hook on {name}": lambda: module.register_forward_hook(inputs.after, always_call=True),
    }
    for where, register in edits.items():
        runtime.journal.add(HookEdit(module, register, where))
