# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""The products with packed codes as loops that Numba compiles for the CPU: each byte is read once, and nothing else.

In torch a tile of codes has to become a tensor of numbers before a product can read it, which costs as much as
reading the keys that were never packed where heads are few and narrow. Here a few tokens at a time become numbers
in the first-level cache. As in the blocked form, K's step and minimum are folded into the query, V's step and
minimum into the probabilities, and V's root multiplies the finished sum.

A lane is one key head of one batch row. The slots of a lane are cut into spans of a fixed length whose sums are
added in order, so that the result depends neither on the number of threads nor on what else is in the batch.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from ..openmp import compile_body, compile_loop, compile_sum, inlined, pointer, take

SPAN = 1024  # slots that one sum runs over
STEP = 4  # tokens unpacked at a time


@inlined
def _unpack(codes, lane, slot, stop, bits, x):
    """The codes of the slots from ``slot`` on as numbers in x (STEP, D); the last one again where there are fewer.

    A code stays where it lies in its byte: as a number it is the code times 2**(bits · its place), which is undone
    in fewer numbers elsewhere.
    """
    width = codes.shape[2]
    for t in range(STEP):
        s = min(slot + t, stop - 1)
        for place in range(8 // bits):
            mask = np.int32(((1 << bits) - 1) << (bits * place))
            for i in range(width):
                # In 32 bits, or the compiler goes the slow way from 64-bit integers to numbers.
                x[t, place * width + i] = np.int32(codes[lane, s, i]) & mask


@compile_loop
def _undo(bits, width, like):
    """What the numbers of ``_unpack`` are to be multiplied by, per channel: powers of two, so nothing is rounded."""
    found = np.empty(width * (8 // bits), like.dtype)
    for c in range(found.shape[0]):
        found[c] = 1.0 / (1 << (bits * (c // width)))
    return found


@compile_loop
def _group_end(index, lane, slot, stop, size):
    """(group of a slot, where the run of slots of that group ends); index (lanes, 0): groups of ``size`` slots."""
    if index.shape[1] == 0:
        group = slot // size
        return group, min(stop, (group + 1) * size)
    group = index[lane, slot]
    end = slot + 1
    while end < stop and index[lane, end] == group:
        end += 1
    return group, end


@compile_sum
def _dot(a, lane, row, first, b, other, second, count):
    """Σ a[lane, row, first + n] · b[other, second + n]."""
    total = a.dtype.type(0)
    for n in range(count):
        total += a[lane, row, first + n] * b[other, second + n]
    return total


@compile_sum
def logits(q, codes, step, least, index, size, bits, spans, first, last, start, z):
    """Spans first..last of z (lanes, r, K), from slot ``start`` on: q (lanes, r, D) · (step · code + least).

    codes (lanes, slots, W), step and least (lanes, groups, D).
    """
    _, r, d = q.shape
    slots = codes.shape[1]
    folded, base, x = np.empty((r, d), q.dtype), np.empty(r, q.dtype), np.empty((STEP, d), q.dtype)
    undo = _undo(bits, codes.shape[2], q)
    for item in range(first, last):
        lane, slot = item // spans, item % spans * SPAN
        stop = min(slots, slot + SPAN)
        while slot < stop:
            group, end = _group_end(index, lane, slot, stop, size)
            for i in range(r):
                for c in range(d):
                    folded[i, c] = q[lane, i, c] * step[lane, group, c] * undo[c]
                base[i] = _dot(q, lane, i, 0, least[lane], group, 0, d)
            while slot < end:
                _unpack(codes, lane, slot, end, bits, x)
                for i in range(r):
                    s0 = s1 = s2 = s3 = base[i]
                    for c in range(d):
                        f = folded[i, c]
                        s0 += f * x[0, c]
                        s1 += f * x[1, c]
                        s2 += f * x[2, c]
                        s3 += f * x[3, c]
                    z[lane, i, start + slot] = s0
                    if slot + 1 < end:
                        z[lane, i, start + slot + 1] = s1
                    if slot + 2 < end:
                        z[lane, i, start + slot + 2] = s2
                    if slot + 3 < end:
                        z[lane, i, start + slot + 3] = s3
                slot += STEP
            slot = end


@compile_loop
def values(p, codes, step, least, root, index, size, bits, spans, first, last, start, out):
    """Spans first..last of p (lanes, r, K), from slot ``start`` on, times root · (step · code + least).

    codes (lanes, slots, W), step and least (lanes, slots), root (lanes, groups, D); out (lanes · spans, r, D).
    """
    r, d = p.shape[1], root.shape[2]
    slots = codes.shape[1]
    sums, x = np.empty((r, d), p.dtype), np.empty((STEP, d), p.dtype)
    undo = _undo(bits, codes.shape[2], p)
    weights, low = np.empty((r, SPAN + STEP), p.dtype), np.empty(r, p.dtype)
    for item in range(first, last):
        lane, slot = item // spans, item % spans * SPAN
        stop = min(slots, slot + SPAN)
        out[item] = 0
        while slot < stop:
            group, end = _group_end(index, lane, slot, stop, size)
            for i in range(r):
                for s in range(slot, end):
                    weights[i, s - slot] = p[lane, i, start + s] * step[lane, s]
                low[i] = _dot(p, lane, i, start + slot, least, lane, slot, end - slot)
                for t in range(STEP):  # what stands behind the end counts for nothing
                    weights[i, end - slot + t] = 0
            sums[:] = 0
            at = 0
            while slot < end:
                _unpack(codes, lane, slot, end, bits, x)
                for i in range(r):
                    w0, w1, w2, w3 = (
                        weights[i, at],
                        weights[i, at + 1],
                        weights[i, at + 2],
                        weights[i, at + 3],
                    )
                    for c in range(d):
                        sums[i, c] += w0 * x[0, c] + w1 * x[1, c] + w2 * x[2, c] + w3 * x[3, c]
                slot += STEP
                at += STEP
            slot = end
            for i in range(r):
                for c in range(d):
                    out[item, i, c] += (sums[i, c] * undo[c] + low[i]) * root[lane, group, c]


# ---------------------------------------------------------------- a thread's part of a loop


@compile_body
def logits_part(data):
    n = carray(data, 19)
    lanes, r, d, slots, width, groups = n[1:7]
    indexed, k, size, bits, spans, start = n[7:13]
    q, codes, step, least, index, z = n[13:]
    item = take(data)
    while item < lanes * spans:
        logits(
            carray(pointer(q), (lanes, r, d), np.float32),
            carray(pointer(codes), (lanes, slots, width), np.uint8),
            carray(pointer(step), (lanes, groups, d), np.float32),
            carray(pointer(least), (lanes, groups, d), np.float32),
            carray(pointer(index), (lanes, indexed), np.int32),
            size, bits, spans, item, item + 1, start,
            carray(pointer(z), (lanes, r, k), np.float32),
        )  # fmt: skip
        item = take(data)


@compile_body
def values_part(data):
    n = carray(data, 20)
    lanes, r, d, slots, width, groups = n[1:7]
    indexed, k, size, bits, spans, start = n[7:13]
    p, codes, step, least, root, index, out = n[13:]
    item = take(data)
    while item < lanes * spans:
        values(
            carray(pointer(p), (lanes, r, k), np.float32),
            carray(pointer(codes), (lanes, slots, width), np.uint8),
            carray(pointer(step), (lanes, slots), np.float32),
            carray(pointer(least), (lanes, slots), np.float32),
            carray(pointer(root), (lanes, groups, d), np.float32),
            carray(pointer(index), (lanes, indexed), np.int32),
            size, bits, spans, item, item + 1, start,
            carray(pointer(out), (lanes * spans, r, d), np.float32),
        )  # fmt: skip
        item = take(data)
