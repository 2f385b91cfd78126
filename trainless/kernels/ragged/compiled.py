"""A decode step over ragged slots as compiled loops on the CPU; see ``loops``."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .. import openmp
from ..common import Terms
from ..row_loops import BITS
from ..slots import SlotRule
from ..slots.compiled import ALONE, HOW, SHARED
from . import loops
from .state import RaggedSlots


@functools.cache
def _stepping(dtype: torch.dtype) -> Any:
    return loops.step_part(BITS[dtype])


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: RaggedSlots,
    rule: SlotRule,
    terms: Terms,
    real: Tensor | None,
) -> Tensor:
    """See ``api.ragged_decode``: CPU tensors of one dtype, in float32 or half precision."""
    b, h, _, d = query.shape
    hkv, dv = slots.heads, value.shape[3]
    lanes, r = b * hkv, h // hkv
    total = sum(slots.sizes)
    if real is not None:
        real = real.expand(b).contiguous()
    sinks = None if terms.sink_logits is None else terms.sink_logits.float().contiguous()
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    p = torch.empty(total * r, dtype=torch.float32)
    out = torch.empty(b, h, 1, dv, dtype=torch.float32)
    work = torch.empty(lanes, (r + 1) * d + 16, dtype=torch.float32)
    numbers = (ctypes.c_float * 2)(terms.scale, terms.softcap or 0.0)
    sizes = (ctypes.c_int64 * lanes)(*slots.sizes)
    there = real is not None, slots.scores is not None, sinks is not None
    how = HOW[rule.score], SHARED[rule.gqa], rule.normalise
    runs = 0 if slots.never is None else slots.never.shape[1]
    counts = b, hkv, r, d, dv, *there, *how, runs
    first = query, key, value, slots.keys, slots.values, slots.positions, slots.scores, slots.free, slots.age
    rest = slots.count, slots.limit, slots.recent, slots.never, real, sinks, p, out, work
    data = (
        *counts, slots.starts.data_ptr(), ctypes.addressof(sizes), *_addresses(query, first), *_addresses(query, rest),
        query.data_ptr(), ctypes.addressof(numbers),
    )  # fmt: skip
    openmp.run(_stepping(query.dtype), data, torch.get_num_threads() if total * d > ALONE else 1)
    return out if query.dtype == torch.float32 else out.to(query.dtype)


def _addresses(own: Tensor, tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Of their memory; of ``own``, at which nothing is read, in the place of one that there is not."""
    return [(own if t is None else t).data_ptr() for t in tensors]
