"""Calls that look at no tensor's values: steps on a frozen cache layer, and whatever ``torch.compile`` traces.

``step`` is asked before a module's forward, ``attention`` stands in the place of its attention function; what they
cannot do goes the long way, outside of a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from ...cache import Freezing, StaticStatefulMixin
from ...engine.row_steps import edited_row
from ...engine.runtime import Runtime
from ...errors import Unsupported
from ...kernels.visibility import bias_times
from .inputs import Noted, noted
from .layers import index_of

# Arguments of the interface that change the logits and that a traced call scales along with them, or leaves alone.
SCALED = ("position_bias", "softcap")
SINKS = "s_aux"


def step(runtime: Runtime, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The frozen layer on which the call that begins is a step; None where it is none."""
    ready = runtime.prepared
    if not ready.single or ready.refusal is not None or _others(kwargs):
        return None
    if runtime.watch is not None and not runtime.watch.settles:
        return None
    if module.training:
        return None  # the long way refuses dropout, which steps on buffers know nothing of
    layer = _layer(module, kwargs)
    if ready.edits:
        return layer if _reads_states(runtime, layer, args, kwargs) else None
    if not isinstance(layer, Freezing):
        return None
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or not layer.steps(hidden.shape[1], ready.evictor, ready.packer):
        return None
    if hidden.requires_grad and torch.is_grad_enabled():
        return None  # steps write in place, which no gradient goes through
    if not torch.compiler.is_compiling() and _looked_at(noted(runtime), layer):
        return None
    layer.stepping = True
    return layer


def _reads_states(runtime: Runtime, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call that begins is a step by what is remembered on ``layer``, of a static cache."""
    if not (isinstance(layer, StaticStatefulMixin) and layer.settled):
        return False
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.shape[1] != 1:
        return False
    if hidden.requires_grad and torch.is_grad_enabled():
        return False
    for edit in runtime.prepared.edits:
        state = layer.states.get(edit.method)
        if state is None or state.owner is not edit.owner:
            return False  # of another patch, or not there from the first token on: the long way says so
    if torch.compiler.is_compiling():
        return True
    if layer.only_inferred and not torch.is_inference_mode_enabled():
        return False  # what was made under inference_mode can be written there only
    around, images = noted(runtime), runtime.asked.get("images")
    if images is not None and images.rows is not None:
        return False  # an image by itself
    return around is None or not around.attentions


def fits(layer: Any, mask: Any) -> bool:
    """Whether a step on ``layer`` can be told by ``mask`` what it sees."""
    if isinstance(layer, Freezing):
        return True
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] == layer.max_cache_len


def _looked_at(around: Noted | None, layer: Freezing) -> bool:
    """Whether the long way has to look at this forward: at a mask of the user's own, or for probabilities."""
    if around is None:
        return False
    return around.attentions or (layer.capacity is None and around.handmade is not None)


def note(runtime: Runtime, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call that begins can be traced; its cache layer then waits at the site, where the plan uses one."""
    ready = runtime.prepared
    if ready.refusal is not None or _others(kwargs):
        return False
    if not ready.single:
        return True
    runtime.compiled_layer = step(runtime, module, args, kwargs)
    return runtime.compiled_layer is not None


def attention(
    runtime: Runtime,
    function: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any] | None:
    """One traced call, where it can be traced. ``function`` is the user's own attention."""
    ready = runtime.prepared
    layer, runtime.compiled_layer = runtime.compiled_layer, None
    if ready.inert:
        return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if ready.refusal is not None or _others(kwargs) or (ready.single and layer is None):
        return None
    if ready.factor != 1.0 and kwargs.get(SINKS) is not None:
        return None  # families read their sinks from the module, whatever they are passed
    if layer is not None and kwargs.get("position_bias") is not None:
        return None
    if ready.calls is not None:
        ready.calls.add_(1)
    return straight(runtime, function, layer, module, query, key, value, mask, scaling, dropout, kwargs)


def straight(
    runtime: Runtime,
    function: Any,
    layer: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
    real: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """The steps of a prepared plan, one after the other: factor, attention (on the buffers of ``layer``), gain."""
    ready = runtime.prepared
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if ready.factor != 1.0:
        scaling = scaling * ready.factor
        mask = bias_times(mask, ready.factor, query.shape[2], key.shape[2])
        kwargs = {n: v * ready.factor if n in SCALED and v is not None else v for n, v in kwargs.items()}
    weights = None
    if ready.edits:
        if not fits(layer, mask):
            raise Unsupported(
                f"{ready.edits[0].method}: {runtime.site.name} was given no mask over the slots of its static cache, so "
                "what a step sees is not known; use sdpa or eager attention, or a dynamic cache"
            )
        out, moved = edited_row(
            ready.edits, layer.states, query, key, value, mask, layer.get_seq_length() - 1, scale=scaling,
            softcap=kwargs.get("softcap"), sinks=kwargs.get(SINKS),
        )  # fmt: skip
        if ready.idle is not None and not (ready.gains or ready.factor != 1.0):
            ready.idle.add_(~moved)
    elif layer is None:
        out, weights = function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    else:
        if torch.compiler.is_compiling():
            layer.check_shown(mask)
        out = layer.attend(
            query, mask, real=real, scale=scaling, softcap=kwargs.get("softcap"), sinks=kwargs.get(SINKS),
            rotate=runtime.rotate if ready.rolled else None,
        )  # fmt: skip
        if layer.whole and ready.idle is not None and not (ready.gains or ready.factor != 1.0):
            ready.idle.add_(layer.untouched())
    return ready.gained(out), weights


def _layer(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    index = index_of(module, kwargs)
    for given in kwargs.values():
        if isinstance(given, EncoderDecoderCache):
            given = (
                given.self_attention_cache
            )  # a call over the encoder's keys is none that is traced or frozen
        if isinstance(given, Cache) and index is not None and index < len(given.layers):
            return given.layers[index]
    return None


def _others(kwargs: dict[str, Any]) -> bool:
    """Whether the call is about keys that are not its queries' own."""
    return kwargs.get("key_value_states") is not None or kwargs.get("encoder_hidden_states") is not None
