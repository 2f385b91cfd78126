"""The meaning of ``group_mass``: dense, readable, in the dtype of its inputs (use float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms
from ..lse.reference import log_sum_exp, logits, probabilities
from ..visibility import Visibility


def group_mass(
    query: Tensor,
    key: Tensor,
    *,
    groups: Tensor,
    count: int,
    rows: Tensor | None,
    lse: Tensor | None,
    visibility: Visibility,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """Sum the probabilities of each group; rows that nobody asked about are zero, their lse -inf."""
    h = query.shape[1]
    z = logits(query, key, visibility, terms)
    total = log_sum_exp(z, terms.sink_logits) if lse is None else lse.to(z.dtype)
    a = probabilities(z, total)
    of = groups if groups.shape[1] == 1 else groups.repeat_interleave(h // groups.shape[1], dim=1)
    mass = torch.stack([(a * (of == g)[:, :, None]).sum(-1) for g in range(1, count + 1)], -1)
    if rows is None:
        return mass, total
    asked = rows[:, None]
    return mass * asked[..., None], total.masked_fill(~asked, -torch.inf)
