"""The parts of a pipeline: what denoises, and what reads the text."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import InputError
from ..base import unwrapped

# Attributes under which pipelines keep their denoisers; a second one takes over for the late steps.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")


def denoisers_of(pipeline: Any) -> list[tuple[str, nn.Module]]:
    """The (attribute, module) pairs that denoise, usually one; InputError when there is none."""
    found = [(name, getattr(pipeline, name, None)) for name in DENOISERS]
    modules = [(name, unwrapped(module)) for name, module in found if isinstance(module, nn.Module)]
    if not modules:
        raise InputError(
            f"{type(pipeline).__name__} has no denoiser to patch (looked for {', '.join(DENOISERS)}); "
            "give the module itself"
        )
    return modules


def denoiser_of(pipeline: Any) -> tuple[str, nn.Module]:
    """The first denoiser of the pipeline, as (attribute, module)."""
    return denoisers_of(pipeline)[0]


def text_encoders_of(pipeline: Any) -> list[tuple[str, nn.Module]]:
    """Every text encoder that is loaded, as (attribute, module)."""
    return [
        (name, unwrapped(module))
        for name, module in sorted(pipeline.components.items())
        if name.startswith("text_encoder") and isinstance(module, nn.Module)
    ]
