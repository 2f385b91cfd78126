"""What a model is, from its small files alone: no weights are read, except to take their digest."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import InputError, Unsupported
from . import gguf
from .extras import require
from .fingerprint import fingerprint, weight_files
from .sources import ModelSource, locate
from .vocabulary import Vocabulary, vocabulary

TEXT, ENCODER, VLM, IMAGE = "text", "encoder", "vlm", "image"
_WRITES_TEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHeadModel")


@dataclass(frozen=True)
class Description:
    """A model before its weights.

    ``kind``: text, encoder, vlm or image. ``type``: the model_type, or a pipeline's class name.
    ``config``: the transformers config, or for a pipeline its model_index.json as a dict.
    """

    source: ModelSource
    kind: str
    type: str
    config: Any

    @property
    def spec(self) -> str:
        return self.source.spec

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, configuration and tokenizer; reads the weight files once."""
        if not self.source.repo and not self.source.gguf and not weight_files(self.source.folder):
            raise InputError(f"model {self.spec!r} holds a configuration but no weights")
        return fingerprint(self.source)

    @property
    def is_pipeline(self) -> bool:
        return self.kind == IMAGE

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @property
    def encoder_decoder(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def positions(self) -> int | None:
        """How many positions the model was made for; None when it names no limit."""
        if self.is_pipeline:
            return None
        limit = getattr(self.text_config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @cached_property
    def pipeline_class(self) -> Any:
        """The diffusers class of a pipeline."""
        require("diffusers", f"the pipeline {self.type}")
        import diffusers

        found = getattr(diffusers, self.type, None)
        if found is None:
            raise Unsupported(
                f"model {self.spec!r} is a {self.type}, which diffusers {diffusers.__version__} does not have"
            )
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer (text models)."""
        from transformers import AutoTokenizer

        return self._read(AutoTokenizer, "tokenizer")

    @cached_property
    def processor(self) -> Any:
        """The processor (vision-language models)."""
        from transformers import AutoProcessor

        return self._read(AutoProcessor, "processor")

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The closed vocabulary that the folder declares, if it does."""
        return vocabulary(self.source)

    def _read(self, auto: Any, what: str) -> Any:
        place, keywords = self.source.origin
        try:
            with reading(self.source):
                return auto.from_pretrained(place, trust_remote_code=False, **keywords)
        except Exception as error:
            raise InputError(
                f"model {self.spec!r}: its {what} cannot be read ({first_line(error)})"
            ) from error


def describe(spec: str) -> Description:
    """Find out what ``spec`` is (see ``locate`` for what it may be). Reads small files only."""
    source = locate(spec)
    if not source.gguf and (source.folder / "model_index.json").is_file():
        index = _json(source, "model_index.json")
        name = index.get("_class_name")
        if not isinstance(name, str):
            raise Unsupported(f"model {spec!r} is a pipeline without a class name, or with code of its own")
        return Description(source, IMAGE, name, index)
    if not source.gguf:
        if not (source.folder / "config.json").is_file():
            raise InputError(
                f"model {spec!r}: the folder has neither config.json nor model_index.json, so it is no model"
            )
        _json(source, "config.json")
    from transformers import AutoConfig

    place, keywords = source.origin
    try:
        with reading(source):
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, **keywords)
    except Exception as error:
        raise InputError(f"model {spec!r}: its configuration cannot be read ({first_line(error)})") from error
    return Description(source, _kind(config, bool(source.gguf)), config.model_type, config)


def reading(source: ModelSource) -> AbstractContextManager[None]:
    """The context in which files of ``source`` are read."""
    return gguf.remembered() if source.gguf else nullcontext()


def first_line(error: BaseException) -> str:
    """``Type: first line of the message``, short enough for one line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _kind(config: Any, from_gguf: bool) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config"):
        return VLM
    writes = (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    )
    names = getattr(config, "architectures", None) or []
    if names:
        # BERT has a causal head class too; the checkpoint says which head it was saved with.
        return TEXT if writes and any(name.endswith(_WRITES_TEXT) for name in names) else ENCODER
    encoders = not from_gguf and getattr(config, "is_decoder", None) is False
    return TEXT if writes and not encoders else ENCODER


def _json(source: ModelSource, name: str) -> dict[str, Any]:
    try:
        found = json.loads((source.folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model {source.spec!r}: {name} cannot be read ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise InputError(f"model {source.spec!r}: {name} is not a JSON object")
    return found
