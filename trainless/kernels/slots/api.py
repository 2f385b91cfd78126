"""A decode step over fixed slots: checks, and the choice of a form."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..common import Terms
from ..dispatch import Choice, compiled_form, numba_reasons, triton_missing, triton_reasons
from . import plain
from .operator import slot_decode_op
from .state import FixedSlots, SlotRule, SlotStep


def choose(query: Tensor, slots: FixedSlots) -> Choice:
    """Which form ``slot_decode`` runs for this call."""
    why = triton_reasons((query, slots.keys))
    if not query.is_cuda:
        unlooped = _unlooped(query, query, query, slots)
        return Choice("torch", (*why, *unlooped)) if unlooped else Choice("numba", why)
    if triton_missing() is None:
        from .triton import refuses

        why += refuses(query, slots)
    return Choice("torch", why) if why else Choice("triton")


LOOPED = (torch.float32, torch.bfloat16, torch.float16)


def _unlooped(query: Tensor, key: Tensor, value: Tensor, slots: FixedSlots) -> tuple[str, ...]:
    """Why the loops that Numba compiles cannot do the bookkeeping of a step; empty when they can."""
    if torch.compiler.is_compiling():
        return ("numba: the call is traced",)
    dtype = query.dtype
    if dtype not in LOOPED or not (
        dtype == key.dtype == value.dtype == slots.keys.dtype == slots.values.dtype
    ):
        return (f"numba: one dtype of at most 32 bits is needed, got {dtype} and {slots.keys.dtype}",)
    if why := numba_reasons((query, key, value)):
        return why
    s = slots
    held = [s.keys, s.values, s.positions, s.free, s.age, s.count, s.limit, s.recent]
    held += [t for t in (s.scores, s.never) if t is not None]
    if not all(map(Tensor.is_contiguous, held)):
        return ("numba: buffers have gaps",)
    return compiled_form(__package__)[1]


def slot_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: FixedSlots,
    rule: SlotRule,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Write one token into its slot, attend over all slots, and let one token go where a row is over its limit.

    query (B, H, 1, D), key (B, Hkv, 1, D), value (B, Hkv, 1, Dv). sink_logits (H,): a further logit per row that has
    no value. real (B,) bool: rows whose token is no padding; a padding is not kept, does not score and makes nothing
    go. Returns (B, H, 1, Dv) in the dtype of the query, and writes into the buffers of ``slots``, which keep their
    addresses: the token, its position, the scores by ``rule``, the next free slot and the counters.

    The order of a step is: write, attend (the new token included), score, evict. On a CUDA device with Triton this is
    one registered operator, ``trainless::slot_decode``; on the CPU products of torch between two loops that Numba
    compiles, or where those cannot run, as under a compiler, torch operators that it can see through, whose parts are
    ``plain.write``, ``plain.attend`` and ``plain.settle``. Neither waits for the device. Raises InputError when shapes
    do not fit.
    """
    _check(query, key, value, slots, rule)
    step = SlotStep(query, key, value, slots, rule, Terms(scale, None, softcap, sink_logits), real)
    if not query.is_cuda:
        if not _unlooped(query, key, value, slots):
            form = compiled_form(__package__)[0]
            assert form is not None
            looped: Tensor = form.decode(step)
            return looped
        return plain.decode(step)
    s = slots
    out: Tensor = slot_decode_op(
        query, key, value, s.keys, s.values, s.positions, s.scores, s.free, s.age, s.count, s.limit, s.recent,
        s.tickets, s.never, real, sink_logits, scale, softcap, rule.score, rule.gqa, rule.shared, rule.normalise,
    )  # fmt: skip
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, slots: FixedSlots, rule: SlotRule) -> None:
    b, h, rows, d = query.shape
    kb, hkv, size, kd = slots.keys.shape
    if (
        (b, 1, d, rows) != (kb, key.shape[2], kd, 1)
        or not hkv
        or h % hkv
        or key.shape != (b, hkv, 1, d)
        or value.shape != (b, hkv, 1, slots.values.shape[3])
        or slots.positions.shape != (b, hkv, size)
    ):
        raise InputError(
            f"slots: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit "
            f"keys {tuple(slots.keys.shape)} and values {tuple(slots.values.shape)}; a step is one token"
        )
    if (rule.score is None) != (slots.scores is None):
        raise InputError(
            f"slots: the rule's score is {rule.score!r}, and the buffers have scores or none to match"
        )
