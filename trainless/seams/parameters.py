"""Where the parameters of a module are, adapters or not."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_of(module: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Where the parameter or buffer called ``name`` inside ``module`` is, as (owner, attribute); None when absent.

    Adapters (PEFT) put a module of their own in a layer's place and keep the layer as its ``base_layer``:
    ``to_q.weight`` is then ``to_q.base_layer.weight``, and is found all the same.
    """
    *path, leaf = name.split(".")
    owner: Any = module
    for step in path:
        # An adapter's own children are of no concern: names are those of the model without adapters.
        owner = getattr(unwrapped(owner), step, None)
        if not isinstance(owner, nn.Module):
            return None
    owner = unwrapped(owner)
    own = {**owner._parameters, **owner._buffers}
    return (owner, leaf) if own.get(leaf) is not None else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer that adapters stand in front of; ``module`` itself when there are none."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
