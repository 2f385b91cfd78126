"""Probes: small inputs made for a model from what it says about itself, on which a patch can be tried.

Each host has a module ``<host>_probe`` with ``probes(part, sites, tokens)``; this one finds it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..seams import Site

SEED = 20240
STEPS = 3  # cached decode steps after the prefill


@dataclass(frozen=True)
class Probe:
    """``run()`` calls the model once, on inputs that never change and a fresh cache, and returns its outputs.

    misses: parts of the model that it does not reach. short: a label of at most 20 characters.
    """

    name: str
    run: Callable[[], Any]
    misses: frozenset[str] = frozenset()
    short: str = ""


def default_probes(part: Any, sites: Sequence[Site], tokens: int) -> list[Probe]:
    """Probes for one component, whose patched sites are ``sites``; Unsupported when it needs one of the user's.

    tokens: how long a prefill should be so that the patch has something to do; less when the model has
    fewer positions.
    """
    module = importlib.import_module(f"{__package__}.{part.host.name}.probe")
    found: list[Probe] = module.probes(part, sites, tokens)
    return found


def dense_probes(part: Any, sites: Sequence[Site], tokens: int) -> list[Probe]:
    """Probes small enough for every call to be computed in full, and with whatever calls may differ in (padding)."""
    module = importlib.import_module(f"{__package__}.{part.host.name}.probe")
    found: list[Probe] = getattr(module, "dense", module.probes)(part, sites, tokens)
    return found


@dataclass(frozen=True)
class Decoding:
    """``run(cache)`` reads a prompt, decodes token by token, reads a further turn, and decodes on; ``cache`` is an empty
    one, or None for what the model makes itself. ``static()`` makes one of fixed size, with room for all of it.

    padded: whether a row of the batch is shorter than another.
    """

    name: str
    run: Callable[[Any], Any]
    static: Callable[[], Any]
    padded: bool = False


def decodings(part: Any, rule: Any, tokens: int) -> list[Decoding]:
    """Sequences long enough for buffers of fixed size to be used again, for one component; none where it decodes none.

    rule: how a cache is packed under the patch, or None; a group of its tokens then comes together between two steps.
    """
    module = importlib.import_module(f"{__package__}.{part.host.name}.probe")
    made = getattr(module, "decodings", None)
    return [] if made is None else list(made(part, rule, tokens))


class Draw:
    """Seeded random tensors on the device and in the type of a model; the same on every device."""

    def __init__(self, model: nn.Module, seed: int = SEED):
        own = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.device = torch.device("cpu") if own is None else own.device
        if self.device.type == "meta":  # offloaded: inputs wait where calls are executed
            hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
            devices = (getattr(hook, "execution_device", None) for hook in hooks)
            self.device = torch.device(next((d for d in devices if d is not None), "cpu"))
        self.dtype = torch.float32 if own is None else own.dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def choice(self, pool: Tensor, *shape: int) -> Tensor:
        index = torch.randint(len(pool), shape, generator=self.generator)
        return pool[index].to(self.device)

    def full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=self.dtype)
