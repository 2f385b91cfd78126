"""Turning keys further: the rotation that a model's own rotary embedding gives to a distance.

Keys in a cache carry the rotation of the position at which they came. Presenting them elsewhere takes one
more rotation, by the distance alone, as long as the frequencies do not depend on the length.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Unsupported
from ...seams import Site

# Frequencies of these kinds are fixed; "dynamic" and "longrope" change them with the length.
FIXED = {"default", "linear", "llama3", "yarn", "proportional"}


def rotation(site: Site, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """``rotate(keys (B, Hkv, L, D), steps (B, Hkv, L) int) -> keys``, or Unsupported with the reason."""
    if site.facts.get("keys") == "latent":
        raise Unsupported(
            f"{site.name}: its keys are made from latents, of which one part alone carries a position, so they cannot "
            'be rolled; use positions="real"'
        )
    rotary = _rotary_of(site, model)
    apply = getattr(sys.modules[type(site.module).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        raise Unsupported(
            f'{site.name}: rolled positions need a rotary embedding, and it has none; use positions="real"'
        )
    kind = getattr(rotary, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind.get(site.facts.get("layer_type"), "default")
    if kind not in FIXED:
        raise Unsupported(
            f"{site.name}: rotary frequencies of kind {kind!r} depend on the length, so keys cannot be moved; "
            'use positions="real"'
        )
    config = getattr(rotary, "config", None)
    scaling = getattr(config, "rope_parameters", None) or {}
    if isinstance(scaling, dict) and scaling.get("mrope_section"):
        raise Unsupported(f'{site.name}: multi-axis rotary positions cannot be rolled; use positions="real"')
    wants = inspect.signature(rotary.forward).parameters
    if "position_ids" not in wants:
        raise Unsupported(f'{site.name}: its rotary embedding takes no positions; use positions="real"')
    extra = {"layer_type": site.facts.get("layer_type")} if "layer_type" in wants else {}
    return functools.partial(_rotate, rotary, apply, extra)


def _rotate(
    rotary: nn.Module,
    apply: Callable[..., tuple[Tensor, Tensor]],
    extra: dict[str, Any],
    keys: Tensor,
    steps: Tensor,
) -> Tensor:
    b, hkv, length, width = keys.shape
    # In at least float32: a cached key is rotated once more, and bfloat16 angles would not survive that.
    exact = torch.float64 if keys.dtype == torch.float64 else torch.float32
    flat = keys.reshape(b * hkv, 1, length, width).to(exact)
    cos, sin = rotary(flat, steps.reshape(b * hkv, length), **extra)
    scale = getattr(rotary, "attention_scaling", 1.0)
    if isinstance(scale, float | int) and scale != 1.0:
        cos, sin = cos / scale, sin / scale  # a pure rotation: the key was scaled when it came
    # Partial rotary embeddings turn the first dimensions only.
    head, rest = flat[..., : cos.shape[-1]], flat[..., cos.shape[-1] :]
    _, turned = apply(head, head, cos.to(exact), sin.to(exact))
    turned = torch.cat([turned, rest], -1)
    return turned.reshape(keys.shape).to(keys.dtype)


def _rotary_of(site: Site, model: nn.Module) -> nn.Module | None:
    """The rotary embedding of the nearest ancestor that has one."""
    path = site.name.split(".")
    named = dict(model.named_modules())
    for end in range(len(path), -1, -1):
        owner = named.get(".".join(path[:end]))
        rotary = getattr(owner, "rotary_emb", None) if owner is not None else None
        if isinstance(rotary, nn.Module):
            return rotary
    return None
