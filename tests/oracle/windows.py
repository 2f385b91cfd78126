"""Two-dimensional windows, dense: which image tokens see which, and attention among them with text beside.

Tokens have coordinates (y, x), one pair each, in whatever order they come.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .core import masked_softmax


def grid(height: int, width: int) -> Tensor:
    """Coordinates (height · width, 2) of tokens in rows."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], dim=1)


def disc(where: Tensor, radius: float) -> Tensor:
    """(N, N): squared distance strictly less than radius². Borders cut the disc off."""
    apart = (where[:, None] - where[None, :]).to(torch.float64)
    return apart.square().sum(dim=-1) < radius**2


def square(where: Tensor, radius: int, dilation: int = 1) -> Tensor:
    """(N, N): on both axes a distance that is a multiple of ``dilation`` and less than radius · dilation.
    Borders cut the square off; at dilation 1 its side is 2 · radius - 1."""
    apart = (where[:, None] - where[None, :]).abs()
    return ((apart % dilation == 0) & (apart < radius * dilation)).all(dim=-1)


def neighbourhood(
    height: int, width: int, window: int | tuple[int, int], dilation: int | tuple[int, int] = 1
) -> Tensor:
    """(N, N), tokens in rows: every query sees exactly ``window`` keys per axis. With dilation, an axis falls
    into the tokens of equal remainder, each a line of its own. On a line the window is centred and
    moved inward at the ends; an even window has one more key before the query than after it."""
    windows = (window, window) if isinstance(window, int) else window
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    y, x = (
        _line(length, size, step)
        for length, size, step in zip((height, width), windows, dilations, strict=True)
    )
    return (y[:, None, :, None] & x[None, :, None, :]).reshape(height * width, height * width)


def _line(length: int, window: int, dilation: int) -> Tensor:
    seen = torch.zeros(length, length, dtype=torch.bool)
    for remainder in range(min(dilation, length)):
        line = list(range(remainder, length, dilation))
        if window > len(line):
            raise ValueError(f"a window of {window} does not fit {len(line)} tokens")
        for place, i in enumerate(line):
            start = min(max(place - window // 2, 0), len(line) - window)
            seen[i, line[start : start + window]] = True
    return seen


def with_text(image: Tensor, text: int, text_first: bool) -> Tensor:
    """(text + N, text + N): text sees everything and everything sees text; ``image`` among image tokens."""
    n = image.shape[0] + text
    seen = torch.ones(n, n, dtype=torch.bool)
    part = slice(text, n) if text_first else slice(0, image.shape[0])
    seen[part, part] = image
    return seen


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Attention (B, H, L, D) over the pairs that are seen, a mask that broadcasts to (B, H, L, Lk)."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = query @ key.transpose(-2, -1) * scale
    return masked_softmax(logits, seen.expand_as(logits)) @ value


def pairs(seen: Tensor) -> int:
    """How many pairs of query and key there are."""
    return int(seen.sum())
