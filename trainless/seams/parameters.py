"""Where the parameters of a module are, adapters or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Layers whose ``weight`` is what is multiplied with, as it lies there. Classes derived from them are no such layers:
# those of quantisers keep a ``weight`` beside what they really use, or unpack it at every call.
PLAIN = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip
TENSORS = (nn.Parameter, torch.Tensor)


def parameter_of(module: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Where the parameter or buffer called ``name`` inside ``module`` is, as (owner, attribute); None when absent.

    Adapters (PEFT) put a module of their own in a layer's place and keep the layer as its ``base_layer``:
    ``to_q.weight`` is then ``to_q.base_layer.weight``, and is found all the same.
    """
    path, _, leaf = name.rpartition(".")
    owner = layer_of(module, path)
    if owner is None:
        return None
    own = {**owner._parameters, **owner._buffers}
    return (owner, leaf) if own.get(leaf) is not None else None


def layer_of(module: nn.Module, path: str) -> nn.Module | None:
    """The layer at ``path`` inside ``module``, behind its adapters; None when there is none."""
    owner: Any = module
    for step in path.split(".") if path else ():
        # An adapter's own children are of no concern: names are those of the model without adapters.
        owner = getattr(unwrapped(owner), step, None)
        if not isinstance(owner, nn.Module):
            return None
    return unwrapped(owner)


def why_not_plain(module: nn.Module, name: str) -> str | None:
    """Why the tensor called ``name`` inside ``module`` is no ordinary one that could be overwritten; None when it is.

    Quantised weights may look like float32 from outside, and hold their values elsewhere. What is known to be plain is
    plain: a tensor of torch's own class, in a layer of torch's own class or in ``module`` itself.
    """
    path, _, leaf = name.rpartition(".")
    owner = layer_of(module, path)
    if owner is None:
        return None
    derived = isinstance(owner, PLAIN) and type(owner) not in PLAIN
    if derived or (path and type(owner) not in PLAIN):
        return f"its layer is a {_named(owner)} and no layer of torch"
    found = parameter_of(module, name)
    if found is None:
        # A missing bias is registered as None; a weight that is worked out from others is not registered at all.
        lost = type(owner) in PLAIN and leaf in ("weight", "bias") and leaf not in owner._parameters
        return f"its layer, a {_named(owner)}, keeps no {leaf} of its own" if lost else None
    kind = type(getattr(*found))
    return None if kind in TENSORS else f"it is a {kind.__module__.partition('.')[0]}.{kind.__name__}"


def _named(module: nn.Module) -> str:
    return f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer that adapters stand in front of; ``module`` itself when there are none."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module
