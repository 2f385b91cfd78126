"""A decode step on packed buffers of fixed size: checks, and the operators."""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError
from ..common import Terms
from ..dispatch import Choice, at_once, triton_missing, triton_reasons
from .fixed import FixedPacked, Stepping
from .fixed_operator import decode, pack_group_op, packed_decode_op
from .fixed_operator import pack_group as pack_at_once
from .fixed_plain import probabilities_dtype
from .steps.choosing import unlooped


def choose_fixed(query: Tensor, buffers: FixedPacked) -> Choice:
    """Which form ``packed_decode`` runs for this call."""
    why = triton_reasons((query, buffers.key, buffers.tail_key))
    if not query.is_cuda:
        slow = unlooped(query, None, None, (buffers,))
        return Choice("torch", (*why, *slow)) if slow else Choice("numba", why)
    if triton_missing() is None:
        from .fixed_triton import refuses

        why += refuses(query, buffers, Terms(1.0))
    return Choice("torch", why) if why else Choice("triton")


def packed_decode(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    buffers: FixedPacked,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    valid: Tensor | None = None,
    real: Tensor | None = None,
    scores: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Put one token into the ring and attend over all that the buffers hold, it included.

    query (B, H, 1, D); key (B, Hkv, 1, D) and value (B, Hkv, 1, Dv), or None both to add none. sink_logits (H,): a
    further logit per row that has no value. valid (B, Hkv, slots) bool: slots that may be seen, beside the counters.
    real (B,) bool: rows whose token is no padding; a padding is not kept. scores (B, H, slots) float32 (float64 for a
    float64 query), if given, receives the probability of every slot, 0 where there is no token. residual (B,) int32, if
    given: a group that is due is packed afterwards, as by ``pack_group``.

    Returns (B, H, 1, Dv) in the dtype of the query and the log-sum-exp (B, H), by which a result over other buffers
    can be merged (``merge``). Writes the token into the ring and counts it in ``age``; the caller sees to it that the
    ring has room (``residual`` or ``pack_group``). One registered operator, ``trainless::packed_decode``; on the CPU,
    where nobody looks, what it calls: one loop that Numba compiles, or torch. No shape depends on data and nothing waits
    for the device. Raises InputError when shapes do not fit.
    """
    _check(query, key, value, buffers, valid, scores)
    if at_once(query):
        terms, need = Terms(scale, None, softcap, sink_logits), 0 if residual is None else buffers.size
        return decode(
            query, key, value, buffers, terms, Stepping((valid,), real, scores, False, need, residual)
        )
    held, bits = [*buffers.tensors().values()], [buffers.k_bits, buffers.v_bits]
    out, lse = packed_decode_op(
        query, key, value, held, valid, real, sink_logits, scores, residual, scale, softcap, bits
    )
    return out, lse


def pack_group(buffers: FixedPacked, residual: Tensor) -> None:
    """Pack the oldest group of every row in whose ring at least residual + S tokens wait; in place.

    residual (B,) int32: newest tokens of a row that stay as they are. Rows without room for a group are left alone.
    Whether a row is due is decided on the device, so the call may stand in every step or in every S-th; the ring has
    to hold residual + S and the tokens between two calls. One registered operator, ``trainless::pack_group``.
    """
    if at_once(buffers.tail_key):
        pack_at_once(buffers, residual)
    else:
        pack_group_op([*buffers.tensors().values()], residual, [buffers.k_bits, buffers.v_bits])


def _check(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    buffers: FixedPacked,
    valid: Tensor | None,
    scores: Tensor | None,
) -> None:
    b, h, rows, d = query.shape
    kb, hkv, _, kd = buffers.tail_key.shape
    dv, slots = buffers.tail_value.shape[3], buffers.slots
    token = (key is None) == (value is None) and (
        key is None or value is None or (key.shape == (b, hkv, 1, d) and value.shape == (b, hkv, 1, dv))
    )
    if not token or (rows, kb, kd) != (1, b, d) or not hkv or h % hkv:
        raise InputError(
            f"packed cache: query {tuple(query.shape)}, key {None if key is None else tuple(key.shape)} do not fit a "
            f"ring {tuple(buffers.tail_key.shape)} and {tuple(buffers.tail_value.shape)}; a step is one token"
        )
    if valid is not None and valid.shape != (b, hkv, slots):
        raise InputError(f"valid {tuple(valid.shape)}: {(b, hkv, slots)} is needed")
    if scores is not None and (scores.shape != (b, h, slots) or scores.dtype != probabilities_dtype(query)):
        raise InputError(
            f"scores {scores.dtype} {tuple(scores.shape)}: {probabilities_dtype(query)} {(b, h, slots)} is needed"
        )
