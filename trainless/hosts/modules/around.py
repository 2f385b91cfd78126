"""The ``around`` seam: one wrapper on a module's own ``forward``, through which all contributions chain."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...edits.journal import AttributeEdit, mark
from ...engine.runtime import Runtime
from ...seams import State


def wrap_forward(runtime: Runtime) -> None:
    """Install the wrapper on this instance; without active contributions it calls straight through."""
    module = runtime.site.module
    original = module.forward

    @functools.wraps(original)
    @torch.compiler.disable
    def forward(*args: Any, **kwargs: Any) -> Any:
        proceed = original
        entries = runtime.plan.of["around"]
        if runtime.site.kind == "module":
            runtime.passed()
        # The first patch ends up outermost, as if each had wrapped what it found.
        for entry in reversed(entries):
            proceed = functools.partial(_through, runtime, entry, proceed)
        return proceed(*args, **kwargs)

    runtime.journal.add(AttributeEdit(module, "forward", mark(forward), f"{runtime.site.name}.forward"))


def _through(runtime: Runtime, entry: Any, proceed: Any, *args: Any, **kwargs: Any) -> Any:
    state = runtime.facts.setdefault("around", {}).setdefault(entry.method, State())
    tally = runtime.tallies.get(entry.owner)
    if tally is not None:
        with runtime.counting:
            tally.acted += 1
    return entry.contribution.value(proceed, args, kwargs, state)
