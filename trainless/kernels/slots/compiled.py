"""A decode step over fixed slots as compiled loops on the CPU; see ``loops``."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .. import openmp
from ..row_loops import BITS, padded
from . import loops
from .state import GROUPS, SCORES, SlotStep

ALONE = 1 << 18  # numbers in the keys of all heads that are not worth a second thread
HOW = {name: n for n, name in enumerate(SCORES)}
SHARED = {name: n for n, name in enumerate(GROUPS)}


@functools.cache
def _attending(dtype: torch.dtype) -> Any:
    return loops.attend_part(BITS[dtype])


def decode(step: SlotStep) -> Tensor:
    """See ``api.slot_decode``: CPU tensors in float32 or half precision, contiguous buffers."""
    query, key, value, s, rule, terms, real, turn = step
    b, h, _, d = query.shape
    hkv, size = s.positions.shape[1:]
    dv, r, wide = value.shape[3], h // hkv, padded(size)
    threads = torch.get_num_threads() if b * hkv * size * d > ALONE else 1
    if real is not None:
        real = real.expand(b).contiguous()
    sinks = None if terms.sink_logits is None else terms.sink_logits.float().contiguous()
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    p = torch.empty(b * h, wide, dtype=torch.float32)
    out = torch.empty(b, h, 1, dv, dtype=torch.float32)
    work = torch.empty(b * hkv, (r + 1) * d + 16, dtype=torch.float32)
    numbers = (ctypes.c_float * 2)(terms.scale, terms.softcap or 0.0)
    near, far, partner = (None, None, None) if turn is None else turn
    given = (
        query, key, value, s.keys, s.values, s.positions, s.scores, s.free, s.age, real, sinks, s.shifts, near, far,
        partner, p, out, work,
    )  # fmt: skip
    counts = b, hkv, r, size, d, dv, wide
    there = real is not None, s.scores is not None, turn is not None, sinks is not None
    fars = 0 if far is None else far.shape[0]
    data = (*counts, *there, fars, *_addresses(given), ctypes.addressof(numbers))
    openmp.run(_attending(query.dtype), data, threads)
    runs = 0 if s.never is None else s.never.shape[1]
    how = HOW[rule.score], SHARED[rule.gqa], rule.shared, rule.normalise, turn is not None
    kept = (
        p,
        s.positions,
        s.scores,
        s.shifts,
        s.free,
        s.age,
        s.count,
        s.limit,
        s.recent,
        s.never,
        real,
        s.lots,
    )
    data = (b, hkv, r, size, wide, *how, runs, real is not None, *_addresses(kept))
    openmp.run(loops.settle_part, data, min(threads, b))
    return out if query.dtype == torch.float32 else out.to(query.dtype)


def _addresses(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Of their memory; of some tensor's, at which nothing is read, in the place of one that there is not."""
    own = tensors[0]
    assert own is not None
    return [(own if t is None else t).data_ptr() for t in tensors]
