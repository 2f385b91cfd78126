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

KEY_WIDTH = 512  # of the key that a rotation is tried on, where the embedding holds no frequencies
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
    # Tables hold a number for each channel that turns, or, in some families, for each pair of them.
    for times in (1, 2):
        rotate = functools.partial(_rotate, rotary, apply, extra, times)
        if _turns(rotate, rotary):
            return rotate
    raise Unsupported(
        f"{site.name}: keys turned by apply_rotary_pos_emb of its own module, tried on one, do not turn as rotary "
        'positions do; use positions="real"'
    )


def _turns(rotate: Callable[[Tensor, Tensor], Tensor], rotary: nn.Module) -> bool:
    """Whether a key turned by 3 and then by 4 is the key turned by 7, and another than before, of the same norm."""
    held = next((t for t in (*rotary.buffers(), *rotary.parameters()) if t.is_floating_point()), None)
    device = torch.device("cpu") if held is None else held.device
    width = KEY_WIDTH if held is None else 4 * held.shape[-1]  # at least as wide as what turns
    key = torch.linspace(-1, 1, width, device=device)[None, None, None]

    def by(distance: int, key: Tensor) -> Tensor:
        return rotate(key, torch.full((1, 1, 1), distance, device=device))

    try:
        twice, once = by(4, by(3, key)), by(7, key)
    except Exception:  # of a model's own code, which takes other arguments than these
        return False
    if device.type == "meta":
        return once.shape == key.shape
    near = torch.allclose(twice, once, atol=1e-4) and torch.allclose(once.norm(), key.norm(), rtol=1e-4)
    return near and not torch.allclose(once, key, atol=1e-4)


def _rotate(
    rotary: nn.Module,
    apply: Callable[..., tuple[Tensor, Tensor]],
    extra: dict[str, Any],
    times: int,
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
    turning = times * cos.shape[-1]
    head, rest = flat[..., :turning], flat[..., turning:]
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
