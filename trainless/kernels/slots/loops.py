# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""What a decode step over fixed slots does before and after its products, as loops that Numba compiles for the CPU.

In torch it is some thirty operators over a few hundred numbers, each of which costs more to call than to compute. The
meaning is that of ``plain.write`` and ``plain.settle``. A row of the batch is one thread's.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from ..openmp import compile_body, compile_loop, pointer, take

FAR = np.iinfo(np.int32).max  # beyond any position
NONE, SUM, LAST = 0, 1, 2  # how scores are made
ADDED, MEAN, LARGEST, FIRST = 0, 1, 2, 3  # how the query heads of a key head share one


@compile_loop
def write(row, hkv, size, scored, key, value, keys, values, positions, scores, free, age, real, bias):
    """Put the token into the free slot of every head; bias (lanes, S): 0 for slots that hold a token, else -inf.

    key, value (lanes, bytes of a token); keys, values (lanes, S, bytes).
    """
    here = real.shape[0] == 0 or real[row]
    for lane in range(row * hkv, (row + 1) * hkv):
        at = free[lane]
        for n in range(key.shape[1]):
            keys[lane, at, n] = key[lane, n]
        for n in range(value.shape[1]):
            values[lane, at, n] = value[lane, n]
        positions[lane, at] = age[row] if here else np.int32(-1)
        if scored:
            scores[lane, at] = np.float32(0)
        for s in range(size):
            bias[lane, s] = np.float32(0) if positions[lane, s] >= 0 else np.float32(-np.inf)


@compile_loop
def _mass(p, row, hkv, r, lane, s, gqa, shared):
    """What the query heads of a lane have given to slot ``s``; p (rows · H, S)."""
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
def _victim(lane, size, scored, normalise, scores, positions, age, recent, never, row):
    """The slot whose token goes: of the least worth, among equals the oldest; 0 where all are barred."""
    found, least, oldest = 0, np.float32(np.inf), np.int32(FAR)
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
        worth = np.float32(0)
        if scored:
            worth = scores[lane, s]
            if normalise:
                worth /= np.float32(max(age - place, 1))
        if worth < least or (worth == least and place < oldest):
            found, least, oldest = s, worth, place
    return found


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
    p,
    positions,
    scores,
    free,
    age,
    count,
    limit,
    recent,
    never,
    real,
):
    """Bring the scores up to date with probabilities p (rows · H, S); one token of a row over its limit goes."""
    here = real.shape[0] == 0 or real[row]
    seen, held = age[row] + np.int32(here), count[row] + np.int32(here)
    over = held > min(limit[row], size - 1)
    for lane in range(row * hkv, (row + 1) * hkv):
        if score != NONE and (here or score == LAST):
            for s in range(size):
                mass = _mass(p, row, hkv, r, lane, s, gqa, shared) if here else np.float32(0)
                scores[lane, s] = mass if score == LAST else scores[lane, s] + mass
        if over:
            gone = _victim(
                lane, size, score != NONE, normalise, scores, positions, seen, recent[row], never, row
            )
            positions[lane, gone] = -1
        empty = 0
        while empty < size - 1 and positions[lane, empty] >= 0:
            empty += 1
        free[lane] = empty if positions[lane, empty] < 0 else 0
    age[row], count[row] = seen, held - np.int32(over)


@compile_body
def write_part(data):
    n = carray(data, 18)
    rows, hkv, size, wk, wv, scored, padded = n[1:8]
    key, value, keys, values, positions, scores, free, age, real, bias = n[8:18]
    lanes = rows * hkv
    row = take(data)
    while row < rows:
        write(
            row, hkv, size, scored,
            carray(pointer(key), (lanes, wk), np.uint8), carray(pointer(value), (lanes, wv), np.uint8),
            carray(pointer(keys), (lanes, size, wk), np.uint8), carray(pointer(values), (lanes, size, wv), np.uint8),
            carray(pointer(positions), (lanes, size), np.int32), carray(pointer(scores), (lanes, size), np.float32),
            carray(pointer(free), (lanes,), np.int32), carray(pointer(age), (rows,), np.int32),
            carray(pointer(real), (rows if padded else 0,), np.uint8),
            carray(pointer(bias), (lanes, size), np.float32),
        )  # fmt: skip
        row = take(data)


@compile_body
def settle_part(data):
    n = carray(data, 21)
    rows, hkv, r, size, score, gqa, shared, normalise, runs, padded = n[1:11]
    p, positions, scores, free, age, count, limit, recent, never, real = n[11:21]
    lanes = rows * hkv
    row = take(data)
    while row < rows:
        settle(
            row, hkv, r, size, score, gqa, shared, normalise,
            carray(pointer(p), (lanes * r, size), np.float32),
            carray(pointer(positions), (lanes, size), np.int32), carray(pointer(scores), (lanes, size), np.float32),
            carray(pointer(free), (lanes,), np.int32), carray(pointer(age), (rows,), np.int32),
            carray(pointer(count), (rows,), np.int32), carray(pointer(limit), (rows,), np.int32),
            carray(pointer(recent), (rows,), np.int32), carray(pointer(never), (rows, runs, 2), np.int32),
            carray(pointer(real), (rows if padded else 0,), np.uint8),
        )  # fmt: skip
        row = take(data)
