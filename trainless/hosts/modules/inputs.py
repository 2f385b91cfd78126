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

    def is_ours(self) -> bool:
        return True  # a hook that somebody has removed needs no removing

    def undo(self) -> None:
        for _, handle in self.placed.values():
            handle.remove()
        self.placed.clear()

    # ------------------------------------------------------------------ around the site's call

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(dict.fromkeys(e.contribution.module for e in self.runtime.plan.of["input"]))
        for name in names:
            self._place(name)
        if names and self.runtime.site.kind == "module" and not self.runtime.plan.of["around"]:
            self.runtime.passed()
        self.local.called, self.local.acted = set(), set()
        self.local.counts = {owner: tally.acted for owner, tally in self.runtime.tallies.items()}
        self.local.passed = self.runtime.call.passed

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
        @torch.compiler.disable(reason=REASON)
        def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = None
            for entry in self.runtime.plan.of["input"]:
                if entry.contribution.module != name:
                    continue
                value: Any = entry.contribution.value
                found = value(args, kwargs, self.runtime.own_tensors(entry.contribution))
                if found is None:  # it declines this call
                    continue
                args, kwargs = changed = found
                if getattr(self.local, "called", None) is not None:
                    self.local.acted.add(entry)
            called = getattr(self.local, "called", None)
            if called is not None:
                called.add(name)
            return changed

        return given


def watch_inputs(runtime: Runtime) -> None:
    """Install the hooks at the site, once; without active contributions they do nothing."""
    if any(isinstance(edit, Inputs) for edit in runtime.journal.edits):
        return
    module, name = runtime.site.module, runtime.site.name
    inputs = Inputs(runtime)
    runtime.journal.add(inputs)
    # Not as decorators: they import the compiler, and importing this package must not.
    before, after = (torch.compiler.disable(hook, reason=REASON) for hook in (inputs.before, inputs.after))
    edits = {
        f"pre-hook on {name}": lambda: module.register_forward_pre_hook(before, with_kwargs=True),
        f"forward hook on {name}": lambda: module.register_forward_hook(after, always_call=True),
    }
    for where, register in edits.items():
        runtime.journal.add(HookEdit(module, register, where))
