# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""A decode step over ragged slots as loops: each lane writes, attends and settles as a row of ``slots.loops`` does."""

from __future__ import annotations

import numpy as np
from numba import carray

from ..openmp import compile_body, pointer, take
from ..slots.loops import NEAR_TURNS, attend, settle, write


def step_part(kind):
    """A thread's part of a step, for buffers whose numbers are read as ``kind``."""
    width = np.dtype(kind).itemsize

    @compile_body
    def part(data):
        n = carray(data, 37)
        rows, hkv, r, d, dv, padded, scored, sunk, score, gqa, normalise, runs = n[1:13]
        lanes_ = rows * hkv
        starts, sizes = (
            carray(pointer(n[13]), (lanes_,), np.int64),
            carray(pointer(n[14]), (lanes_,), np.int64),
        )
        numbers = carray(pointer(n[34]), (2,), np.float32)
        work = (r + 1) * d + 16
        lane = take(data)
        while lane < lanes_:
            start, size, row = starts[lane], sizes[lane], lane // hkv
            head = lane % hkv
            query = carray(pointer(n[15] + lane * r * d * width), (r, d), kind)
            key = carray(pointer(n[16] + lane * d * width), (1, d), kind)
            value = carray(pointer(n[17] + lane * dv * width), (1, dv), kind)
            keys = carray(pointer(n[18] + start * d * width), (size, d), kind)
            values = carray(pointer(n[19] + start * dv * width), (size, dv), kind)
            positions = carray(pointer(n[20] + start * 4), (1, size), np.int32)
            scores = carray(pointer(n[21] + (start * 4 if scored else 0)), (1, size), np.float32)
            free, age = (
                carray(pointer(n[22] + lane * 4), (1,), np.int32),
                carray(pointer(n[23] + lane * 4), (1,), np.int32),
            )
            count = carray(pointer(n[24] + lane * 4), (1,), np.int32)
            limit = carray(pointer(n[25] + lane * 4), (1,), np.int32)
            recent = carray(pointer(n[26] + lane * 4), (1,), np.int32)
            never = carray(pointer(n[27] + lane * runs * 8), (1, runs, 2), np.int32)
            real = carray(pointer(n[28] + (row if padded else 0)), (1 if padded else 0,), np.uint8)
            sinks = carray(pointer(n[29] + (head * r * 4 if sunk else 0)), (r if sunk else 0,), np.float32)
            p = carray(pointer(n[30] + start * r * 4), (r, size), np.float32)
            out = carray(pointer(n[31] + lane * r * dv * 4), (r, dv), np.float32)
            own = n[32] + lane * work * 4
            q, tile = (
                carray(pointer(own), (r, d), np.float32),
                carray(pointer(own + 4 * r * d), (1, d), np.float32),
            )
            hold = carray(pointer(own + 4 * (r + 1) * d), (16,), np.float32)
            lots = carray(pointer(n[20]), (1,), np.uint64)  # nothing is drawn here
            # Keys are not turned here, so these are never read.
            shifts, partner = carray(pointer(n[20]), (1, 1), np.int32), carray(pointer(n[20]), (d,), np.int32)
            near = carray(pointer(n[33]), (NEAR_TURNS, 2, d), np.float32)
            far = carray(pointer(n[33]), (0, 2, d), np.float32)
            position = age[0] if padded == 0 or real[0] else np.int32(-1)
            write(0, free[0], position, scored, 0, key, value, keys, values, positions, scores, shifts)
            attend(
                0, 1, r, size, 0, numbers[0], numbers[1], query, keys, values, positions, sinks, shifts, near, far,
                partner, p, out, q, tile, hold,
            )  # fmt: skip
            settle(
                0, 1, r, size, score, gqa, 0, normalise, 0, p, positions, scores, shifts, free, age, count, limit, recent,
                never, real, lots,
            )  # fmt: skip
            lane = take(data)

    return part
