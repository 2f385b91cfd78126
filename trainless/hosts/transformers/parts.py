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

from .cross import role
from .stacks import DECODER, ENCODER, declared
from .version import takes_cache

# Inputs of a model, and keys under which the model around it holds its config.
PICTURES = frozenset({"pixel_values", "pixel_values_videos", "vision_config"})
SOUND = frozenset({"input_features", "input_values", "audio_values", "audio_config"})


class ModelParts:
    """The decoders, encoders and towers of one model; ``ancestors`` are its pretrained models by name."""

    def __init__(self, ancestors: Mapping[str, PreTrainedModel]):
        self.ancestors = ancestors
        self.names = {id(module): name for name, module in ancestors.items()}
        generating = [m for m in ancestors.values() if m.can_generate()] or list(ancestors.values())[:1]
        self.decoders = {id(found) for root in generating if (found := _decoder(root)) is not None}
        self.encoders = [
            name for root in ancestors.values() if (name := self._text_encoder(root)) is not None
        ]
        # The decoders of models that have an encoder as well.
        self.second = [
            name
            for root in ancestors.values()
            if self._text_encoder(root) is not None
            and (name := self._found(root, _decoder(root))) is not None
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
        if (
            owner is not None
            and id(owner) in self.decoders
            and generates
            and self.role(name, module) == "cross"
        ):
            return frozenset({"text", "decoder"})
        kind = self._kind(name, owner, at)
        if kind == "text" and self._between(name, around, causal and cached):
            return frozenset({"connector", "encoder"})
        return frozenset({kind, DECODER if self._decodes(name, module, kind, causal) else ENCODER})

    def _decodes(self, name: str, module: nn.Module, kind: str, causal: bool) -> bool:
        """Whether the module, of no decoder of text, is of a decoder all the same."""
        if any(_inside(name, encoder) for encoder in self.encoders):
            return False
        if any(_inside(name, decoder) for decoder in self.second):
            return True
        said = declared(name, module)
        # Towers that hear or see in steps keep a cache; others are encoders, causal or not.
        return said == DECODER if said is not None else causal and (kind == "text" or keeps(module))

    def role(self, name: str, module: nn.Module) -> str:
        """self or cross: whose keys the attention ``module`` reads."""
        around = (
            (n, model) for n, model in self.ancestors.items() if n in ("", name) or name.startswith(f"{n}.")
        )
        return role(name, module, around)

    def _kind(self, name: str, owner: PreTrainedModel | None, at: str | None) -> str:
        """text, vision or audio, by what the models around the module declare; text where none does."""
        whole = at == "" and len(self.ancestors) > 1  # the model around everything says nothing of its parts
        if owner is not None and not whole and (kind := self._declared(owner)) is not None:
            return kind
        if any(_inside(name, encoder) for encoder in self.encoders):
            return "text"
        for kind, towers in self.towers.items():
            if any(_inside(name, tower) for tower in towers):
                return kind
        return "text"

    def _declared(self, owner: PreTrainedModel) -> str | None:
        """vision or audio, where the class of ``owner`` says so: by its inputs, its config or its modalities."""
        takes = {owner.main_input_name, getattr(owner.config, "base_config_key", "")}
        parameters = inspect.signature(type(owner).forward).parameters
        if "input_ids" not in parameters:
            takes.update(parameters)
        given = owner.input_modalities
        modalities = {given} if isinstance(given, str) else set(given)
        for kind, names, own in (("audio", SOUND, {"audio"}), ("vision", PICTURES, {"image", "video"})):
            if takes & names:
                return kind
            # What stands beside a tower (a resampler, a decoder of speech) often inherits the modality of its model.
            if modalities <= own and not self.towers[kind] and not _reads_tokens(owner):
                return kind
        return None

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


def _reads_tokens(model: PreTrainedModel) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except (AttributeError, NotImplementedError):  # how transformers says that there are none
        return False


def _inside(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def keeps(module: nn.Module) -> bool:
    """Whether the module's forward can be given a cache."""
    return takes_cache(inspect.signature(type(module).forward).parameters)
