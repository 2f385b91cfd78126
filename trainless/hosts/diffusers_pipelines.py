"""What a pipeline says that its denoiser alone does not: its parts, and the size it was trained at."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InputError
from .base import unwrapped

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


def latent_size(size: Any) -> tuple[int, int] | None:
    """A config's sample_size, an int or (rows, columns), as (rows, columns); None when it says nothing."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size):
        return size[0], size[1]
    return None


def pipeline_facts(pipeline: Any) -> dict[str, Any]:
    """Facts for the sites of the pipeline's denoisers: trained_latent (rows, columns) if known, vae_scale."""
    facts: dict[str, Any] = {}
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        scale = getattr(pipeline, name, None)
        if isinstance(scale, int) and scale > 0:
            facts["vae_scale"] = scale
            break
    trained = latent_size(getattr(pipeline, "default_sample_size", None))
    if trained is not None:
        facts["trained_latent"] = trained
    return facts


def default_size(pipeline: Any) -> tuple[int, int] | None:
    """(height, width) in pixels that the pipeline makes when it is not told a size, or None."""
    facts = pipeline_facts(pipeline)
    config = getattr(denoiser_of(pipeline)[1], "config", None)
    latent = facts.get("trained_latent") or latent_size(getattr(config, "sample_size", None))
    scale = facts.get("vae_scale", 8)
    return None if latent is None else (latent[0] * scale, latent[1] * scale)
