"""Edits made directly on rows of attention probabilities, where those are at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .seams import MassMove


def on_heads(
    probabilities: Tensor,
    heads: tuple[int, ...] | None,
    edit: Callable[[Tensor, int], Tensor],
    start: int,
) -> Tensor:
    """``edit`` on the chosen heads of probabilities (B, H, rows, Lk); the others stay the same bits."""
    if heads is None:
        return edit(probabilities, start)
    index = list(heads)
    probabilities = probabilities.clone()
    probabilities[:, index] = edit(probabilities[:, index], start)
    return probabilities


def move_edit(move: MassMove) -> Callable[[Tensor, int], Tensor]:
    """A MassMove on explicit probabilities (B, h, rows, Lk)."""

    def edit(p: Tensor, start: int) -> Tensor:
        rows = p.shape[2]
        source = move.source[:, :, None, :]
        target = ~source if move.target is None else move.target[:, :, None, :] & ~source
        keep = move.keep
        if isinstance(keep, Tensor):
            keep = keep[..., start : start + rows, None] if keep.shape[-1] > 1 else keep[..., None]
        moved = (p * source).sum(-1, keepdim=True) * (1 - keep)
        room = (p * target).sum(-1, keepdim=True)
        # A row without any target mass has nowhere to put what is freed, and stays as it is.
        possible = room > 0
        if move.rows is not None:
            possible = possible & move.rows[:, :, start : start + rows, None]
        grown = 1 + moved / room.clamp_min(torch.finfo(p.dtype).tiny)
        edited = torch.where(source, p * keep, torch.where(target, p * grown, p))
        return torch.where(possible, edited, p)

    return edit


def apply(probabilities: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """probabilities (B, H, rows, Lk) times value (B, Hkv, Lk, D), grouped, cast once."""
    b, h, rows, lk = probabilities.shape
    hkv = value.shape[1]
    grouped = probabilities.reshape(b, hkv, (h // hkv) * rows, lk)
    return (grouped @ value.to(probabilities.dtype)).reshape(b, h, rows, value.shape[-1]).to(dtype)
