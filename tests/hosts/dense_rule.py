"""The rules on images, written out densely in float64 around torch's own operator; nothing of trainless is used.

Which of the tokens are the image's is told by the test, per attention layer: see ``Place``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SDPA = torch.nn.functional.scaled_dot_product_attention
HIDDEN = -1000.0


@dataclass(frozen=True)
class Place:
    """Where an image of that grid stands among the keys and the rows of one attention call.

    first, row: its first key and query, one number or one for each row of the batch. grids: images of that grid.
    at_trained: tokens of the grid at the trained size.
    """

    grid: tuple[int, int]
    at_trained: int
    first: int | list[int] = 0
    row: int | list[int] | None = None
    grids: int = 1

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grids


# (layer's name, queries, keys, how often the layer has called before) -> the image's place; None: no image there
Where = Callable[[str, int, int, int], Place | None]


class Rule(TorchFunctionMode):
    """One method on every attention call of ``model`` that ``where`` (or for temperatures ``own``) points to."""

    def __init__(self, model: nn.Module, where: Where, own: Callable[[str], bool], **rule: Any):
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.where, self.own, self.rule = where, own, rule
        self.stack: list[tuple[str, int]] = []
        self.handles: list[Any] = []
        self.changed = 0
        for module in model.modules():
            if hasattr(module, "processor"):
                self.handles.append(module.register_forward_pre_hook(self._enter))
                self.handles.append(module.register_forward_hook(self._leave))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append((self.names[module], 0))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not SDPA or not self.stack:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = given["query"], given["key"], given["value"]
        name, calls = self.stack[-1]
        self.stack[-1] = (name, calls + 1)
        if "temperature" in self.rule:
            factor: Any = 1 / self.rule["temperature"] if self.own(name) else None
            return func(*args, **kwargs) if factor is None else self._dense(given, q, k, v, factor, None)
        place = self.where(name, q.shape[2], k.shape[2], calls)
        if place is None:
            return func(*args, **kwargs)
        return self._dense(given, q, k, v, None, place)

    def _dense(self, given: Any, q: Tensor, k: Tensor, v: Tensor, factor: Any, place: Place | None) -> Tensor:
        self.changed += 1
        batch, lq, lk = q.shape[0], q.shape[2], k.shape[2]
        logits = q.double() @ k.double().transpose(-1, -2) * (given.get("scale") or q.shape[-1] ** -0.5)
        mask = given.get("attn_mask")
        seen = torch.ones(batch, 1, lq, lk, dtype=torch.bool)
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
            shown = mask if mask.dtype == torch.bool else mask > HIDDEN
            seen = seen & shown
            if mask.dtype != torch.bool:
                logits = logits + torch.where(shown, mask.double(), 0.0)
        if given.get("is_causal"):
            seen = seen.tril()
        own = None if place is None else _own(place, batch, lk)
        unmasked = seen
        if place is not None and "radius" in self.rule:
            near = _near(place.grid, self.rule["radius"])
            seen = seen.expand(-1, -1, lq, -1).clone()
            for number, (first, row) in enumerate(zip(*_starts(place, batch), strict=True)):
                inside = seen[number, :, row : row + place.tokens, first : first + place.tokens]
                inside &= near
        if place is not None and "entropy" in self.rule:
            # The disc restricts what is counted now, not what was there in training.
            n = seen.sum(-1, keepdim=True)
            part = (unmasked & own).sum(-1, keepdim=True)
            t = (unmasked & ~own).sum(-1, keepdim=True) + place.at_trained * place.grids * (part > 0)
            factor = (n.clamp(min=2).double().log() / t.clamp(min=2).double().log()).sqrt()
        if factor is not None:
            logits = logits * factor
        rows = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
        return (rows @ v.double()).to(q.dtype)


def _starts(place: Place, batch: int) -> tuple[list[int], list[int]]:
    row = place.first if place.row is None else place.row
    return tuple(list(n) if isinstance(n, list) else [n] * batch for n in (place.first, row))  # type: ignore[return-value]


def _own(place: Place, batch: int, lk: int) -> Tensor:
    found = torch.zeros(batch, 1, 1, lk, dtype=torch.bool)
    for number, first in enumerate(_starts(place, batch)[0]):
        found[number, ..., first : first + place.tokens] = True
    return found


def _near(grid: tuple[int, int], radius: float) -> Tensor:
    y, x = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    y, x = y.reshape(-1), x.reshape(-1)
    return (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2


@contextlib.contextmanager
def ruled(model: nn.Module, where: Where, own: Callable[[str], bool], **rule: Any) -> Iterator[Rule]:
    with Rule(model, where, own, **rule) as found:
        yield found
