"""A decode step over ragged slots in torch: lane after lane, each as a row of ``slots.plain`` with one key head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..common import Terms
from ..slots import SlotRule, SlotStep
from ..slots import plain as slots_plain
from .state import RaggedSlots


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: RaggedSlots,
    rule: SlotRule,
    terms: Terms,
    real: Tensor | None,
) -> Tensor:
    """See ``api.ragged_decode``."""
    hkv, r = slots.heads, query.shape[1] // slots.heads
    rows = []
    for row in range(slots.rows):
        one, heads = slice(row, row + 1), []
        own = None if real is None else real.expand(slots.rows)[one]
        for head in range(hkv):
            group, mine = slice(head * r, (head + 1) * r), slice(head, head + 1)
            sinks = None if terms.sink_logits is None else terms.sink_logits[group]
            step = SlotStep(
                query[one, group], key[one, mine], value[one, mine], slots.lane(row * hkv + head), rule,
                replace(terms, sink_logits=sinks), own,
            )  # fmt: skip
            heads.append(slots_plain.decode(step))
        rows.append(torch.cat(heads, 1))
    return torch.cat(rows)
