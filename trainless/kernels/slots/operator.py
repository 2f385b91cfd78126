"""``trainless::slot_decode``: a decode step over fixed slots as one operator that writes into its buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms
from ..dispatch import triton_reasons
from . import plain
from .state import FixedSlots, SlotRule, SlotStep

WRITTEN = ("keys", "values", "positions", "scores", "free", "age", "count", "tickets")


@torch.library.custom_op("trainless::slot_decode", mutates_args=WRITTEN)
def slot_decode_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor | None,
    free: Tensor,
    age: Tensor,
    count: Tensor,
    limit: Tensor,
    recent: Tensor,
    tickets: Tensor,
    never: Tensor | None,
    real: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    score: str | None,
    gqa: str,
    shared: bool,
    normalise: bool,
) -> Tensor:
    """See ``api.slot_decode``: the buffers of ``state.FixedSlots`` and the fields of ``state.SlotRule``, one by one."""
    slots = FixedSlots(keys, values, positions, free, age, count, limit, recent, tickets, scores, never)
    rule, terms = SlotRule(score, gqa, shared, normalise), Terms(scale, None, softcap, sinks)
    step = SlotStep(query, key, value, slots, rule, terms, real)
    if not triton_reasons((query, keys)):
        from . import triton as on_triton

        if not on_triton.refuses(query, slots):
            return on_triton.decode(step)
    return plain.decode(step)


@slot_decode_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
