"""States that ride on cache layers: what methods remember of a sequence, moved along with its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import InputError, Unsupported
from ..seams import State


class Carrier:
    """Moves the states of a layer along with its batch and key axes."""

    states: dict[str, State]

    def _each(self, change: Callable[[Tensor, int | None, int | None, float], Tensor]) -> None:
        for state in self.states.values():
            for name, tensor in state.tensors.items():
                batch, keys = state.axes[name]
                state.tensors[name] = change(tensor, batch, keys, state.fill[name])

    def _states_grow(self, before: int, added: int) -> None:
        """Make room for ``added`` keys after the ``before`` that are stored; drop what slid out on the left."""

        def grow(t: Tensor, batch: int | None, keys: int | None, fill: float) -> Tensor:
            if keys is None:
                return t
            if t.shape[keys] > before:
                t = t.narrow(keys, t.shape[keys] - before, before)
            shape = list(t.shape)
            shape[keys] = before + added - t.shape[keys]
            return torch.cat([t, t.new_full(shape, fill)], keys) if shape[keys] else t

        self._each(grow)

    def _states_crop(self, count: int) -> None:
        self._each(
            lambda t, b, keys, fill: t if keys is None else t.narrow(keys, 0, max(0, t.shape[keys] - count))
        )

    def _states_batch(self, change: Callable[[Tensor, int], Tensor]) -> None:
        self._each(lambda t, batch, keys, fill: t if batch is None else change(t, batch))

    def _states_gather(self, index: Tensor) -> None:
        """Keep the keys at ``index`` (B, Hkv, W) in every state that has one entry per key."""

        def gather(t: Tensor, batch: int | None, keys: int | None, fill: float) -> Tensor:
            if keys is None:
                return t
            # States are (B, heads, Lk): heads may be query heads, key/value heads, or one for all.
            b, heads, _ = t.shape
            hkv = index.shape[1]
            if heads < hkv:
                t = t.expand(b, hkv, t.shape[2])
                heads = hkv
            return torch.gather(t, 2, index.repeat_interleave(heads // hkv, 1))

        self._each(gather)


class StatefulMixin(Carrier):
    """Added to the class of a stock layer, for one instance: carries states, changes nothing else."""

    keys: Any
    values: Any
    past: int
    record_past = False
    before: dict[str, dict[str, Tensor]] | None = None  # the states before the rows that crop() may take back
    added = 0  # how many rows those are

    def __reduce__(self) -> Any:
        # The class of an instance is made when needed, so a cache on disk names the stock one and is given it anew.
        return _empty, (type(self).__bases__[1],), vars(self)

    def activate_past_recording(self) -> None:
        """From now on remember the states before each call until crop() confirms or rejects its tokens."""
        inherited = getattr(super(), "activate_past_recording", None)
        if inherited is not None:
            inherited()
        self.record_past = True

    def grow(self, held: int, added: int) -> None:
        """``added`` tokens come to the ``held`` that the layer hands out; called where no update says so."""
        if self.record_past:
            if self.before is None:
                self.before = {name: dict(state.tensors) for name, state in self.states.items()}
            self.added += added
        self._states_grow(held, added)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        held = self.keys.shape[-2] if isinstance(self.keys, Tensor) and self.keys.dim() == 4 else 0
        self.grow(held, key_states.shape[-2])
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        if isinstance(self, DynamicLayer):
            # transformers 5.17 only fills the keys with zeros, and the next sequence would be added to those.
            self.keys = self.values = None
            self.is_initialized = False
        super().reset()  # type: ignore[misc]
        self.states.clear()
        self.before, self.added = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._states_batch(lambda t, axis: t.index_select(axis, beam_idx.to(t.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}): give minus the number of tokens to take back")
        count = -tokens_to_remove
        if count and self.before is not None and count == self.added:
            for name, state in self.states.items():
                state.tensors = dict(self.before.get(name, {}))
        elif count:
            summed = next((name for name, state in self.states.items() if state.cumulative), None)
            if summed is not None:
                raise Unsupported(
                    f"{summed}: its statistics add up over tokens, so {count} of the last "
                    f"{self.added or 'few'} cannot be taken back; do without assisted decoding"
                )
            self._states_crop(count)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.before, self.added = None, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._states_batch(lambda t, axis: t.repeat_interleave(repeats, axis))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._states_batch(
            lambda t, axis: t.index_select(axis, torch.arange(t.shape[axis])[indices].to(t.device))
        )

    def offload(self) -> None:
        super().offload()  # type: ignore[misc]
        self._states_batch(lambda t, axis: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()  # type: ignore[misc]
        device = self.keys.device if isinstance(self.keys, Tensor) else "cpu"
        self._states_batch(lambda t, axis: t.to(device, non_blocking=True))


_stateful: dict[type, type] = {}
_mixins: dict[type, type] = {}


def states_on(cls: type, mixin: type) -> None:
    """Layers of ``cls`` itself carry states by ``mixin``."""
    _mixins[cls] = mixin


def stateful(layer: Any) -> Any:
    """A layer of the same class and contents as ``layer``, which also carries states."""
    made = _empty(type(layer))
    vars(made).update(vars(layer))
    made.states = {}
    return made


def _empty(cls: type) -> Any:
    """An instance without contents of the class that carries states and is otherwise like ``cls``."""
    if cls not in _stateful:
        # _layer_type registers subclasses globally in transformers; ours must stay out of that table.
        _stateful[cls] = type(
            f"Stateful{cls.__name__}", (_mixins.get(cls, StatefulMixin), cls), {"_layer_type": None}
        )
    return object.__new__(_stateful[cls])
