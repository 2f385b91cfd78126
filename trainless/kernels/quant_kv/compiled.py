"""The products with packed codes as compiled loops: tensors in, tensors out. See ``loops``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .. import openmp
from . import blocked, loops
from .format import RAW, Segment

ALONE = 1 << 15  # bytes of codes that are not worth a second thread
SUMS = (torch.float32, torch.float64)


def logits(q: Tensor, segment: Segment, z: Tensor, start: int) -> None:
    """See ``rows.Products``."""
    if segment.k_bits == RAW or not segment.slots or q.dtype not in SUMS:
        blocked.logits(q, segment, z, start)
        return
    step, least = segment.key_step, segment.key_min
    assert step is not None and least is not None
    (b, hkv, r, d), groups, k = q.shape, _groups(segment, step), z.shape[3]
    lanes = b * hkv
    given = [
        (q, (lanes, r, d)), (segment.key, (lanes, segment.slots, segment.key.shape[4])),
        (step, (lanes, groups, d)), (least, (lanes, groups, d)),
    ]  # fmt: skip
    _run(segment, segment.key, segment.k_bits, (r, d, groups, k, start), given, (z, (lanes, r, k)), LOGITS)


def values(p: Tensor, segment: Segment, start: int) -> Tensor:
    """See ``rows.Products``."""
    if segment.v_bits == RAW or not segment.slots or p.dtype not in SUMS:
        return blocked.values(p, segment, start)
    step, least, root = segment.value_step, segment.value_min, segment.value_root
    assert step is not None and least is not None and root is not None
    (b, hkv, r, k), groups, d = p.shape, _groups(segment, root), root.shape[3]
    lanes, spans = b * hkv, _spans(segment)
    out = p.new_empty(lanes, spans, r, d)
    given = [
        (p, (lanes, r, k)), (segment.value, (lanes, segment.slots, segment.value.shape[4])),
        (step, (lanes, segment.slots)), (least, (lanes, segment.slots)), (root, (lanes, groups, d)),
    ]  # fmt: skip
    _run(
        segment, segment.value, segment.v_bits, (r, d, groups, k, start), given, (out, (lanes * spans, r, d)), VALUES
    )  # fmt: skip
    return out.sum(1).view(b, hkv, r, d)


LOGITS, VALUES = (loops.logits, loops.logits_part), (loops.values, loops.values_part)


def _groups(segment: Segment, table: Tensor) -> int:
    return segment.key.shape[2] if segment.index is None else table.shape[2]


def _spans(segment: Segment) -> int:
    """Spans that hold anything."""
    held = segment.slots if segment.used is None else min(segment.used, segment.slots)
    return -(-held // loops.SPAN)


def _run(
    segment: Segment, codes: Tensor, bits: int, sizes: tuple[int, ...], given: list[Any], into: Any, loop: Any
) -> None:
    """A loop over all spans of all lanes. given, into: tensors, each with its shape in the loop."""
    b, hkv, _, size, width = codes.shape
    r, d, groups, k, start = sizes
    dtype, lanes, spans = into[0].dtype, b * hkv, _spans(segment)
    indexed = 0
    index = torch.empty(0, dtype=torch.int32)
    if segment.index is not None:
        indexed, index = segment.slots, segment.index.to(torch.int32)
        if not 0 <= int(index.min()) <= int(index.max()) < groups:
            raise InputError(f"packed attention: slots of groups that are not among the {groups} there are")
    # One type and one layout, so that a loop is compiled once.
    tensors = [(t if t.dtype == torch.uint8 else t.to(dtype)).contiguous() for t, _ in given]
    tensors += [index.contiguous(), into[0]]
    shapes = [*(shape for _, shape in given), (lanes, indexed), into[1]]
    # The loops look at addresses only.
    for t, shape in zip(tensors, shapes, strict=True):
        if t.numel() != math.prod(shape):
            raise InputError(f"packed attention: {tuple(t.shape)} where {shape} is needed, in some layout")
    if dtype == torch.float32:
        threads = torch.get_num_threads() if codes.numel() > ALONE else 1
        numbers = (lanes, r, d, segment.slots, width, groups, indexed, k, size, bits, spans, start)
        openmp.run(loop[1], (*numbers, *(t.data_ptr() for t in tensors)), threads)
        return
    # float64, which hardly anybody decodes in, stays on one thread.
    *arrays, target = (t.detach().view(shape).numpy() for t, shape in zip(tensors, shapes, strict=True))
    loop[0](*arrays, size, bits, spans, 0, lanes * spans, start, target)
