"""A decode step over ragged slots: checks, and the choice of a form."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..common import Terms
from ..dispatch import Choice, compiled_form, numba_reasons, triton_reasons
from ..slots import SlotRule
from . import plain
from .state import RaggedSlots

LOOPED = (torch.float32, torch.bfloat16, torch.float16)


def choose(query: Tensor, slots: RaggedSlots) -> Choice:
    """Which form ``ragged_decode`` runs for a query and buffers of one dtype."""
    why = triton_reasons((query, slots.keys))
    if query.is_cuda:
        return Choice("torch", (*why, "triton: there is no kernel for heads of different lengths"))
    unlike = _unlooped(query, query, query, slots)
    return Choice("torch", (*why, *unlike)) if unlike else Choice("numba", why)


def _unlooped(query: Tensor, key: Tensor, value: Tensor, slots: RaggedSlots) -> tuple[str, ...]:
    if torch.compiler.is_compiling():
        return ("numba: the call is traced",)
    dtype = query.dtype
    if dtype not in LOOPED or not dtype == key.dtype == value.dtype == slots.keys.dtype == slots.values.dtype:
        return (f"numba: one dtype of at most 32 bits is needed, got {dtype} and {slots.keys.dtype}",)
    return numba_reasons((query, key, value)) or compiled_form(__package__)[1]


def ragged_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: RaggedSlots,
    rule: SlotRule,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Write one token into every lane, attend, score, and let one token go from lanes that are over their limit.

    query (B, H, 1, D), key (B, Hkv, 1, D), value (B, Hkv, 1, Dv), sink_logits (H,), real (B,) bool: as for
    ``slots.slot_decode``, whose step this is for each lane on its own. Returns (B, H, 1, Dv) in the dtype of the query
    and writes into the buffers of ``slots``, which keep their addresses. On the CPU loops that Numba compiles, elsewhere
    torch operators lane after lane. Raises InputError when shapes do not fit, and under a rule with ``shared``.
    """
    b, h, rows, d = query.shape
    hkv = slots.heads
    if (b, 1, d) != (slots.rows, rows, slots.keys.shape[1]) or h % hkv or key.shape != (b, hkv, 1, d):
        raise InputError(
            f"ragged slots: query {tuple(query.shape)} and key {tuple(key.shape)} do not fit {slots.rows} rows of {hkv} "
            f"heads of width {slots.keys.shape[1]}; a step is one token"
        )
    if value.shape != (b, hkv, 1, slots.values.shape[1]):
        raise InputError(
            f"ragged slots: value {tuple(value.shape)} does not fit values of width {slots.values.shape[1]}"
        )
    if rule.shared or (rule.score is None) != (slots.scores is None):
        raise InputError(
            "ragged slots: each head scores its own tokens, and the buffers have scores where the rule does"
        )
    terms = Terms(scale, None, softcap, sink_logits)
    if not query.is_cuda and not _unlooped(query, key, value, slots):
        form = compiled_form(__package__)[0]
        assert form is not None
        out: Tensor = form.decode(query, key, value, slots, rule, terms, real)
        return out
    return plain.decode(query, key, value, slots, rule, terms, real)
