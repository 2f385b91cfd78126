"""``trainless::slot_decode``: a decode step over fixed slots as one operator that writes into its buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms
from ..dispatch import compiled_form, numba_reasons, triton_reasons
from ..turning import Turn
from . import plain
from .state import FixedSlots, SlotRule, SlotStep

WRITTEN = ("keys", "values", "positions", "scores", "free", "age", "count", "tickets", "shifts")


LOOPED = (torch.float32, torch.bfloat16, torch.float16)


def unlooped(step: SlotStep) -> tuple[str, ...]:
    """Why the loops that Numba compiles cannot do a step; empty when they can."""
    if torch.compiler.is_compiling():
        return ("numba: the call is traced",)
    query, key, value, s = step.query, step.key, step.value, step.slots
    dtype = query.dtype
    if dtype not in LOOPED or not dtype == key.dtype == value.dtype == s.keys.dtype == s.values.dtype:
        return (f"numba: one dtype of at most 32 bits is needed, got {dtype} and {s.keys.dtype}",)
    if why := numba_reasons((query, key, value)):
        return why
    held = [s.keys, s.values, s.positions, s.free, s.age, s.count, s.limit, s.recent]
    held += [t for t in (s.scores, s.never, s.shifts, s.lots) if t is not None]
    if not all(map(Tensor.is_contiguous, held)):
        return ("numba: buffers have gaps",)
    return compiled_form(__package__)[1]


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
    shifts: Tensor | None,
    lots: Tensor | None,
    near: Tensor | None,
    far: Tensor | None,
    partner: Tensor | None,
    real: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    score: str | None,
    gqa: str,
    shared: bool,
    normalise: bool,
) -> Tensor:
    """See ``api.slot_decode``: ``FixedSlots`` and ``SlotRule`` of ``state``, ``turning.Turn``, one by one."""
    slots = FixedSlots(
        keys, values, positions, free, age, count, limit, recent, tickets, scores, never, shifts, lots
    )
    rule, terms = SlotRule(score, gqa, shared, normalise), Terms(scale, None, softcap, sinks)
    turn = None
    if near is not None and far is not None and partner is not None:
        turn = Turn(near, far, partner)
    step = SlotStep(query, key, value, slots, rule, terms, real, turn)
    if not query.is_cuda and not unlooped(step):
        form = compiled_form(__package__)[0]
        assert form is not None
        looped: Tensor = form.decode(step)
        return looped
    if not triton_reasons((query, keys)):
        from . import triton as on_triton

        if not on_triton.refuses(step):
            return on_triton.decode(step)
    return plain.decode(step)


@slot_decode_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
