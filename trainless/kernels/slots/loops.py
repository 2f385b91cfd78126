# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""A decode step over fixed slots as loops that Numba compiles for the CPU: write, attend, settle.

In torch the bookkeeping is some thirty operators over a few hundred numbers, each of which costs more to call than to
compute, and products with keys in half precision would need all of them in float32 first. The meaning is that of
``plain``. Key heads attend side by side; then each row of the batch is settled by one thread.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from .. import draws, row_loops
from ..openmp import compile_body, compile_loop, pointer, take
from ..turning import NEAR as NEAR_TURNS

FAR = np.iinfo(np.int32).max  # beyond any position
NONE, SUM, LAST, DRAWN = 0, 1, 2, 3  # how scores are made
# Unsigned, or a product with a signed number would be made in floating point.
PLACES, MIXED, HALF, REST = np.uint64(draws.POSITION), np.uint64(draws.MIX), np.uint64(32), np.uint64(11)
ADDED, MEAN, LARGEST, FIRST = 0, 1, 2, 3  # how the query heads of a key head share one


@compile_loop
def write(lane, at, own, scored, moving, key, value, keys, values, positions, scores, shifts):
    """Put the token of a lane into its free slot ``at``; own: its position, -1 for a padding.

    key, value (lanes, D); keys, values (S, D) of the lane.
    """
    for n in range(keys.shape[1]):
        keys[at, n] = key[lane, n]
    for n in range(values.shape[1]):
        values[at, n] = value[lane, n]
    positions[lane, at] = own
    if scored:
        scores[lane, at] = np.float32(0)
    if moving:
        shifts[lane, at] = 0


@compile_loop
def turned(keys, slot, distance, near, far, partner, tile):
    """tile[0] = the key of a slot, turned by ``distance`` positions; see ``turning.Turn``."""
    a, b = distance // NEAR_TURNS, distance % NEAR_TURNS
    for d in range(keys.shape[1]):
        cos = far[a, 0, d] * near[b, 0, d] - far[a, 1, d] * near[b, 1, d]
        sin = far[a, 1, d] * near[b, 0, d] + far[a, 0, d] * near[b, 1, d]
        other = row_loops.widen(keys[slot, partner[d]])
        tile[0, d] = row_loops.widen(keys[slot, d]) * cos + other * sin


@compile_loop
def attend(
    lane, hkv, r, size, moving, scale, softcap, query, keys, values, positions, sinks, shifts, near, far, partner,
    p, out, q, tile, hold,
):  # fmt: skip
    """Probabilities p (lanes · r, at least S) and outputs (lanes · r, Dv) of the query heads of a lane."""
    first = lane * r
    for h in range(r):
        row_loops.widen_row(query, first + h, q, h, scale * np.float32(row_loops.LOG2))
    for s in range(size):
        if positions[lane, s] < 0:
            for h in range(r):
                p[first + h, s] = row_loops.NEVER
        elif moving and shifts[lane, s] != 0:
            turned(keys, s, shifts[lane, s], near, far, partner, tile)
            for h in range(r):
                p[first + h, s] = row_loops.dot(q, h, tile, 0)
        else:
            for h in range(r):
                p[first + h, s] = row_loops.dot(q, h, keys, s)
    for h in range(r):
        for s in range(size, p.shape[1]):
            p[first + h, s] = row_loops.NEVER
        if softcap > 0:
            row_loops.capped(p, first + h, size, softcap)
        more = row_loops.NEVER
        if sinks.shape[0]:
            more = sinks[lane % hkv * r + h] * np.float32(row_loops.LOG2)
        row_loops.softmax(p, first + h, size, more, hold)
    row_loops.weighted(p, first, r, size, values, out)


@compile_loop
def _mass(p, row, hkv, r, lane, s, gqa, shared):
    """What the query heads of a lane have given to slot ``s``; p (rows · H, at least S)."""
    first, count = lane * r, r
    if shared:
        first, count, gqa = row * hkv * r, hkv * r, MEAN
    total = p[first, s]
    if gqa == FIRST:
        return total
    for h in range(first + 1, first + count):
        if gqa == LARGEST:
            total = max(total, p[h, s])
        else:
            total += p[h, s]
    return total / np.float32(count) if gqa == MEAN else total


@compile_loop
def _drawn(lot, place):
    """See ``draws.drawn``."""
    x = np.uint64(lot) + np.uint64(place) * PLACES
    for _ in range(2):
        x = (x ^ (x >> HALF)) * MIXED
    x = x ^ (x >> HALF)
    return np.float64(x >> REST) / np.float64(1 << 53)


@compile_loop
def _victim(lane, size, score, normalise, scores, lots, positions, age, recent, never, row):
    """The slot whose token goes: of the least worth, among equals the oldest; 0 where all are barred."""
    found, least, oldest = 0, np.float64(np.inf), np.int32(FAR)
    newest = age - max(recent, 1)
    for s in range(size):
        place = positions[lane, s]
        if place < 0 or place >= newest:
            continue
        barred = False
        for n in range(never.shape[1]):
            barred = barred or never[row, n, 0] <= place < never[row, n, 1]
        if barred:
            continue
        worth = np.float64(0)
        if score == DRAWN:
            worth = _drawn(lots[lane], place)
        elif score != NONE:
            own = scores[lane, s]
            if normalise:
                own /= np.float32(max(age - place, 1))
            worth = np.float64(own)
        if worth < least or (worth == least and place < oldest):
            found, least, oldest = s, worth, place
    return found


