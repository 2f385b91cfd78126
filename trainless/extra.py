"""Extra keys and values beside a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.lse import attention
from .kernels.visibility import visibility
from .seams import AttentionCall, ExtraKeys


def merge_extra(
    call: AttentionCall, out: Tensor, lse: Tensor, extra: Sequence[ExtraKeys]
) -> tuple[Tensor, Tensor]:
    """Attention over more keys is attention over each set, weighted by their log-sum-exp: exact."""
    total, mixed = lse, out.to(lse.dtype)
    for more in extra:
        seen = visibility(
            more.visible, causal=False, lq=call.query.shape[2], lk=more.key.shape[2], device=call.query.device
        )
        beside, weight = attention(call.query, more.key, more.value, visibility=seen, scale=call.scaling)
        merged = torch.logaddexp(total, weight)
        keep = torch.exp(total - merged).nan_to_num(0.0)[..., None]
        add = torch.exp(weight - merged).nan_to_num(0.0)[..., None]
        mixed = mixed * keep + beside.to(lse.dtype) * add
        total = merged
    return mixed.to(out.dtype), total
