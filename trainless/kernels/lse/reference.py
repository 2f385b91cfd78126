"""The meaning of ``attention``: dense, readable, in the dtype of its inputs (use float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms
from ..visibility import Visibility


def logits(query: Tensor, key: Tensor, seen: Visibility, terms: Terms) -> Tensor:
    """All logits (B, H, Lq, Lk); -inf where a query does not see a key."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    z = terms.scale * query @ key.transpose(-1, -2)
    if terms.softcap is not None:
        z = terms.softcap * torch.tanh(z / terms.softcap)
    if terms.position_bias is not None:
        z = z + terms.position_bias
    rows = torch.arange(seen.lq, device=query.device)
    added, visible = seen.bias_at(rows), seen.at(rows)
    if added is not None:
        z = z + added
    return z if visible is None else z.masked_fill(~visible, -torch.inf)


def log_sum_exp(z: Tensor, sink_logits: Tensor | None) -> Tensor:
    """(B, H, Lq), the learned sink included; -inf for a row that sees nothing."""
    if sink_logits is not None:
        sink = sink_logits.to(z.dtype).view(1, -1, 1, 1).expand(*z.shape[:3], 1)
        blind = torch.isneginf(z).all(-1)
        return torch.logsumexp(torch.cat([z, sink], -1), -1).masked_fill(blind, -torch.inf)
    return torch.logsumexp(z, -1) if z.shape[-1] else z.new_full(z.shape[:3], -torch.inf)


def probabilities(z: Tensor, lse: Tensor) -> Tensor:
    """exp(z - lse), zero in rows that see nothing. (B, H, Lq, Lk)"""
    return torch.where(torch.isneginf(lse)[..., None], 0.0, torch.exp(z - lse[..., None]))


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, terms: Terms
) -> tuple[Tensor, Tensor]:
    """(softmax(z) V, log sum exp z): (B, H, Lq, Dv) and (B, H, Lq)."""
    z = logits(query, key, visibility, terms)
    lse = log_sum_exp(z, terms.sink_logits)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return probabilities(z, lse).to(value.dtype) @ value, lse
