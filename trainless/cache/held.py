"""What a call sees of compressed storage: masks over slots, and how far keys move when they are to look contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.dense import evaluate

FAR = torch.iinfo(torch.int32).max  # beyond any position


def with_new(held: Tensor, mask: Any, rows: int, seen: int) -> Tensor:
    """(B, 1|Hkv, rows, n + rows): what is ``held`` (B, 1|Hkv, n) exists or not, new tokens as ``mask`` says.

    The model's own mask (None, bool, additive or a flex BlockMask) is as wide as the whole sequence of ``seen``
    tokens; its last ``rows`` columns are about the new ones.
    """
    device, b = held.device, held.shape[0]
    if mask is not None and not isinstance(mask, Tensor):
        mask = evaluate(mask, torch.arange(rows, device=device), seen - rows, seen, device)
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :].bool()
        if rows > 1:
            mask = mask[..., -rows:] & torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    new = mask[..., -rows:] if mask is not None else None
    if new is None:
        new = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()[None, None]
    elif new.dtype != torch.bool:
        new = new > torch.finfo(new.dtype).min / 2
    heads = max(held.shape[1], new.shape[1])
    old = held[:, :, None].expand(b, -1, rows, -1).repeat_interleave(heads // held.shape[1], 1)
    return torch.cat([old, new.expand(b, heads, rows, rows)], 3)


def kept_a_head(count: Tensor) -> int:
    """The mean of the tokens that the heads of a row hold, (B, heads), in the row that holds most."""
    return round(float(count.double().mean(1).max())) if count.numel() else 0


def shifts(positions: Tensor, ages: Sequence[int], counts: Sequence[int]) -> Tensor:
    """(B, Hkv, S): how far each key must move so that kept tokens look contiguous.

    A key moves forward by the number of tokens that were evicted between it and the newest one. positions
    (B, Hkv, S): of the stored tokens, -1 in empty slots; ages, counts: real tokens seen and stored, per row.
    """
    order = positions.masked_fill(positions < 0, FAR).argsort(2)
    rank = torch.empty_like(order).scatter_(
        2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
    )
    gone = [age - count for age, count in zip(ages, counts, strict=True)]
    moved = torch.tensor(gone, device=positions.device)[:, None, None] - (positions - rank)
    return moved.masked_fill(positions < 0, 0)
