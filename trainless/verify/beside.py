"""What methods do beside the attention: tensors that stand in place of others, and inputs of modules that change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.runtime import Runtime
from ..seams import Contribution, Site, parameter_of


def replaced(given: Iterable[tuple[Site, Contribution]]) -> tuple[list[str], int]:
    """(what is wrong, how many tensors are in place): each parameter has the numbers of what replaces it."""
    wrong, count = [], 0
    for site, contribution in given:
        for name, tensor in (contribution.tensors or {}).items():
            found = parameter_of(site.module, name)
            now = None if found is None else getattr(*found)
            if now is None:
                wrong.append(f"{site.name}.{name} is not there any more")
                continue
            if now.device.type == "meta":
                continue  # offloaded: its numbers are brought for each call
            # A quantised tensor looks like another on the outside, and keeps its codes.
            shown = now.dequantize() if type(now.data) is not Tensor and hasattr(now, "dequantize") else now
            want = tensor.to(shown.device, shown.dtype)
            if shown.shape != want.shape or not torch.equal(shown.detach(), want):
                wrong.append(f"{site.name}.{name} is not what the method puts there")
            count += 1
    return wrong, count


class InputsWatch:
    """Holds what modules inside sites are given against what the contributions of the seam ``input`` say."""

    def __init__(self, runtimes: Iterable[Runtime]):
        self.runtimes = [r for r in runtimes if r.plan.of["input"]]
        self.wrong: list[str] = []
        self.held = 0
        self.came: dict[nn.Module, Any] = {}

    @contextmanager
    def on(self) -> Iterator[InputsWatch]:
        handles = []
        for runtime in self.runtimes:
            for name in dict.fromkeys(e.contribution.module for e in runtime.plan.of["input"]):
                module = runtime.site.module.get_submodule(name)
                # Before every other hook and after all of them: between the two stands the patch.
                handles.append(module.register_forward_pre_hook(self._first, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_pre_hook(self._last(runtime, name), with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.came[module] = args, dict(kwargs)

    def _last(self, runtime: Runtime, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            want: Any = self.came.pop(module)
            for entry in runtime.plan.of["input"]:
                own = entry.contribution
                if own.module == name and own.value is not None:
                    value: Any = own.value
                    found = value(*want, runtime.own_tensors(own))
                    want = want if found is None else found
            if _same((args, kwargs), want):
                self.held += 1
            else:
                self.wrong.append(f"{runtime.site.name}.{name} is not given what the method says")

        return look


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)
