"""The meaning of ``mass_move``: dense, readable, in the dtype of its inputs (use float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms
from ..lse.reference import logits, probabilities
from ..visibility import Visibility


def mass_move(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    source: Tensor,
    keep: float | Tensor,
    target: Tensor | None,
    rows: Tensor | None,
    heads: list[int] | None,
    visibility: Visibility,
    terms: Terms,
) -> Tensor:
    """Edit the probabilities themselves and multiply by V once more."""
    h = query.shape[1]
    chosen = list(range(h)) if heads is None else heads
    z = logits(query, key, visibility, terms)
    a = probabilities(z, lse.to(z.dtype))[:, chosen]
    seen = ~torch.isneginf(z[:, chosen])
    source = source[:, :, None] & seen
    target = ~source & seen if target is None else target[:, :, None] & seen
    s = (a * source).sum(-1, keepdim=True)
    # The receiving group's proportions come from its logits, so that none is lost when its mass is tiny.
    share = torch.softmax(z[:, chosen].masked_fill(~target, -torch.inf), -1).nan_to_num(0.0)
    held = (a * target).sum(-1, keepdim=True)
    keep = torch.as_tensor(keep, dtype=a.dtype, device=a.device)
    keep = keep[..., None] if keep.dim() else keep
    moved = torch.where(source, a * keep, torch.where(target, share * (held + (1 - keep) * s), a))
    edit = target.any(-1) if rows is None else target.any(-1) & rows
    value = value.repeat_interleave(h // value.shape[1], dim=1)[:, chosen]
    new = out.clone()
    new[:, chosen] = torch.where(
        edit[..., None], (moved.to(value.dtype) @ value).to(out.dtype), out[:, chosen]
    )
    return new
