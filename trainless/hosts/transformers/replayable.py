"""Which decoders can be given a prompt a second time, known before any call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .rotary import FIXED
from .version import CACHE_NAMES

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
# Classes that embed images themselves, whatever a prompt holds. Others are given embeddings with the images in them,
# or their images are refused when a call brings some.
EMBEDS_IMAGES = ("ChameleonModel", "IdeficsModel")
# What a forward may be given for each token beside its embedding, by the field of the config that says so.
BESIDE = {"per_layer_inputs": "hidden_size_per_layer_input"}


def refusal(owner: PreTrainedModel, layers: Sequence[Any], keys: str) -> str | None:
    """Why a prompt cannot be read again by ``owner``, the model around the layers; None where it can.

    layers: those of a dynamic cache of its config. keys: how the keys attended to come from the cache (``Family``).
    """
    name = type(owner).__name__
    if getattr(owner.config, "is_encoder_decoder", False):
        return (
            f"{name} reads an encoder beside its own tokens, and a prompt would have to be read again with it"
        )
    if keys != "same":
        return "its keys are made from what is cached, which a second reading does not score"
    names = inspect.signature(type(owner).forward).parameters
    missing = next((n for n in ("inputs_embeds", "attention_mask", "position_ids") if n not in names), None)
    if missing is not None or not any(n in names for n in CACHE_NAMES):
        return f"{name} takes no {missing or 'cache'}, so a prompt cannot be given to it again"
    if name in EMBEDS_IMAGES:
        return f"{name} puts images among its tokens itself, so that its tokens alone are not its prompt"
    beside = next((n for n in BESIDE if n in names), None)
    if beside is not None and getattr(owner.config, BESIDE[beside], None):
        return f"{name} is given {beside} beside its tokens, which would have to be given again"
    other = next((type(layer).__name__ for layer in layers if type(layer) not in PLAIN), None)
    if other is not None or not layers:
        return (
            f"the cache of {name} has a {other}, which a second reading would change"
            if other is not None
            else f"which cache {name} has is not known"
        )
    if any(getattr(m, "is_kv_shared_layer", False) for m in owner.modules()):
        return f"layers of {name} share their keys, which a second reading would hand on"
    kinds = {kind for m in owner.modules() for kind in _frequencies(m)}
    if kinds - FIXED:
        return (
            f"its rotary frequencies ({sorted(kinds - FIXED)[0]}) depend on how long the sequence has become"
        )
    return None


def _frequencies(module: nn.Module) -> set[str]:
    kind = getattr(module, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {kind} if isinstance(kind, str) else set()
