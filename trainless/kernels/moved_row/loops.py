# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""One row with moved probability as loops that Numba compiles for the CPU; key heads run side by side."""

from __future__ import annotations

import numpy as np
from numba import carray

from .. import row_loops
from ..openmp import compile_body, compile_loop, pointer, take


@compile_loop
def move(p, row, width, source, chosen, keep):
    """Keys in source[chosen] keep ``keep`` of p[row]; the rest goes to the other keys in proportion."""
    freed, room = np.float32(0), np.float32(0)
    for s in range(width):
        if source[chosen, s]:
            freed += p[row, s]
        else:
            room += p[row, s]
    if room > 0:
        grown = np.float32(1) + freed * (np.float32(1) - keep) / room
        for s in range(width):
            p[row, s] *= keep if source[chosen, s] else grown


@compile_loop
def attend(
    lane, hkv, r, width, scale, softcap, keep, query, keys, values, source, count, place, visible, per_row, per_head,
    sinks, p, out, q, hold,
):  # fmt: skip
    """The query heads of a lane. place[h]: of head h among the ``count`` rows of ``source`` of a batch row, or -1."""
    first, batch = lane * r, lane // hkv
    for h in range(r):
        row_loops.widen_row(query, first + h, q, h, scale * np.float32(row_loops.LOG2))
    for s in range(width):
        for h in range(r):
            p[first + h, s] = row_loops.dot(q, h, keys, s)
    for h in range(r):
        head = lane % hkv * r + h
        if softcap > 0:
            row_loops.capped(p, first + h, width, softcap)
        if visible.shape[1]:
            own = batch * per_row + head * per_head
            for s in range(width):
                if not visible[own, s]:
                    p[first + h, s] = row_loops.NEVER
        for s in range(width, p.shape[1]):
            p[first + h, s] = row_loops.NEVER
        more = row_loops.NEVER
        if sinks.shape[0]:
            more = sinks[head] * np.float32(row_loops.LOG2)
        row_loops.softmax(p, first + h, width, more, hold)
        if place[head] >= 0:
            move(p, first + h, width, source, batch * count + place[head], keep)
    row_loops.weighted(p, first, r, width, values, out)


def attend_part(kind):
    """A thread's part, for keys whose numbers are read as ``kind``."""
    size = np.dtype(kind).itemsize

    @compile_body
    def part(data):
        n = carray(data, 28)
        lanes, hkv, r, width, d, dv, wide, count, seen_rows, per_row, per_head, sunk = n[1:13]
        # Numbers from one head to the next and from one batch row to the next, in keys and in values.
        key_row, key_head, value_row, value_head = n[13:17]
        query = carray(pointer(n[17]), (lanes * r, d), kind)
        source = carray(pointer(n[20]), (lanes // hkv * count, width), np.uint8)
        place = carray(pointer(n[21]), (hkv * r,), np.int32)
        visible = carray(pointer(n[22]), (max(seen_rows, 1), width if seen_rows else 0), np.uint8)
        sinks = carray(pointer(n[23]), (hkv * r if sunk else 0,), np.float32)
        p, out = (
            carray(pointer(n[24]), (lanes * r, wide), np.float32),
            carray(pointer(n[25]), (lanes * r, dv), np.float32),
        )
        numbers = carray(pointer(n[27]), (3,), np.float32)
        lane = take(data)
        while lane < lanes:
            own = n[26] + lane * (r * d + 16) * 4
            q, hold = (
                carray(pointer(own), (r, d), np.float32),
                carray(pointer(own + 4 * r * d), (16,), np.float32),
            )
            batch, head = lane // hkv, lane % hkv
            keys = carray(pointer(n[18] + (batch * key_row + head * key_head) * size), (width, d), kind)
            values = carray(
                pointer(n[19] + (batch * value_row + head * value_head) * size), (width, dv), kind
            )
            attend(
                lane, hkv, r, width, numbers[0], numbers[1], numbers[2], query, keys, values, source, count, place,
                visible, per_row, per_head, sinks, p, out, q, hold,
            )  # fmt: skip
            lane = take(data)

    return part
