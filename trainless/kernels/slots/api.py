"""A decode step over fixed slots: checks, and the choice of a form."""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError
from ..common import Terms
from ..dispatch import Choice, compiled_form, triton_missing, triton_reasons, watched
from ..turning import Turn
from . import plain
from .operator import slot_decode_op, unlooped
from .state import ADDED, FixedSlots, SlotRule, SlotStep


def choose(query: Tensor, slots: FixedSlots, turn: Turn | None = None) -> Choice:
    """Which form ``slot_decode`` runs for this call."""
    step = SlotStep(query, query, query, slots, SlotRule(), Terms(1.0), None, turn)
    why = triton_reasons((query, slots.keys))
    if not query.is_cuda:
        unlike = unlooped(step)
        return Choice("torch", (*why, *unlike)) if unlike else Choice("numba", why)
    if triton_missing() is None:
        from .triton import refuses

        why += refuses(step)
    return Choice("torch", why) if why else Choice("triton")


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
    turn: Turn | None = None,
) -> Tensor:
    """Write one token into its slot, attend over all slots, and let one token go where a row is over its limit.

    query (B, H, 1, D), key (B, Hkv, 1, D), value (B, Hkv, 1, Dv). sink_logits (H,): a further logit per row that has
    no value. real (B,) bool: rows whose token is no padding; a padding is not kept, does not score and makes nothing
    go. turn: for buffers with ``shifts``, by which each key is then turned when it is read. Returns (B, H, 1, Dv) in the
    dtype of the query, and writes into the buffers of ``slots``, which keep their addresses: the token, its position,
    the scores by ``rule``, the next free slot and the counters.

    The order of a step is: write, attend (the new token included), score, evict. One registered operator,
    ``trainless::slot_decode``: kernels on a CUDA device with Triton, loops that Numba compiles on the CPU, which widen
    keys and values in half precision number by number. On the CPU the operator is called only while somebody looks at
    operators; where the loops cannot run, as under a compiler, torch operators that it can see through, whose parts are
    ``plain.write``, ``plain.attend`` and ``plain.settle``. None of them waits for the device. Raises InputError when
    shapes do not fit.
    """
    _check(query, key, value, slots, rule, turn)
    step = SlotStep(query, key, value, slots, rule, Terms(scale, None, softcap, sink_logits), real, turn)
    if not query.is_cuda:
        if not unlooped(step):
            form = compiled_form(__package__)[0]
            assert form is not None
            looped: Tensor = form.decode(step)
            return looped
        if not watched((query, key, value)):
            return plain.decode(step)
    s = slots
    near, far, partner = (None, None, None) if turn is None else turn
    out: Tensor = slot_decode_op(
        query, key, value, s.keys, s.values, s.positions, s.scores, s.free, s.age, s.count, s.limit, s.recent,
        s.tickets, s.never, s.shifts, s.lots, near, far, partner, real, sink_logits, scale, softcap, rule.score,
        rule.gqa, rule.shared, rule.normalise,
    )  # fmt: skip
    return out


def _check(
    query: Tensor, key: Tensor, value: Tensor, slots: FixedSlots, rule: SlotRule, turn: Turn | None
) -> None:
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
    if (turn is None) != (slots.shifts is None):
        raise InputError("slots: a turn is given, or the buffers have shifts, and not both")
    if (rule.score in ADDED) != (slots.scores is not None) or (rule.score == "draw") != (
        slots.lots is not None
    ):
        raise InputError(
            f"slots: the rule's score is {rule.score!r}, and the buffers have scores or lots or none to match"
        )
