"""Which part of a model an attention module belongs to, and whose keys it reads.

Decoder layers are those that the model's own decoder owns: what ``get_decoder`` names, down to the stack itself.
Towers are what ``get_encoder`` names, or what says of itself that it takes pixels or sound. What stands between a
tower and the decoder (resamplers, Q-Formers, poolers) is a connector, and a part of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .version import takes_cache

CROSS = (
    "crossattention",
    "cross_attn",
    "cross_attention",
    "encdecattention",
    "encoder_attn",
    "encoder_decoder_attention",
    "multihead_attn",
    "x_attn",
)
# Arguments of a forward by which it is given keys that are not its queries' own, where it cannot do without.
OTHERS = ("key_value_states", "cross_attention_states", "context")
SOUND = ("input_features", "input_values", "audio_values")


class Parts:
    """The decoders, encoders and towers of one model; ``ancestors`` are its pretrained models by name."""

    def __init__(self, ancestors: Mapping[str, PreTrainedModel]):
        self.ancestors = ancestors
        self.names = {id(module): name for name, module in ancestors.items()}
        generating = [m for m in ancestors.values() if m.can_generate()] or list(ancestors.values())[:1]
        self.decoders = {id(found) for root in generating if (found := _decoder(root)) is not None}
        self.encoders = [
            name for root in ancestors.values() if (name := self._text_encoder(root)) is not None
        ]
        self.towers = {
            kind: [name for root in ancestors.values() if (name := self._tower(root, modality)) is not None]
            for kind, modality in (("vision", "image"), ("audio", "audio"))
        }

    def of(self, name: str, module: nn.Module) -> frozenset[str]:
        """The names that ``where: {part}`` may use for the attention ``module``."""
        around = [n for n in self.ancestors if n in ("", name) or name.startswith(f"{n}.")]
        at = max(around, key=len, default=None)
        owner = None if at is None else self.ancestors[at]
        causal, cached = bool(getattr(module, "is_causal", False)), keeps(module)
        generates = any(self.ancestors[n].can_generate() for n in around)
        if owner is not None and id(owner) in self.decoders and (causal or (cached and generates)):
            return frozenset({"text", "decoder"})
        if owner is not None and id(owner) in self.decoders and generates and role(name, module) == "cross":
            return frozenset({"text", "decoder"})
        kind = self._kind(name, owner, at)
        if kind == "text" and self._between(name, around, causal and cached):
            return frozenset({"connector", "encoder"})
        path = name.lower().split(".")
        encoder = ("encoder" in path or not causal) and "decoder" not in path
        return frozenset({kind, "encoder" if encoder else "decoder"})

    def _kind(self, name: str, owner: PreTrainedModel | None, at: str | None) -> str:
        """text, vision or audio, by what surrounds the module."""
        path = name.lower().split(".")
        whole = at == "" and len(self.ancestors) > 1  # the model around everything says nothing of its parts
        if owner is not None and not whole:
            says = f"{type(owner.config).__name__} {owner.main_input_name}".lower()
            if owner.main_input_name in SOUND or "audio" in says or "speech" in says:
                return "audio"
            if "pixel_values" in says or "vision" in says:
                return "vision"
        if any(_inside(name, encoder) for encoder in self.encoders):
            return "text"
        for kind, towers in self.towers.items():
            if any(_inside(name, tower) for tower in towers):
                return kind
        if "text_model" in path or "language_model" in path:
            return "text"
        return "vision" if any("vision" in p or p == "visual" for p in path) else "text"

    def _between(self, name: str, around: list[str], decodes: bool) -> bool:
        """Whether the module stands beside the decoder of a model that generates, and is no encoder of text."""
        if decodes or any(_inside(name, encoder) for encoder in self.encoders):
            return False
        return any(self.ancestors[n].can_generate() for n in around)

    def _text_encoder(self, root: PreTrainedModel) -> str | None:
        if not getattr(root.config, "is_encoder_decoder", False):
            return None
        return self._found(root, root.get_encoder())

    def _tower(self, root: PreTrainedModel, modality: str) -> str | None:
        name = self._found(root, root.get_encoder(modality=modality))
        return None if name in self.encoders else name

    def _found(self, root: PreTrainedModel, module: Any) -> str | None:
        """The full name of ``module`` inside ``root``; None where it is ``root`` itself, or not there."""
        if module is None or module is root:
            return None
        name = next((n for n, m in root.named_modules() if m is module), None)
        if not name:
            return None
        return f"{self.names[id(root)]}.{name}" if self.names[id(root)] else name


def _decoder(root: PreTrainedModel) -> PreTrainedModel | None:
    """The decoder that ``root`` names, followed to the stack itself; None where it names no pretrained model."""
    found: Any = root
    for _ in range(8):
        inner = found.get_decoder() if hasattr(found, "get_decoder") else found
        if inner is found or inner is None:
            break
        found = inner
    return found if isinstance(found, PreTrainedModel) else None


def _inside(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def keeps(module: nn.Module) -> bool:
    """Whether the module's forward can be given a cache."""
    return takes_cache(inspect.signature(type(module).forward).parameters)


def role(name: str, module: nn.Module) -> str:
    """self or cross: a module that cannot be called without another's states reads other keys than its queries'."""
    if getattr(module, "is_cross_attention", False):
        return "cross"
    parameters = inspect.signature(type(module).forward).parameters
    if any(n in parameters and parameters[n].default is inspect.Parameter.empty for n in OTHERS):
        return "cross"
    path = name.lower().split(".")[-3:]
    return "cross" if any(c in part for part in path for c in CROSS) else "self"
