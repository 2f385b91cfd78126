"""The ``weights`` and ``input`` seams: tensors of other models put into this one, and tensors put beside it.

All is checked before anything is written: that every tensor is there, is an ordinary one, has the shape of what
replaces it, can be written to, and has no adapter merged into it. Names are those of the model without adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError, Unsupported
from ..seams import Contribution, Site, parameter_of, unwrapped, why_not_plain
from .journal import ItemEdit, Journal, TensorEdit, mark, stored

BESIDE = "_trainless_tensors"  # how the module is called that holds a method's own tensors
WRITABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Given = tuple[str, Site, Contribution]  # the method's name, where, what


def check(given: Iterable[Given]) -> None:
    """Raise InputError or Unsupported for the first tensor that cannot be put where a method wants it."""
    for method, site, contribution in given:
        if contribution.kind == "weights":
            for name, tensor in (contribution.tensors or {}).items():
                _check_one(method, site, name, tensor)
        elif contribution.kind == "input" and _find(site.module, contribution.module) is None:
            raise Unsupported(
                f"{method}: {site.name} has no module {contribution.module!r}, whose input is to be changed; "
                "projections that were fused into one have to be taken apart first"
            )


def _check_one(method: str, site: Site, name: str, tensor: Tensor) -> None:
    where = f"{method}: {site.name}.{name}"
    reason = why_not_plain(site.module, name)
    if reason is not None:
        raise Unsupported(f"{where} cannot be replaced: {reason}; load the model unquantised and unwrapped")
    found = parameter_of(site.module, name)
    if found is None:
        raise InputError(f"{method}: {site.name} has no {name!r}; these weights are of another model")
    current = getattr(*found)
    if current.dtype not in WRITABLE:
        raise Unsupported(f"{where} is stored as {current.dtype}, quantised; load the model unquantised")
    if current.shape != tensor.shape:
        raise InputError(
            f"{where} has shape {tuple(current.shape)}, the replacement {tuple(tensor.shape)}; "
            "these weights are of another model"
        )
    if stored(*found) is None:
        raise Unsupported(
            f"{where} has no values in memory (not loaded, or offloaded to disk); load them, or patch before "
            "offloading"
        )
    if _merged(site.module, name):
        raise Unsupported(
            f"{where}: an adapter (LoRA) is merged into it, and would be overwritten; unmerge it first "
            "(unfuse_lora), patch, then it works on top"
        )


def replace(given: Iterable[Given], journal: Journal) -> None:
    """Write the tensors of ``weights`` contributions, which ``check`` has let pass, into the model."""
    for _, site, contribution in given:
        if contribution.kind != "weights":
            continue
        for name, tensor in (contribution.tensors or {}).items():
            found = parameter_of(site.module, name)
            assert found is not None
            journal.add(TensorEdit(*found, tensor, f"{site.name}.{name}"))


def beside(site: Site, tensors: Mapping[str, Tensor], journal: Journal) -> nn.Module:
    """A module at ``site`` that holds ``tensors`` as buffers: moved and converted with it, never saved."""
    # Where offloading has put placeholders, the method's tensors wait on the CPU like the site's own.
    like = next(
        (p for p in site.module.parameters() if p.dtype in WRITABLE and p.device.type != "meta"), None
    )
    holder = mark(nn.Module())
    for name, tensor in tensors.items():
        copied = (
            tensor.detach().clone()
            if like is None
            else tensor.detach().to(like.device, like.dtype, copy=True)
        )
        holder.register_buffer(name.replace(".", "_"), copied, persistent=False)
    taken = site.module._modules
    name = next(n for n in (f"{BESIDE}_{i}" for i in range(len(taken) + 1)) if n not in taken)
    journal.add(ItemEdit(taken, name, holder, f"{site.name}.{name}"))
    return holder


def _find(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _merged(module: nn.Module, name: str) -> bool:
    """Whether an adapter on the way to the parameter has been merged into it."""
    current: object = module
    for step in name.split(".")[:-1]:
        current = getattr(unwrapped(current) if isinstance(current, nn.Module) else current, step, None)
        layer = current
        while isinstance(layer, nn.Module) and hasattr(layer, "base_layer"):
            if bool(getattr(layer, "merged", False)):
                return True
            layer = layer.base_layer
    return False
