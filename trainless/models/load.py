"""Weights into memory: the model in the right class, type and place; or a skeleton without weights."""

from __future__ import annotations

import inspect
import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, TrainlessError
from . import gguf
from .complete import IncompleteError, complete
from .describe import ENCODER, VLM, Description, describe, first_line, reading
from .extras import require

_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. ``model`` is a module, or a pipeline for kind "image"."""

    description: Description
    model: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def tokenizer(self) -> Any:
        return self.description.tokenizer

    @property
    def processor(self) -> Any:
        return self.description.processor


def default_device() -> torch.device:
    """The accelerator of this process (LOCAL_RANK under a launcher), or the CPU."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(
            kind.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
        )
    return torch.device("cpu")


DTYPES = ("float32", "bfloat16", "float16", "float64")


def dtype_named(name: str) -> torch.dtype:
    """The type of that name; InputError for one that no model is run in."""
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is none that models are run in; known: {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def device_named(name: str | None) -> torch.device:
    """The device of that name, such as cpu, cuda or cuda:1; without a number it is this process's own.

    None: ``default_device()``. InputError for a device that torch does not find here.
    """
    if name is None:
        return default_device()
    here = ["cpu"]
    if torch.accelerator.is_available():
        own = str(default_device().type)
        here += [own, *(f"{own}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in here:
        raise InputError(f"device {name!r} is none that torch can use here; there is: {', '.join(here)}")
    return default_device() if name != "cpu" and ":" not in name else torch.device(name)


def run_dtype(description: Description, device: torch.device | None = None) -> torch.dtype:
    """float32 on the CPU, the checkpoint's own type on an accelerator."""
    device = device or default_device()
    if device.type == "cpu":
        return torch.float32
    if description.source.gguf:
        return torch.bfloat16  # quantised: the file has no floating type of its own
    named = None if description.is_pipeline else getattr(description.config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return _stored_dtype(description) or torch.float32


def load(
    spec: str | Description, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> Loaded:
    """Load the weights of ``spec`` in evaluation mode; by default on this process's device, in ``run_dtype``."""
    description = describe(spec) if isinstance(spec, str) else spec
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype_named(dtype) if isinstance(dtype, str) else dtype or run_dtype(description, device)
    keywords: dict[str, Any] = gguf.dense() if description.source.gguf else {}
    try:
        with (
            quiet(description),
            reading(description.source),
            complete(description.spec, description.is_pipeline),
        ):
            if description.is_pipeline:
                model = _pipeline(description, dtype).to(device)
            else:
                model = _model(description, dtype, keywords).to(device).eval()
            if description.source.gguf:
                _ = description.tokenizer  # now, while the parsed header is at hand
    except (TrainlessError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"model {description.spec!r} cannot be loaded ({first_line(error)})") from error
    finally:
        gguf.forget()
    return Loaded(description, model, device, dtype)


def _model(description: Description, dtype: torch.dtype, keywords: dict[str, Any]) -> Any:
    place, own = description.source.origin
    keywords = {**own, **keywords, "config": description.config, "dtype": dtype, "trust_remote_code": False}
    auto = auto_class(description)
    try:
        return auto.from_pretrained(place, **keywords)
    except IncompleteError as error:
        # Encoders that were trained to fill in words have no pooling layer; their class builds one unless told not to.
        optional = "add_pooling_layer" in inspect.signature(error.model_class).parameters
        if description.kind != ENCODER or not optional:
            raise
        return auto.from_pretrained(place, **keywords, add_pooling_layer=False)


def skeleton(description: Description) -> Any:
    """The model on the meta device: its modules and shapes, no weights. A pipeline for kind "image"."""
    with quiet(description):
        if not description.is_pipeline:
            with torch.device("meta"):
                return auto_class(description).from_config(description.config).eval()
        parts = {}
        for name, entry in description.config.items():
            component = _component(description, name, entry)
            if component is not None:
                parts[name] = component
        place, keywords = description.source.origin
        try:
            return description.pipeline_class.from_pretrained(place, **keywords, **parts)
        except Exception as error:
            raise InputError(
                f"model {description.spec!r}: its pipeline cannot be built ({first_line(error)})"
            ) from error


def auto_class(description: Description) -> Any:
    """The transformers auto class that builds this kind of model."""
    import transformers

    if description.kind == VLM:
        return transformers.AutoModelForImageTextToText
    if description.kind == ENCODER:
        return transformers.AutoModel
    if description.encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


@contextmanager
def quiet(description: Description) -> Iterator[None]:
    """No progress bars but ours while a model loads; whoever had switched them off finds them off."""
    from transformers.utils import logging

    bars = [logging]
    if description.is_pipeline:
        require("diffusers", f"the pipeline {description.type}")
        from diffusers.utils import logging as of_diffusers

        bars.append(of_diffusers)
    shown = [bar for bar in bars if bar.is_progress_bar_enabled()]
    for bar in shown:
        bar.disable_progress_bar()
    try:
        yield
    finally:
        for bar in shown:
            bar.enable_progress_bar()


def _pipeline(description: Description, dtype: torch.dtype) -> Any:
    place, keywords = description.source.origin
    variant = _variant(description)
    extra = {"variant": variant} if variant else {}
    pipeline = description.pipeline_class.from_pretrained(
        place, **{_dtype_word(): dtype}, **keywords, **extra
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _dtype_word() -> str:
    """What diffusers calls the type: `dtype` since 0.42. Drop when that is the oldest one we take."""
    from importlib.metadata import version

    major, minor = (int(part) for part in version("diffusers").split(".")[:2])
    return "dtype" if (major, minor) >= (0, 42) else "torch_dtype"


def _component(description: Description, name: str, entry: Any) -> Any:
    """A component with weights, built on the meta device; None for schedulers, tokenizers and the like."""
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        return None
    library, cls = entry
    folder = description.source.folder / name
    if not (folder / "config.json").is_file():
        return None
    import diffusers
    import transformers

    package = {"diffusers": diffusers, "transformers": transformers}.get(library)
    found = getattr(package, cls, None) if package else None
    if not isinstance(found, type) or not issubclass(found, torch.nn.Module):
        return None
    with torch.device("meta"):
        if library == "diffusers":
            return found.from_config(found.load_config(str(folder))).eval()  # type: ignore[attr-defined]
        config = found.config_class.from_pretrained(str(folder))  # type: ignore[attr-defined]
        return found(config).eval()


def _denoiser_files(description: Description) -> list[Path]:
    folder = description.source.folder
    return [
        f for part in ("transformer", "unet", "prior") for f in sorted((folder / part).glob("*.safetensors"))
    ]


def _variant(description: Description) -> str | None:
    """ "fp16" when only that variant of the denoiser is there."""
    names = [f.name for f in _denoiser_files(description)]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _stored_dtype(description: Description) -> torch.dtype | None:
    """The floating type of most weights, from the header of the first safetensors file."""
    files = _denoiser_files(description) or sorted(description.source.folder.glob("*.safetensors"))
    for file in files[:1]:
        with file.open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(size))
        counts: Counter[str] = Counter()
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in _STORED:
                counts[entry["dtype"]] += prod(entry["shape"])
        if counts:
            return _STORED[counts.most_common(1)[0][0]]
    return None
