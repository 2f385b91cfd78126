"""Which cache layer each attention module will use, known before any call, and what that rules out.

The layers are those of the cache that transformers builds for the decoder's own config.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from .replayable import refusal
from .version import DummyLayer, WindowBesideRecurrence

# Layers that can be replaced by ones that evict or pack; the second also holds the state of a recurrence.
PLAIN = (DynamicLayer, LinearAttentionAndFullAttentionLayer)

# The method of a decoder that drops the rows of a prompt which nobody asks for, before the layers that borrow keys.
CUTS = "_maybe_slice_kv_shared_inputs"


@dataclass(frozen=True)
class Held:
    """What is known of the cache of one module.

    kinds: classes of the layers it may use, empty where nothing is known. window: tokens that they hold at most,
    the one under way included. depths: how many layers there are for it, in the mean of its kind. cut: whether the
    decoder gives layers without a cache of their own only those rows of a prompt whose logits are asked for. static:
    classes of the layers in a static cache in their place.
    """

    kinds: tuple[type, ...] = ()
    window: int | None = None
    depths: float = 1
    cut: bool = False
    static: tuple[type, ...] = ()

    @property
    def borrows(self) -> bool:
        """Whether it has no layer of its own and reads another's."""
        return any(issubclass(kind, DummyLayer) for kind in self.kinds)

    def no_kv(self, chunked: bool) -> str | None:
        """Why a cache layer of this kind can neither evict nor pack; None where it can, or nothing is known."""
        for kind in self.kinds:
            if kind in PLAIN:
                continue
            if issubclass(kind, DummyLayer):
                return "it has no cache of its own: its keys and values are another layer's"
            if issubclass(kind, DynamicSlidingWindowLayer):
                return (
                    "a chunked layer keeps its own chunk"
                    if chunked
                    else "a sliding-window layer keeps its own window"
                )
            if issubclass(kind, DynamicIndexedLayer):
                return "an indexer chooses among its keys, and needs each at its place"
            return f"its cache layer is a {kind.__name__}, and only plain ones can evict or be packed"
        return None

    @property
    def no_state(self) -> str | None:
        """Why nothing can be remembered of a sequence here, key by key."""
        if self.borrows and self.cut:
            return "it reads another layer's keys, for the last rows of a prompt only, and the method looks over all"
        known = (
            *PLAIN, DummyLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer,
            WindowBesideRecurrence,
        )  # fmt: skip
        for kind in self.kinds:
            if kind not in known:
                return (
                    f"its cache layer is a {kind.__name__}, which holds other keys than those of the tokens"
                )
        return None


class Layers:
    """The cache layers of the decoders in one model; each cache is built once."""

    def __init__(self, ancestors: Mapping[str, PreTrainedModel]):
        self.ancestors = ancestors
        self.built: dict[int, tuple[list[Any], list[Any]]] = {}
        self.replays: dict[tuple[int, str], str | None] = {}

    def owner(self, name: str) -> PreTrainedModel | None:
        """The model nearest around the module called so."""
        around = [n for n in self.ancestors if n in ("", name) or name.startswith(f"{n}.")]
        return self.ancestors[max(around, key=len)] if around else None

    def no_replay(self, name: str, keys: str) -> str | None:
        """Why the prompt of a module called so cannot be read a second time; None where it can."""
        owner = self.owner(name)
        if owner is None:
            return "it stands in no model that could be given its prompt again"
        if (id(owner), keys) not in self.replays:
            self.replays[id(owner), keys] = refusal(owner, self.layers_of(owner)[0], keys)
        return self.replays[id(owner), keys]

    def layers_of(self, owner: PreTrainedModel) -> tuple[list[Any], list[Any]]:
        """The layers of a dynamic cache of its config, and of a static one."""
        if id(owner) not in self.built:
            self.built[id(owner)] = _build(owner.config)
        return self.built[id(owner)]

    def of(self, name: str, module: nn.Module) -> Held:
        owner = self.owner(name)
        if owner is None:
            return Held()
        layers, static = self.layers_of(owner)
        parameters = inspect.signature(type(module).forward).parameters
        index, depths = getattr(module, "layer_idx", None), 1.0
        if "layer_idx" in parameters or not isinstance(index, int) or index < 0:
            # Blocks that stand at several depths are told at each call which layer they are.
            mine = [layer for layer in layers if isinstance(layer, LinearAttentionAndFullAttentionLayer)]
        elif "cycle_offset" in parameters:
            mine = layers
            alike = sum(type(m) is type(module) for m in owner.modules())
            depths = len(layers) / max(1, alike)
        else:
            mine = layers[index : index + 1]
        windows = [w for layer in mine if isinstance(w := getattr(layer, "sliding_window", None), int)]
        kinds = tuple(dict.fromkeys(type(layer) for layer in mine))
        cut = callable(getattr(type(owner), CUTS, None))
        theirs = (s for one, s in zip(layers, static, strict=False) if any(one is layer for layer in mine))
        fixed = tuple(dict.fromkeys(type(layer) for layer in theirs))
        return Held(kinds, min(windows) if windows else None, depths, cut, fixed)


def _build(config: Any) -> tuple[list[Any], list[Any]]:
    """The layers of a dynamic cache and of a static one; [] for a config of no decoder, which has none either."""
    found: list[list[Any]] = []
    for make in (DynamicCache, functools.partial(StaticCache, max_cache_len=1)):
        try:
            found.append(list(make(config=config).layers))
        except Exception:  # whatever the config lacks
            found.append([])
    return found[0], found[1]


def index_of(module: nn.Module, kwargs: Mapping[str, Any]) -> int | None:
    """The number of the cache layer that the call under way will use."""
    index = kwargs.get("layer_idx")
    if index is None:
        index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or index < 0:
        return None
    return index + int(kwargs.get("cycle_offset") or 0)


def depths_of(module: nn.Module, layers: list[Any]) -> list[int]:
    """The numbers of the layers in a cache that ``module`` may use."""
    parameters = inspect.signature(type(module).forward).parameters
    index = getattr(module, "layer_idx", None)
    if "layer_idx" in parameters or not isinstance(index, int) or index < 0:
        return []
    return [index]
