"""Scores of stored tokens: what heads share, what keys alone say, what neighbours share, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..seams import Evict


def grouped(mass: Tensor, hkv: int, policy: Evict) -> Tensor:
    """(B, H, rows, Lk) of query heads to (B, hkv, rows, Lk), as the rule says."""
    b, _, rows, lk = mass.shape
    if policy.shared:
        return mass.mean(1, keepdim=True).expand(b, hkv, rows, lk)
    groups = mass.reshape(b, hkv, -1, rows, lk)
    if policy.gqa == "sum":
        return groups.sum(2)
    if policy.gqa == "mean":
        return groups.mean(2)
    if policy.gqa == "max":
        return groups.amax(2)
    return groups[:, :, 0]


def pooled(free: Tensor, policy: Evict) -> Tensor:
    """Scores (B, Hkv, S), zero where a token is not free to go, each pooled with its neighbours."""
    pool = torch.nn.functional.max_pool1d if policy.pooling == "max" else torch.nn.functional.avg_pool1d
    return pool(free, policy.pool, stride=1, padding=policy.pool // 2)


def of_keys(keys: Tensor, exists: Tensor, how: str) -> Tensor:
    """What a rule on keys alone compares, (B, Hkv, S) in float32 (float64 of float64 keys).

    keys (B, Hkv, S, D); exists (B, Hkv, S): which slots hold a token. how: see ``Evict.score``.
    """
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    held = keys.detach().to(wide).masked_fill(~exists[..., None], 0)
    norm = torch.linalg.vector_norm(held, dim=-1)
    if how == "key_norm":
        return -norm
    # A key of norm zero has no direction: its cosine is 0, whatever the mean.
    direction = held / norm.clamp_min(torch.finfo(wide).tiny)[..., None]
    mean = direction.sum(2) / exists.sum(2).clamp_min(1)[..., None]
    along = (direction * mean[:, :, None]).sum(-1)
    return -along / torch.linalg.vector_norm(mean, dim=-1).clamp_min(torch.finfo(wide).tiny)[..., None]


def best(worth: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(the slots of the largest worth (B, Hkv, W), which of these are more than their row's count)."""
    width, length = max(counts), worth.shape[2]
    # Newest first, then a stable sort by worth: among equals the newer one stays.
    found = length - 1 - worth.flip(2).sort(dim=2, descending=True, stable=True).indices[:, :, :width]
    rank = torch.arange(width, device=found.device).expand_as(found)
    return found, rank >= torch.tensor(list(counts), device=found.device)[:, None, None]
