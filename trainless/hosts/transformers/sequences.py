"""The States of modules around which somebody stands, and those that all layers share.

They are of the sequence that the forward under way goes on with.

During a forward they lie with what is noted of it (``inputs``); between two they lie on a layer of the user's cache,
which carries them along when beams are reordered, rows repeated or the cache is copied or reset.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from ...cache import CompressingLayer, StatefulMixin, stateful
from ...edits.journal import Journal
from ...engine.runtime import Runtime
from ...errors import Unsupported
from ...seams import State
from ..modules.around import Surroundings, Tell
from . import inputs
from .inputs import Noted, cache_among, outermost


def watch(runtime: Runtime, model: nn.Module, station: Journal) -> Tell:
    """Have the forwards around the site noted, and their modules' States kept; returns who tells of its calls."""
    inputs.watch(runtime, model, station)
    runtime.asked["inputs"].keep = store
    return surroundings


def surroundings(runtime: Runtime) -> Surroundings:
    """What is known of a module's call inside the forward under way; nothing outside of any."""
    around = outermost(runtime)
    if around is None:
        return Surroundings()
    if around.states is None:
        around.states = _loaded(around)
    return Surroundings(around.states, past=around.past)


def _loaded(around: Noted) -> dict[str, State]:
    carrier = None if around.cache is None else _carrier(around.cache)
    return {} if carrier is None else dict(carrier.states)


def _carrier(cache: Cache) -> Any:
    return next(
        (layer for layer in cache.layers if isinstance(layer, StatefulMixin | CompressingLayer)), None
    )


def store(around: Noted, output: Any) -> None:
    """Put what the forward's modules remember on a layer of its cache, when it is over."""
    # What is kept "in" something ends with the forward.
    states = {name: state for name, state in (around.states or {}).items() if " at " in name}
    cache = around.cache
    if not any(state.tensors for state in states.values()):
        return
    if cache is None:
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        cache = cache_among(values)
    if cache is None:
        return  # without a cache the sequence ends here
    carrier = _carrier(cache)
    if carrier is None:
        number = next((i for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer)), None)
        if number is None:
            method = next(iter(states)).partition(" at ")[0]
            raise Unsupported(
                f"{method}: a {type(cache).__name__} without a dynamic layer cannot carry the state of a sequence; use a "
                "dynamic cache (drop cache_implementation)"
            )
        carrier = cache.layers[number] = stateful(cache.layers[number])
    carrier.states.update(states)
