"""States on the layers of a static cache, which a compiler can read: as wide as the cache while steps run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from .carrier import StatefulMixin, states_on


class StaticStatefulMixin(StatefulMixin):
    """Added to the class of a stock static layer, for one instance.

    While the engine runs a call, states have a column for each token so far (``fit``), as in a dynamic cache. Behind a
    call they are as wide as the layer (``settle``), so that steps of one token change no size: they read them, and write
    in place what adds up over tokens.
    """

    settled = False
    max_cache_len: int

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return StaticLayer.update(self, key_states, value_states, *args, **kwargs)  # type: ignore[arg-type]

    def fit(self, past: int, width: int) -> None:
        """Columns for the ``past`` tokens as they are, and new ones up to ``width``."""

        def fitted(t: Tensor, batch: int | None, keys: int | None, fill: float) -> Tensor:
            return t if keys is None else t.narrow(keys, 0, min(past, t.shape[keys]))

        self._each(fitted)
        self._widen(width)
        self.settled = False

    def settle(self) -> None:
        """A column for every slot of the layer: those without a token have what a new token has."""
        self._widen(self.max_cache_len)
        self.settled = True
        for tensor in self._written():
            if tensor.is_cuda:  # or a CUDA graph would not be recorded around what is written to
                torch._dynamo.mark_static_address(tensor)

    @property
    def only_inferred(self) -> bool:
        """Whether steps write what was made under inference_mode."""
        return any(tensor.is_inference() for tensor in self._written())

    def _written(self) -> Iterator[Tensor]:
        """The tensors that steps write in place."""
        for state in self.states.values():
            yield from (state.tensors[name] for name in state.cumulative if name in state.tensors)

    def _widen(self, width: int) -> None:
        def wide(t: Tensor, batch: int | None, keys: int | None, fill: float) -> Tensor:
            if keys is None or t.shape[keys] == width:
                return t
            shape = list(t.shape)
            shape[keys] = width - t.shape[keys]
            return torch.cat([t, t.new_full(shape, fill)], keys)

        self._each(wide)

    def _states_crop(self, count: int) -> None:
        """Columns of tokens that were taken back are made anew by the next ``fit``."""
        if self.settled and isinstance(self.get_seq_length(), Tensor):  # type: ignore[attr-defined]
            self.fit(int(self.get_seq_length()) - count, self.max_cache_len)  # type: ignore[attr-defined]
            self.settled = True

    def reset(self) -> None:
        super().reset()
        self.settled = False


states_on(StaticLayer, StaticStatefulMixin)