@compile_loop
def _vacate(lane, gone, size, moving, positions, shifts):
    """The token of a slot goes; older ones are one position nearer to the newest where positions are contiguous."""
    place = positions[lane, gone]
    positions[lane, gone] = -1
    if moving:
        for s in range(size):
            shifts[lane, s] += np.int32(0 <= positions[lane, s] < place)


@compile_loop
def settle(
    row,
    hkv,
    r,
    size,
    score,
    gqa,
    shared,
    normalise,
    moving,
    p,
    positions,
    scores,
    shifts,
    free,
    age,
    count,
    limit,
    recent,
    never,
    real,
    lots,
):
    """Bring the scores up to date with probabilities p (rows · H, at least S); one token of a row over its limit goes."""
    here = real.shape[0] == 0 or real[row]
    seen, held = age[row] + np.int32(here), count[row] + np.int32(here)
    over = held > min(limit[row], size - 1)
    for lane in range(row * hkv, (row + 1) * hkv):
        if score == LAST or (score == SUM and here):
            for s in range(size):
                mass = _mass(p, row, hkv, r, lane, s, gqa, shared) if here else np.float32(0)
                scores[lane, s] = mass if score == LAST else scores[lane, s] + mass
        if over:
            gone = _victim(
                lane, size, score, normalise, scores, lots, positions, seen, recent[row], never, row
            )
            _vacate(lane, gone, size, moving, positions, shifts)
        empty = 0
        while empty < size - 1 and positions[lane, empty] >= 0:
            empty += 1
        free[lane] = empty if positions[lane, empty] < 0 else 0
    age[row], count[row] = seen, held - np.int32(over)


def attend_part(kind):
    """A thread's part of writing and attending, for buffers whose numbers are read as ``kind``."""
    width = np.dtype(kind).itemsize

    @compile_body
    def part(data):
        n = carray(data, 33)
        rows, hkv, r, size, d, dv, wide, padded, scored, moving, sunk, fars = n[1:13]
        lanes_ = rows * hkv
        query, key, value = (carray(pointer(n[13]), (lanes_ * r, d), kind), carray(pointer(n[14]), (lanes_, d), kind),
                             carray(pointer(n[15]), (lanes_, dv), kind))  # fmt: skip
        positions, scores = (
            carray(pointer(n[18]), (lanes_, size), np.int32),
            carray(pointer(n[19]), (lanes_, size), np.float32),
        )
        free, age = carray(pointer(n[20]), (lanes_,), np.int32), carray(pointer(n[21]), (rows,), np.int32)
        real = carray(pointer(n[22]), (rows if padded else 0,), np.uint8)
        sinks = carray(pointer(n[23]), (hkv * r if sunk else 0,), np.float32)
        shifts = carray(pointer(n[24]), (lanes_, size), np.int32)
        near, far = (
            carray(pointer(n[25]), (NEAR_TURNS, 2, d), np.float32),
            carray(pointer(n[26]), (fars, 2, d), np.float32),
        )
        partner = carray(pointer(n[27]), (d,), np.int32)
        p, out = (
            carray(pointer(n[28]), (lanes_ * r, wide), np.float32),
            carray(pointer(n[29]), (lanes_ * r, dv), np.float32),
        )
        work = (r + 1) * d + 16
        numbers = carray(pointer(n[31]), (2,), np.float32)
        lane = take(data)
        while lane < lanes_:
            own = n[30] + lane * work * 4
            q, tile = (
                carray(pointer(own), (r, d), np.float32),
                carray(pointer(own + 4 * r * d), (1, d), np.float32),
            )
            hold = carray(pointer(own + 4 * (r + 1) * d), (16,), np.float32)
            keys = carray(pointer(n[16] + lane * size * d * width), (size, d), kind)
            values = carray(pointer(n[17] + lane * size * dv * width), (size, dv), kind)
            row = lane // hkv
            position = age[row] if padded == 0 or real[row] else np.int32(-1)
            write(
                lane,
                free[lane],
                position,
                scored,
                moving,
                key,
                value,
                keys,
                values,
                positions,
                scores,
                shifts,
            )
            attend(
                lane, hkv, r, size, moving, numbers[0], numbers[1], query, keys, values, positions, sinks, shifts,
                near, far, partner, p, out, q, tile, hold,
            )  # fmt: skip
            lane = take(data)

    return part


@compile_body
def settle_part(data):
    n = carray(data, 25)
    rows, hkv, r, size, wide, score, gqa, shared, normalise, moving, runs, padded = n[1:13]
    p, positions, scores, shifts, free, age, count, limit, recent, never, real, lots = n[13:25]
    lanes_ = rows * hkv
    row = take(data)
    while row < rows:
        settle(
            row, hkv, r, size, score, gqa, shared, normalise, moving,
            carray(pointer(p), (lanes_ * r, wide), np.float32),
            carray(pointer(positions), (lanes_, size), np.int32), carray(pointer(scores), (lanes_, size), np.float32),
            carray(pointer(shifts), (lanes_, size), np.int32),
            carray(pointer(free), (lanes_,), np.int32), carray(pointer(age), (rows,), np.int32),
            carray(pointer(count), (rows,), np.int32), carray(pointer(limit), (rows,), np.int32),
            carray(pointer(recent), (rows,), np.int32), carray(pointer(never), (rows, runs, 2), np.int32),
            carray(pointer(real), (rows if padded else 0,), np.uint8), carray(pointer(lots), (lanes_,), np.uint64),
        )  # fmt: skip
        row = take(data)
