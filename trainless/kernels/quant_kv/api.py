"""Attention on packed keys and values: checks, and the choice of a form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ...errors import InputError
from ..common import Terms
from ..dispatch import Choice, compiled_form, numba_reasons, triton_reasons
from ..lse import attention
from ..masks import Visibility
from ..visibility import visibility
from . import blocked
from . import rows as softmax
from .blocked import dequantise
from .format import RAW, Segment

BLOCK = 1024  # tokens dequantised at a time where many query rows meet packed keys

__all__ = ["blocks", "choose", "dequantise", "merge", "packed_attention", "packed_rows", "weigh"]


def choose(query: Tensor, segments: Sequence[Segment], *, terms: Terms) -> Choice:
    """Which form ``packed_rows`` runs for this call."""
    why = triton_reasons((query,))
    shapes = []
    if any(s.index is not None for s in segments):
        shapes.append("triton: groups that have lost tokens")
    if terms.position_bias is not None or terms.sink_logits is not None:
        shapes.append("triton: position bias or learned sinks")
    if query.shape[-1] > 256 or any(s.widths[1] != query.shape[-1] for s in segments):
        shapes.append(f"triton: head width {query.shape[-1]}")
    if 0 in query.shape:
        shapes.append("triton: empty input")
    if not (why or shapes):
        return Choice("triton")
    # On a CPU nothing is faster than the compiled form, so only what keeps that one away is of interest.
    _, slow = _products(_involved(query, segments, terms))
    return Choice("blocked", (*why, *shapes, *slow)) if slow else Choice("numba")


def packed_rows(
    query: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    valid: Tensor | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of one query row or a few over packed segments, one after the other; for decoding.

    query (B, H, Lq, D). K counts the slots of all segments. valid: bool (B, Hkv or H, Lq or 1, K), True for keys
    that exist and are seen. position_bias (1|B, 1|H, Lq, K). Returns out (B, H, Lq, Dv) in the dtype of the
    query, probabilities (B, H, Lq, K) in float32 (float64 for float64 input) and, if asked for, the log-sum-exp
    (B, H, Lq). A row without a valid key gives zeros, and -inf. Raises InputError when shapes do not fit.
    """
    terms = Terms(scale, position_bias, softcap, sink_logits)
    _check(query, segments, valid)
    segments = _plain(segments)
    chosen = choose(query, segments, terms=terms).name
    if chosen == "triton":
        from .triton import rows as on_triton

        return on_triton(query, segments, terms, valid, lse)
    form = compiled_form(__package__)[0] if chosen == "numba" else blocked
    return softmax.rows(query, segments, terms, valid, lse, cast(softmax.Products, form))


def weigh(p: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Probabilities (B, H, Lq, K) times packed values: (B, H, Lq, Dv) in the dtype of ``p``.

    Raises InputError when K is not the number of slots.
    """
    slots = sum(s.slots for s in segments)
    if p.shape[-1] != slots:
        raise InputError(f"probabilities over {p.shape[-1]} keys, but the segments have {slots} slots")
    segments = _plain(segments)
    return softmax.weigh(p, segments, _products(_involved(p, segments))[0])


def _plain(segments: Sequence[Segment]) -> Sequence[Segment]:
    """Segments that a backward pass may keep: those packed under ``inference_mode`` are copied while gradients are on."""
    if not torch.is_grad_enabled():
        return segments
    return [s.each(torch.clone) if s.key.is_inference() else s for s in segments]


def _involved(
    tensor: Tensor, segments: Sequence[Segment], terms: Terms | None = None
) -> Iterator[Tensor | None]:
    """The tensors on which it depends whether a gradient is wanted and where the call can run."""
    yield tensor
    if terms is not None:
        yield from (terms.position_bias, terms.sink_logits)
    for s in segments:
        yield from (s.key, s.value, s.key_step, s.key_min, s.value_step, s.value_min, s.value_root, s.index)


def _products(tensors: Iterable[Tensor | None]) -> tuple[softmax.Products, tuple[str, ...]]:
    """The products with codes for a call with these tensors, and why they are no faster ones."""
    reasons = numba_reasons(tensors)
    if not reasons:
        form, reasons = compiled_form(__package__)
        if form is not None:
            return cast(softmax.Products, form), ()
    return cast(softmax.Products, blocked), reasons


def packed_attention(
    query: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of many rows, each of which sees every valid slot: (B, H, Lq, Dv) and the log-sum-exp (B, H, Lq).

    valid: bool (B, Hkv, K). Segments are dequantised BLOCK tokens at a time, and the blocks are merged by their
    log-sum-exp, so memory grows with a block and not with the segments.
    """
    _check(query, segments, None if valid is None else valid[:, :, None])
    b, h, lq, _ = query.shape
    out, total = None, None
    for key, value, seen, _ in blocks(query, segments, valid):
        part, weight = attention(query, key, value, visibility=seen, scale=scale, softcap=softcap)
        if out is None or total is None:
            out, total = part.to(weight.dtype), weight
        else:
            out, total = merge(out, total, part.to(weight.dtype), weight)
    if out is None or total is None:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = query.new_zeros(b, h, lq, segments[0].widths[1] if segments else query.shape[3], dtype=wide)
        total = out.new_full((b, h, lq), -torch.inf)
    return out, total


def blocks(
    query: Tensor, segments: Sequence[Segment], valid: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Visibility, int]]:
    """(keys, values, what is seen of them, first slot) of BLOCK tokens at a time, dequantised."""
    b, h, lq, _ = query.shape
    start = 0
    for segment in _plain(segments):
        for lo in range(0, segment.slots, BLOCK):
            hi = min(segment.slots, lo + BLOCK)
            key, value = dequantise(segment, lo, hi, query.dtype)
            mask = None if valid is None else valid[:, :, start + lo : start + hi]
            if mask is not None and not bool(mask.all()):
                share = h // mask.shape[1]
                mask = mask.repeat_interleave(share, 1)[:, :, None].expand(b, h, lq, hi - lo)
            else:
                mask = None
            seen = visibility(mask, causal=False, lq=lq, lk=hi - lo, device=query.device)
            yield key, value, seen, start + lo
        start += segment.slots


def merge(out: Tensor, lse: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each."""
    total = torch.logaddexp(lse, weight)
    keep, add = (torch.exp(x - total).nan_to_num(0.0)[..., None] for x in (lse, weight))
    return out * keep + more * add, total


def _check(query: Tensor, segments: Sequence[Segment], valid: Tensor | None) -> None:
    if query.dim() != 4 or not segments:
        raise InputError("packed attention: a query (B, H, Lq, D) and at least one segment are needed")
    b, h, lq, d = query.shape
    heads = segments[0].key.shape[1]
    for s in segments:
        kb, hkv = s.key.shape[:2]
        if (
            kb != b
            or not hkv
            or hkv != heads
            or h % hkv
            or s.widths[0] != d
            or s.value.shape[:4] != s.key.shape[:4]
        ):
            raise InputError(
                f"query {tuple(query.shape)} and packed keys {tuple(s.key.shape)} of {s.k_bits} bits do not fit"
            )
        missing = s.k_bits != RAW and (s.key_step is None or s.key_min is None)
        if missing or (s.v_bits != RAW and (s.value_step is None or s.value_root is None)):
            raise InputError("packed attention: codes without their parameters")
    slots = sum(s.slots for s in segments)
    if valid is not None and (
        valid.dtype != torch.bool or valid.shape[-1] != slots or valid.shape[2] not in (1, lq)
    ):
        raise InputError(f"valid {valid.dtype} {tuple(valid.shape)}: bool over {slots} slots is needed")
