"""Turning keys further: the rotation that a model's own rotary embedding gives to a distance.

Keys in a cache carry the rotation of the position at which they came. Presenting them elsewhere takes one
more rotation, by the distance alone, as long as the frequencies do not depend on the length.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.runtime import runtime_of
from ...errors import Unsupported
from ...kernels.turning import NEAR, Turn
from ...seams import Site

KEY_WIDTH = 512  # of the key that a rotation is tried on, where the embedding holds no frequencies
# Frequencies of these kinds are fixed; "dynamic" and "longrope" change them with the length.
FIXED = {"default", "linear", "llama3", "yarn", "proportional"}


def rotation(site: Site, model: nn.Module) -> Rotation:
    """The rotation of a site's own rotary embedding, or Unsupported with the reason."""
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
        rotate = Rotation(rotary, apply, extra, times)
        if _turns(rotate, rotary):
            return _shared(rotate, model)
    raise Unsupported(
        f"{site.name}: keys turned by apply_rotary_pos_emb of its own module, tried on one, do not turn as rotary "
        'positions do; use positions="real"'
    )


def _shared(rotate: Rotation, model: nn.Module) -> Rotation:
    """The same rotation of another site, where there is one, so that its tables are made once."""
    own = vars(rotate).copy()
    del own["made"]
    for module in model.modules():
        runtime = runtime_of(module)
        other = None if runtime is None else runtime.rotate
        if isinstance(other, Rotation) and all(vars(other)[name] == each for name, each in own.items()):
            return other
    return rotate


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


class Rotation:
    """``rotate(keys (B, Hkv, L, D), steps (B, Hkv, L) int) -> keys``, and the same as tables."""

    def __init__(
        self,
        rotary: nn.Module,
        apply: Callable[..., tuple[Tensor, Tensor]],
        extra: dict[str, Any],
        times: int,
    ):
        self.rotary, self.apply, self.extra, self.times = rotary, apply, extra, times
        self.made: dict[tuple[int, torch.device, torch.dtype], Turn | None] = {}

    def __call__(self, keys: Tensor, steps: Tensor) -> Tensor:
        b, hkv, length, width = keys.shape
        # In at least float32: a cached key is rotated once more, and bfloat16 angles would not survive that.
        exact = torch.float64 if keys.dtype == torch.float64 else torch.float32
        flat = keys.reshape(b * hkv, 1, length, width).to(exact)
        cos, sin = self._angles(flat, steps.reshape(b * hkv, length))
        # Partial rotary embeddings turn the first dimensions only.
        turning = self.times * cos.shape[-1]
        head, rest = flat[..., :turning], flat[..., turning:]
        _, turned = self.apply(head, head, cos.to(exact), sin.to(exact))
        turned = torch.cat([turned, rest], -1)
        return turned.reshape(keys.shape).to(keys.dtype)

    def _angles(self, flat: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for steps (n, L): a pure rotation, since the keys were scaled when they came."""
        cos, sin = self.rotary(flat, steps, **self.extra)
        scale = getattr(self.rotary, "attention_scaling", 1.0)
        return (cos / scale, sin / scale) if isinstance(scale, float | int) and scale != 1.0 else (cos, sin)

    @torch.no_grad()
    def turn(self, keys: Tensor, reach: int) -> Turn | None:
        """Tables for such keys and distances up to ``reach``; None where they do not turn as the model does."""
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        key = keys.shape[3], keys.device, wide
        found = self.made.get(key)
        if key in self.made and (found is None or found.reach > reach):
            return found
        held = 0 if found is None else found.far.shape[0]
        with torch.inference_mode(False):
            made = self._tables(*key, max(reach // NEAR + 1, 2 * held, 16))
            if found is None and made is not None and not self._agrees(made):
                made = None
        self.made[key] = made
        return made

    def _tables(self, width: int, device: torch.device, wide: torch.dtype, count: int) -> Turn | None:
        """What the model's own function does to keys of ones, and to which channel a sine takes each of them."""
        tables = []
        for distances in (torch.arange(NEAR, device=device), torch.arange(count, device=device) * NEAR):
            ones = torch.ones(1, 1, len(distances), width, device=device, dtype=wide)
            cos, sin = self._angles(ones, distances[None])
            cos, sin = cos.to(wide), sin.to(wide)
            turning, none = self.times * cos.shape[-1], torch.zeros_like(cos)
            head = ones[..., :turning]
            kept, moved = (self.apply(head, head, *given)[1][0, 0] for given in ((cos, none), (none, sin)))
            still = torch.nn.functional.pad(kept, (0, width - turning), value=1.0)
            tables.append(torch.stack([still, torch.nn.functional.pad(moved, (0, width - turning))], 1))
        numbers = torch.arange(1, turning + 1, device=device, dtype=wide).expand(
            1, 1, len(distances), turning
        )
        found = self.apply(numbers, numbers, none, torch.ones_like(sin))[1][0, 0, 0].abs().round().int() - 1
        if not bool(((found >= 0) & (found < turning)).all()):
            return None
        partner = torch.cat([found, torch.arange(turning, width, device=device, dtype=torch.int32)])
        return Turn(tables[0].contiguous(), tables[1].contiguous(), partner)

    def _agrees(self, turn: Turn) -> bool:
        """Whether the tables turn a key as the model's own function does, near and far."""
        device, width = turn.near.device, turn.near.shape[2]
        steps = torch.tensor([0, 1, NEAR - 1, NEAR, NEAR + 3, 15 * NEAR + 7], device=device)
        keys = torch.linspace(-1, 1, len(steps) * width, device=device, dtype=turn.near.dtype).view(
            1, 1, -1, width
        )
        return torch.allclose(turn(keys, steps[None, None]), self(keys, steps[None, None]), atol=2e-3)


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
