"""The ``around`` seam: one wrapper on a module's own ``forward``, through which all contributions chain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...edits.journal import AttributeEdit, mark
from ...engine.runtime import Runtime
from ...engine.scopes import held_in, of_call, of_layers, of_run
from ...seams import Entry, ModuleCall, State


@dataclass
class Surroundings:
    """What a host knows about the call of a module that is under way.

    states: where the States of its sequence or run lie; None: nowhere beyond the call. The others as in
    ``ModuleCall``.
    """

    states: dict[str, State] | None = None
    size: tuple[int, int] | None = None
    step: int | None = None
    past: int | None = None


Tell = Callable[[Runtime], Surroundings]


def nothing(runtime: Runtime) -> Surroundings:
    """For hosts that know nothing of a module's calls."""
    return Surroundings()


def wrap_forward(runtime: Runtime, tell: Tell = nothing) -> None:
    """Install the wrapper on this instance; without active contributions it calls straight through."""
    module = runtime.site.module
    original = module.forward

    @functools.wraps(original)
    @torch.compiler.disable(reason="trainless stands around this module outside compiled regions")
    def forward(*args: Any, **kwargs: Any) -> Any:
        proceed = original
        entries = runtime.plan.of["around"]
        if runtime.site.kind == "module":
            runtime.passed()
        known = tell(runtime) if entries else Surroundings()
        # The first patch ends up outermost, as if each had wrapped what it found.
        for entry in reversed(entries):
            proceed = functools.partial(_through, runtime, entry, known, proceed)
        return proceed(*args, **kwargs)

    runtime.journal.add(AttributeEdit(module, "forward", mark(forward), f"{runtime.site.name}.forward"))


def _through(
    runtime: Runtime, entry: Entry, known: Surroundings, proceed: Any, *args: Any, **kwargs: Any
) -> Any:
    given = entry.contribution
    counted = "step" in given.asks or given.scope == "run"
    call = ModuleCall(runtime.site, args, kwargs, known.size, known.past, counted, known.step)
    if given.scope == "call":
        state = of_call(entry)
    elif given.scope == "run":
        state = of_run(known.states, entry, runtime.site)
    elif given.scope == "layers":
        state = of_layers(known.states, entry, runtime.site)
    else:
        state = held_in({} if known.states is None else known.states, entry, runtime.site)
    tally = runtime.tallies.get(entry.owner)  # type: ignore[call-overload]
    if tally is not None:
        with runtime.counting:
            tally.acted += 1
    assert given.value is not None
    return given.value(proceed, call, state)
