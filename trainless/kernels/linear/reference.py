"""The meaning of ``linear_attention``: dense, readable, in the dtype of its inputs (use float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..visibility import Visibility


def features(x: Tensor, feature: str) -> Tensor:
    """elu: u + 1 above zero, exp(u) below. relu: max(u, 0). softmax: softmax over the width. All are >= 0."""
    if feature == "elu":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    return x.relu() if feature == "relu" else x.softmax(-1)


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, feature: str, eps: float
) -> Tensor:
    """out_i = mean_j a_ij v_j / (mean_j a_ij + eps), a_ij = phi(q_i)·phi(k_j), over the keys j that i sees.

    (B, H, Lq, Dv); zero in rows that see nothing.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights = features(query, feature) @ features(key, feature).transpose(-1, -2)
    seen = visibility.at(torch.arange(visibility.lq, device=query.device))
    if seen is None:
        count: Tensor | float = float(max(1, visibility.lk))
    else:
        weights = weights.masked_fill(~seen, 0)
        value = value.masked_fill(~seen.any(-2)[..., None], 0)  # what nobody sees may hold anything
        count = seen.sum(-1, keepdim=True).clamp(min=1).to(weights.dtype)
    weights = weights / count
    total = weights.sum(-1, keepdim=True) + eps
    return (weights @ value / total).masked_fill(total == 0, 0)
