"""One row of attention with edits by what is remembered of a sequence: a decode step that a compiler can trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.visibility import shown_at
from ..seams import State, StepRow
from .prepared import RowStep


def edited_row(
    steps: Sequence[RowStep],
    states: Mapping[str, State],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    place: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output (B, 1, H, D) of one query row, and whether an edit changed a probability: bool ().

    query (B, H, 1, D), key, value (B, Hkv, Lk, D). mask (B, 1 or H, 1, Lk): bool, or added to the logits. place (): the
    number of the row's own key. softcap, sinks (H,): of the model. Products are in the dtype of the cache, the softmax in
    float32 at least.
    """
    b, h, _, _ = query.shape
    hkv = key.shape[1]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    z = query.view(b, hkv, h // hkv, -1) @ key.transpose(2, 3)
    z = z.to(exact).view(b, h, 1, -1) * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    z = z.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else z + mask.to(exact)
    if sinks is not None:
        z = torch.cat([z, sinks.to(exact).view(1, h, 1, 1).expand(b, h, 1, 1)], 3)
    stock = torch.softmax(z, 3)
    if sinks is not None:
        stock = stock[..., :-1]
    row = StepRow(place, shown_at(mask, place).expand(b))
    p: Any = stock
    for step in steps:
        heads, state = step.contribution.heads, states[step.method]
        given: Any = step.contribution
        edit = given.step
        if heads is None:
            p = edit(p, state, row)
        else:
            index = torch.tensor(heads, device=p.device)
            p = p.index_copy(1, index, edit(p.index_select(1, index), state, row))
    moved = (p != stock).any()
    out = p.to(value.dtype).view(b, hkv, h // hkv, -1) @ value
    return out.view(b, 1, h, -1).to(query.dtype), moved
