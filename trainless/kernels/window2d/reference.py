"""The meaning of ``window2d``: dense, readable, in the dtype of its inputs (use float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms
from ..lse.reference import log_sum_exp, logits, probabilities
from ..visibility import visibility
from .window import Window2d


def window2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window2d,
    scale: float,
    extra: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of ``window``; extra keys belong to the rows of the image only."""
    n = window.tokens
    place = torch.arange(n, device=query.device)
    seen = window.visible(place[:, None], place[None, :])
    if extra is not None:
        first, stop = window.image
        mine = ((place >= first) & (place < stop))[:, None].expand(n, extra[0].shape[2])
        key, value = torch.cat([key, extra[0]], 2), torch.cat([value, extra[1]], 2)
        seen = torch.cat([seen, mine], 1)
    pairs = visibility(seen, causal=False, lq=n, lk=key.shape[2])
    z = logits(query, key, pairs, Terms(scale))
    lse = log_sum_exp(z, None)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return probabilities(z, lse).to(value.dtype) @ value, lse
