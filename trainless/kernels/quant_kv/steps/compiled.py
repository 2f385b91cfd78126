"""A decode step on packed buffers as one compiled loop: tensors in, tensors out. See ``loops``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ... import openmp
from ...common import Terms
from ..fixed import FixedPacked, Stepping
from . import loops

ALONE = 1 << 15  # bytes of codes that are not worth a second thread
KINDS = {torch.float32: loops.FLOAT32, torch.bfloat16: loops.BFLOAT16, torch.float16: loops.FLOAT16}


def decode(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    sections: tuple[FixedPacked, ...],
    terms: Terms,
    how: Stepping,
) -> tuple[Tensor, Tensor, bool]:
    """See ``plain.decode``: the output, the log-sum-exp, and whether a row is due to be packed.

    CPU tensors in float32 or half precision, contiguous buffers of one dtype.
    """
    first = sections[0]
    (b, h, _, d), (hkv, ring, dv) = query.shape, first.tail_value.shape[1:]
    half, r = query.dtype == torch.float16, h // hkv
    asked = query.float() if half else query.contiguous()
    out = asked.new_empty(b, h, 1, dv)
    numbers = (ctypes.c_double * 2)(terms.scale, terms.softcap or 0.0)
    items, table, codes = -(-ring // loops.SPAN), [], 0
    for section, valid in zip(sections, how.valid or (None,) * len(sections), strict=True):
        groups, size = section.key.shape[2:4]
        items += -(-groups * size // loops.SPAN)
        codes += section.key.numel()
        table += _section(section, valid, 0 if how.scores is not None and not how.ring_only else -1)
    parts = out.new_empty(b * hkv * items * r * (2 + dv), dtype=torch.float32)
    lse = out.new_empty(b, h, dtype=torch.float32)
    scores, score_slots, ring_scores = how.scores, 0, -1
    if scores is not None:
        score_slots = scores.shape[2]
        ring_scores = score_slots - ring
    if key is not None and value is not None:
        key, value = key.contiguous(), value.contiguous()
    real, sinks = how.real, terms.sink_logits
    real = real if real is None else real.contiguous()
    sinks = sinks if sinks is None else sinks.float().contiguous()
    step = [
        0, 0, b, hkv, r, d, dv, len(sections), ring, how.need, KINDS[asked.dtype], KINDS[first.tail_key.dtype],
        terms.softcap is not None, score_slots, ring_scores, ctypes.addressof(numbers),
    ]  # fmt: skip
    given = (
        asked, key, value, first.tail_key, first.tail_value, first.age, real, sinks, how.residual, how.aged, scores, out,
        lse, parts,
    )  # fmt: skip
    for t in given:
        step.append(0 if t is None else t.data_ptr())
    threads = torch.get_num_threads() if codes > ALONE else 1
    left = openmp.run(loops.step_part, (*step, *table), threads)
    return out.to(query.dtype) if half else out, lse, bool(left[loops.DUE])


def _section(s: FixedPacked, valid: Tensor | None, first_score: int) -> list[int]:
    tensors = (
        s.key, s.key_step, s.key_min, s.value, s.value_step, s.value_min, s.value_root, s.packed, valid,
    )  # fmt: skip
    found = [s.k_bits, s.v_bits, s.key.shape[2], s.key.shape[3], first_score]
    for t in tensors:
        found.append(0 if t is None else t.data_ptr())
    found.append(0 if valid is None else valid.shape[2])
    return found
