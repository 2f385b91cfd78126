"""Edits made directly on rows of attention probabilities, where those are at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.lse import widened_product
from ..seams import Entry, Groups, MassMove, RowEdit


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
    grouped = probabilities.reshape(b * hkv, (h // hkv) * rows, lk)
    out = widened_product(grouped, value.reshape(b * hkv, lk, value.shape[-1]))
    return out.view(b, h, rows, value.shape[-1]).to(dtype)


def mass_of_groups(probabilities: Tensor, named: Groups) -> Tensor:
    """(B, H, rows, G): what each row has on each group; 0 in rows that were not asked about."""
    b, h, rows, lk = probabilities.shape
    heads = named.of.shape[1]
    of = named.of[..., None] == torch.arange(1, named.count + 1, device=named.of.device)
    mass = probabilities.reshape(b, heads, -1, lk) @ of.to(probabilities.dtype)
    mass = mass.view(b, h, rows, named.count)
    return mass if named.rows is None else mass * named.rows[:, None, :, None]


def edited_rows(edits: Sequence[tuple[Entry, MassMove | RowEdit]], probabilities: Tensor) -> Tensor | None:
    """bool (B, H, rows): what the edits reach, when each of them says which rows it edits; None when not."""
    if not edits or any(isinstance(move, RowEdit) or move.rows is None for _, move in edits):
        return None
    reached = torch.zeros(probabilities.shape[:3], dtype=torch.bool, device=probabilities.device)
    for entry, move in edits:
        assert isinstance(move, MassMove) and move.rows is not None
        heads = entry.contribution.heads
        if heads is None:
            reached |= move.rows
        else:
            reached[:, list(heads)] |= move.rows
    return reached


def apply_to(out: Tensor, probabilities: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    """``out`` (B, Lq, H, D) with the outputs of the rows ``rows`` (B, H, Lq) made of their probabilities."""
    h, hkv = probabilities.shape[1], value.shape[1]
    heads = rows.any(-1).any(0).view(hkv, -1).any(-1).nonzero()[:, 0]
    if not len(heads):
        return out
    # Values of key heads that nobody edits are not read; of most of them all are, which is less than picking.
    if 2 * len(heads) > hkv:
        heads = torch.arange(hkv, device=value.device)
    else:
        value = value[:, heads]
        picked = (heads[:, None] * (h // hkv) + torch.arange(h // hkv, device=heads.device)).flatten()
        probabilities, rows = probabilities[:, picked], rows[:, picked]
    new = apply(probabilities, value, out.dtype).transpose(1, 2)
    kept = out.clone()
    index = (heads[:, None] * (h // hkv) + torch.arange(h // hkv, device=heads.device)).flatten()
    kept[:, :, index] = torch.where(rows.transpose(1, 2)[..., None], new, out[:, :, index])
    return kept
