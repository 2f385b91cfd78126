"""How everything stands before a patch is tried, so that it can be put back: nothing a trial does may be seen later.

What a trial may change: counters, the order of patches and hooks, training mode, the random state of torch, NumPy and
Python, runs of denoisers, and what models keep of the last sequence that they saw.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.runtime import Runtime, Tally, runtime_of
from ..hosts import Component

# What model classes keep on the module of the sequence that they saw last, with its value in a model that saw none.
# Multi-axis rotary models (Qwen-VL, GLM-V and their kin) keep one offset for each row of the last batch.
OF_LAST_SEQUENCE = {"rope_deltas": None}
OWN = frozenset(vars(nn.Module()))  # what every module has; `training` and hooks are seen to apart


@contextlib.contextmanager
def quietly(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode, no gradients, and the random state, all as before afterwards."""
    training = [(m, m.training) for module in modules for m in module.modules()]
    devices = sorted(
        {p.device.index or 0 for m in modules for p in m.parameters() if p.device.type == "cuda"}
    )
    numpy = sys.modules.get("numpy")
    state = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for module, _ in training:
                module.training = False
            yield
        finally:
            for module, was in training:
                module.training = was
            random.setstate(state[0])
            if numpy is not None:
                numpy.random.set_state(state[1])


def seed(number: int) -> None:
    """The same random numbers from here on, whoever draws them."""
    torch.manual_seed(number)
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)


def runtimes(parts: Sequence[Component]) -> list[Runtime]:
    found = (runtime_of(module) for part in parts for module in part.module.modules())
    return [runtime for runtime in found if runtime is not None]


class Standing:
    """Taken once, before anything runs."""

    def __init__(self, parts: Sequence[Component]):
        self.parts = parts
        self.entries = {r.site.module: list(r.entries) for r in runtimes(parts)}
        for runtime in runtimes(parts):
            runtime.fold()  # what stands on the device only belongs to the calls before
        self.tallies = {r.site.module: r.tallies for r in runtimes(parts)}
        keep = [(getattr(part.host, "keep_runs", None), part.module) for part in parts]
        self.runs = [kept(module) for kept, module in keep if kept is not None]
        self.modules = list({m: None for part in parts for m in part.module.modules()})
        self.hooks = [
            (hooks, list(hooks))
            for module in self.modules
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self.plain = {module: _plain(module) for module in self.modules}
        self.buffers = {module: _buffers(module) for module in self.modules if module._buffers}

    # ------------------------------------------------------------------ before a run

    def fresh(self) -> None:
        """Counters at zero, and models that remember no sequence and no run."""
        self.restore_models()
        for module in self.modules:
            for name, value in OF_LAST_SEQUENCE.items():
                if name in vars(module):
                    vars(module)[name] = value
        for runtime in runtimes(self.parts):
            runtime.fold()
            runtime.settled = None
            runtime.tallies = {lease: Tally() for lease in runtime.tallies}
            runtime.refresh()
        self._forget_runs()

    def _forget_runs(self) -> None:
        """No call before this belongs to the run of a call after it, where a host counts the steps of runs."""
        for part in self.parts:
            forget = getattr(part.host, "forget_runs", None)
            if forget is not None:
                forget(part.module)
        for module in self.modules:
            # A step cache of diffusers would serve a call from the one before it.
            reset = getattr(module, "_reset_stateful_cache", None)
            if callable(reset) and getattr(module, "is_cache_enabled", False):
                reset()

    # ------------------------------------------------------------------ afterwards

    def restore(self) -> None:
        """Counters and what models remember, as they were; runs of other threads go on."""
        for give_back in self.runs:
            give_back()
        self._forget_runs()
        for runtime in runtimes(self.parts):
            tallies = self.tallies[runtime.site.module]
            runtime.fold()
            runtime.settled = None
            runtime.tallies = {lease: tallies[lease] for lease in runtime.tallies if lease in tallies}
            runtime.refresh()
        self.restore_models()

    def restore_models(self) -> None:
        """What models keep on their modules as plain data, and their buffers."""
        for module, before in self.plain.items():
            now = _plain(module)
            for name in now.keys() - before.keys():
                if name not in OF_LAST_SEQUENCE:
                    del vars(module)[name]
            for name, value in before.items():
                if now.get(name, module) is not value:
                    vars(module)[name] = value
        for module, buffers in self.buffers.items():
            for name, (tensor, version, copy) in buffers.items():
                module._buffers[name] = tensor
                if _version(tensor) != version:
                    tensor.copy_(copy)

    def restore_order(self) -> None:
        """After a patch was taken off and put back: everything in its old place again."""
        for runtime in runtimes(self.parts):
            present = {entry.owner for entry in runtime.entries}
            runtime.entries = [e for e in self.entries[runtime.site.module] if e.owner in present]
            runtime.refresh()
        for hooks, before in self.hooks:
            _reorder(hooks, before)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are data and not parts of it: numbers, text, tensors, and lists of such.

    Names with an underscore are the bookkeeping of libraries, ours included: what hooks they have put in place, say.
    """
    return {
        name: value
        for name, value in vars(module).items()
        if name not in OWN and not name.startswith("_") and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor | torch.dtype | torch.device)


def _buffers(module: nn.Module) -> dict[str, tuple[Tensor, int, Tensor]]:
    return {n: (t, _version(t), t.clone()) for n, t in module._buffers.items() if isinstance(t, Tensor)}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _reorder(hooks: Any, before: list[int]) -> None:
    """Put hooks that were taken off and put on again into their old places among the others."""
    again = [key for key in hooks if key not in before]
    if not again:
        return
    order = [key if key in hooks else again.pop(0) for key in before if key in hooks or again]
    for key in [*order, *again]:
        hooks.move_to_end(key)
