"""What enters a decoder layer: its residual input, before the norm, for methods that ask for it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...edits.journal import HookEdit
from ...engine.runtime import Runtime
from ...errors import Unsupported
from .uncompiled import uncompiled


def watch(runtime: Runtime, model: nn.Module) -> None:
    """Hook the layer that holds the site, so that each call's hidden states (B, Lq, D) reach it as a fact.

    The hook stands before the layer, not behind the one before it: some families add to the stream between
    two layers. Raises Unsupported when no such layer can be made out.
    """
    layer = _layer_around(model, runtime.site.module)
    if layer is None:
        raise Unsupported(
            f"{runtime.site.name} lies in no list of layers, so what enters its layer is not known"
        )
    hook = functools.partial(_before, runtime)
    runtime.journal.add(
        HookEdit(
            layer,
            lambda: layer.register_forward_pre_hook(hook, with_kwargs=True),
            f"forward hook on the layer of {runtime.site.name}",
        )
    )


def _layer_around(model: nn.Module, module: nn.Module) -> nn.Module | None:
    """The innermost item of a list of layers that contains ``module``."""
    name = next((n for n, m in model.named_modules() if m is module), None)
    parts = [] if name is None else name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        holder = model.get_submodule(".".join(parts[: end - 1]))
        if isinstance(holder, nn.ModuleList):
            return model.get_submodule(".".join(parts[:end]))
    return None


def _before(runtime: Runtime, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _note(runtime, args, kwargs)
        return
    states = args[0] if args else kwargs.get("hidden_states")
    if not (runtime.prepared.refusal is None and isinstance(states, Tensor) and states.shape[1] == 1):
        _uncompiled(runtime, args, kwargs)


def _note(runtime: Runtime, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if "residual" not in runtime.plan.asks:
        return
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor) or states.dim() != 3:
        raise Unsupported(
            f"{runtime.site.name}: its layer takes no hidden states (B, L, D) as first argument"
        )
    width = runtime.site.facts.get("hidden_size")
    if "text" in runtime.site.parts and width is not None and states.shape[-1] != width:
        raise Unsupported(
            f"{runtime.site.name}: its layer is given {states.shape[-1]} numbers for each token and the model's width is "
            f"{width}, so which of them are the residual stream is not known"
        )
    runtime.call.residual = states


_uncompiled = uncompiled(_note)
