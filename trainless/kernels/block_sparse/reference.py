"""The meaning of ``block_sparse``: dense, readable, in the dtype of its inputs (use float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms
from ..lse.reference import logits
from ..visibility import Visibility
from .patterns import Pattern


def block_sparse(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, *, visibility: Visibility, terms: Terms
) -> Tensor:
    """Softmax over the pairs that the mask and the pattern both allow; zeros where there are none."""
    b, h, lq, _ = query.shape
    lk = key.shape[2]
    z = logits(query, key, visibility, terms)
    rows, keys = torch.arange(lq, device=query.device), torch.arange(lk, device=query.device)
    every = torch.arange(h, device=query.device)
    allowed = [pattern.allows(n, every, rows, keys, lk - lq).expand(h, lq, lk) for n in range(b)]
    z = z.masked_fill(~torch.stack(allowed), -torch.inf)
    blind = torch.isneginf(z).all(-1)
    if terms.sink_logits is not None:
        z = torch.cat([z, terms.sink_logits.to(z.dtype).view(1, h, 1, 1).expand(b, h, lq, 1)], -1)
    weights = torch.softmax(z.masked_fill(blind[..., None], 0), -1)[..., :lk].masked_fill(blind[..., None], 0)
    return weights @ value.repeat_interleave(h // value.shape[1], 1)
