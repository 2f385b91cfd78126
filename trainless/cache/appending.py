"""A stock growing layer that appends in place: no copy of the whole cache for every token.

Keys and values are views of the filled part of buffers with room for more. What a view shows is never written to again:
tokens are added behind it, and whoever makes another tensor of the keys (``crop``, beams, a user) gets new buffers.
"""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .carrier import StatefulMixin, states_on

ROOM = 64  # tokens that there is room for beyond those held, at least; an eighth of them where that is more


class AppendingMixin:
    """Added to the class of a growing layer; copies as it does where gradients may be wanted or a compiler traces."""

    keys: Any
    values: Any
    buffers: tuple[Tensor, Tensor] | None = None
    shown: tuple[Any, Any] | None = None  # the views of the buffers that were handed out last

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not _fit(self.keys, self.values, key_states, value_states):
            self._forget()
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        held, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self._own(stop):
            self.buffers = _roomy(self.keys, stop), _roomy(self.values, stop)
        assert self.buffers is not None
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:stop].copy_(new)
        self.keys, self.values = self.buffers[0][:, :, :stop], self.buffers[1][:, :, :stop]
        self.shown = self.keys, self.values
        return self.shown

    def _own(self, stop: int) -> bool:
        """Whether what is held is what was written into the buffers last, and they have room up to ``stop``."""
        buffers, shown = self.buffers, self.shown
        if buffers is None or shown is None or self.keys is not shown[0] or self.values is not shown[1]:
            return False
        if buffers[0].shape[2] < stop or (
            buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        ):
            return False
        # A copy through a file is of the views and of the buffers apart.
        return bool(
            shown[0].data_ptr() == buffers[0].data_ptr() and shown[1].data_ptr() == buffers[1].data_ptr()
        )

    def _forget(self) -> None:
        self.buffers = self.shown = None

    def reset(self) -> None:
        self._forget()
        super().reset()  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super().crop(*args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super().reorder_cache(*args, **kwargs)  # type: ignore[misc]

    def offload(self) -> None:
        self._forget()
        super().offload()  # type: ignore[misc]


def _fit(keys: Any, values: Any, new_keys: Tensor, new_values: Tensor) -> bool:
    """Whether new tokens can be written behind those that are held."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    for held, new in ((keys, new_keys), (values, new_values)):
        if not isinstance(held, Tensor) or held.dim() != 4 or new.dim() != 4 or not held.shape[2]:
            return False
        if held.shape[:2] != new.shape[:2] or held.shape[3] != new.shape[3] or held.requires_grad:
            return False
        if held.dtype != new.dtype or held.device != new.device:
            return False
    return True


def _roomy(held: Tensor, stop: int) -> Tensor:
    """A buffer that starts with what is held and has room behind ``stop``."""
    b, heads, length, width = held.shape
    made = held.new_empty(b, heads, stop + max(ROOM, stop // 8), width)
    made[:, :, :length].copy_(held)
    return made


class AppendingLayer(AppendingMixin, DynamicLayer):
    """A stock growing layer that appends in place; copies of it, through a file or not, are stock layers."""

    _layer_type = None  # transformers registers subclasses by it, globally

    def __reduce__(self) -> Any:
        # In a form that names no class of this package.
        return vars(copyreg)["_reconstructor"], (DynamicLayer, object, None), _stock(self)


def in_place(layer: DynamicLayer) -> AppendingLayer:
    """A layer in place of a stock one, still empty, that appends in place."""
    made = object.__new__(AppendingLayer)
    vars(made).update(vars(layer))
    return made


def plain(layer: Any) -> Any:
    """The stock layer in whose place an ``AppendingLayer`` stands, with what that holds; any other layer as it is."""
    if type(layer) is not AppendingLayer:
        return layer
    made = object.__new__(DynamicLayer)
    vars(made).update(_stock(layer))
    return made


def _stock(layer: AppendingLayer) -> dict[str, Any]:
    """What a stock layer holds in its place, and nothing of the room behind it."""
    held = {name: each for name, each in vars(layer).items() if name not in ("buffers", "shown")}
    return {name: each.contiguous() if isinstance(each, Tensor) else each for name, each in held.items()}


class AppendingStatefulMixin(StatefulMixin, AppendingMixin):
    """Carries states, and appends in place."""


states_on(DynamicLayer, AppendingStatefulMixin)
