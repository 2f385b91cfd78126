"""One row with moved probability as compiled loops on the CPU; see ``loops``."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .. import openmp
from ..row_loops import BITS, padded
from . import loops
from .reference import MovedRow

ALONE = 1 << 18  # numbers in the keys of all heads that are not worth a second thread


@functools.cache
def _part(dtype: torch.dtype) -> Any:
    return loops.attend_part(BITS[dtype])


@functools.cache
def _places(heads: tuple[int, ...] | None, count: int) -> Any:
    """For each query head its place among those that are named, or -1."""
    named = range(count) if heads is None else heads
    places = [-1] * count
    for place, head in enumerate(named):
        places[head] = place
    return (ctypes.c_int32 * count)(*places)


def moved_row(row: MovedRow) -> Tensor:
    """See ``api.moved_row``: CPU tensors in one dtype, the tokens of a head one behind the other."""
    query, key, value, source, keep, terms, visible, heads = row
    b, h, _, d = query.shape
    hkv, lk, dv = value.shape[1:]
    r, wide, lanes = h // hkv, padded(lk), b * hkv
    query, source = query.contiguous(), source.contiguous()
    sinks = None if terms.sink_logits is None else terms.sink_logits.float().contiguous()
    seen = None if visible is None else visible.contiguous()
    seen_rows, per_row, per_head = 0, 0, 0
    if seen is not None:
        rows, each = seen.shape[:2]
        seen_rows = rows * each
        per_row, per_head = each if rows > 1 else 0, 1 if each > 1 else 0
    p = torch.empty(b * h, wide, dtype=torch.float32)
    out = torch.empty(b, h, 1, dv, dtype=torch.float32)
    work = torch.empty(lanes, r * d + 16, dtype=torch.float32)
    numbers = (ctypes.c_float * 3)(terms.scale, terms.softcap or 0.0, keep)
    places = _places(heads, h)
    data = (
        lanes, hkv, r, lk, d, dv, wide, source.shape[1], seen_rows, per_row, per_head, sinks is not None,
        *key.stride()[:2], *value.stride()[:2], query.data_ptr(), key.data_ptr(), value.data_ptr(), source.data_ptr(),
        ctypes.addressof(places), 0 if seen is None else seen.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
        p.data_ptr(), out.data_ptr(), work.data_ptr(), ctypes.addressof(numbers),
    )  # fmt: skip
    threads = torch.get_num_threads() if lanes * lk * d > ALONE else 1
    openmp.run(_part(query.dtype), data, threads)
    return out if query.dtype == torch.float32 else out.to(query.dtype)
