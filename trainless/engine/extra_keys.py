"""Extra keys and values beside a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.lse import attention
from ..kernels.visibility import visibility
from ..seams import AttentionCall, ExtraKeys


def merge_extra(
    call: AttentionCall, out: Tensor, lse: Tensor, extra: Sequence[ExtraKeys]
) -> tuple[Tensor, Tensor]:
    """Attention over more keys is attention over each set, weighted by their log-sum-exp: exact."""
    total, mixed = lse, out.to(lse.dtype)
    for more in extra:
        first, stop = more.rows or (0, total.shape[2])
        query, held = call.query[:, :, first:stop], total[:, :, first:stop]
        seen = visibility(
            more.visible, causal=False, lq=stop - first, lk=more.key.shape[2], device=query.device
        )
        beside, weight = attention(query, more.key, more.value, visibility=seen, scale=call.scaling)
        merged = torch.logaddexp(held, weight)
        keep = torch.exp(held - merged).nan_to_num(0.0)[..., None]
        add = torch.exp(weight - merged).nan_to_num(0.0)[..., None]
        made = mixed[:, :, first:stop] * keep + beside.to(lse.dtype) * add
        mixed, total = (
            torch.cat([t[:, :, :first], new, t[:, :, stop:]], 2) if more.rows else new
            for t, new in ((mixed, made), (total, merged))
        )
    return mixed.to(out.dtype), total
