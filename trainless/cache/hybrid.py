"""Cache layers that hold the keys of an attention and, beside them, the state of a recurrence (hybrid blocks).

The recurrence is transformers' own and stays as it is; only the attention's half evicts or packs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from .compressing import CompressingLayer

STATE = (
    "number_of_states", "conv_states", "recurrent_states", "is_conv_states_initialized",
    "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size", "device", "dtype",
)  # fmt: skip


class RecurrentMixin:
    """In front of a compressing class: what both halves of the layer have to do."""

    def __reduce__(self) -> Any:
        # The class of an instance is made when needed, so a cache on disk names the one that evicts or packs.
        return _empty, (type(self).__bases__[1],), self.__getstate__()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        if any(self.is_conv_states_initialized.values()):  # type: ignore[attr-defined]
            LinearAttentionLayer.crop(self, tokens_to_remove)  # type: ignore[arg-type]
        super().crop(tokens_to_remove)  # type: ignore[misc]


_recurrent: dict[type, type] = {}


def beside_recurrence(made: CompressingLayer, layer: Any) -> CompressingLayer:
    """``made``, an empty layer, as one that also holds the recurrence of ``layer``, with the state it has now."""
    joined = _empty(type(made))
    vars(joined).update({name: value for name, value in vars(layer).items() if name in STATE})
    vars(joined).update({name: value for name, value in vars(made).items() if name not in STATE})
    joined.record_past = layer.record_past
    return joined


def _empty(cls: type) -> Any:
    """An instance without contents of the class that is like ``cls`` and has a recurrence beside it."""
    if cls not in _recurrent:
        # _layer_type registers subclasses globally in transformers; ours must stay out of that table.
        bases = (RecurrentMixin, cls, LinearAttentionAndFullAttentionLayer)
        _recurrent[cls] = type(f"Recurrent{cls.__name__}", bases, {"_layer_type": None})
    return object.__new__(_recurrent[cls])
