# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""Attention in a window as loops that Numba compiles for the CPU: of every grid row the run of keys that is seen.

Sixteen query tokens, a patch of the grid, stand side by side as ``lanes``. Every key that one of them sees comes
once, its numbers spread over the lanes one after the other: keys and values are read as they lie, the maximum and
the sum of a softmax need no step across the lanes, and what a query sees of the patch's keys is one bit each. A
patch of 4 x 4 computes 292 keys where a disc of radius 8 has 193, a tile of the blocked form 396.

Keys are taken a chunk at a time, so that their logits and values stay in the first-level cache, with the running
maximum and sum of the softmax; logits are in powers of two. Each patch is computed by itself and in one order, so
that the result depends neither on the number of threads nor on what else is in the batch.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from ..lanes import (
    BYTES,
    LANES,
    add,
    add_each,
    fma,
    fma_each,
    highest,
    inverse,
    load,
    power,
    renew_each,
    same,
    shown_each,
    store,
    store_each,
    turn_in,
    turn_out,
    zero,
    zeros,
)  # fmt: skip
from ..openmp import compile_body, compile_loop, inlined, pointer, take

CHUNK = 96  # keys
AT_ONCE = 6  # keys, or numbers of a value, whose sums are kept in registers together; CHUNK is a multiple
SPAN = 128  # numbers of a key that one sum runs over
SEEN_BY_ALL = (1 << LANES) - 1
LOWEST = -3e38  # a maximum to begin with: finite, so that what is hidden before the first key counts as zero
LN2 = math.log(2)
NUMBERS = 36  # that a body is given


@compile_loop
def _logits(q, d, k, at, bits, count, z, top):
    """Logits of the keys at k + at[i] into z, -inf where a lane does not see one, and the highest into ``top``."""
    best = load(top)
    for i in range(0, count, AT_ONCE):
        keys = (k + at[i], k + at[i + 1], k + at[i + 2], k + at[i + 3], k + at[i + 4], k + at[i + 5])
        seen = (bits[i], bits[i + 1], bits[i + 2], bits[i + 3], bits[i + 4], bits[i + 5])
        sums = zeros(keys)
        for start in range(0, 4 * d, 4 * SPAN):
            part = zeros(keys)
            for c in range(start, min(4 * d, start + 4 * SPAN), 4):
                part = fma_each(keys, c, load(q + LANES * c), part)
            sums = add_each(sums, part)
        sums = shown_each(sums, seen)
        store_each(z + BYTES * i, sums)
        best = highest(sums, best)
    store(top, best)


@compile_loop
def _weights(z, count, top, shrink, total):
    """Logits into weights; total · shrink + their sum into ``total``. ``count`` is even."""
    best, even, odd = load(top), zero(), zero()
    for row in range(z, z + BYTES * count, 2 * BYTES):
        p, r = power(load(row), best), power(load(row + BYTES), best)
        store(row, p)
        store(row + BYTES, r)
        even, odd = add(even, p), add(odd, r)
    store(total, fma(load(total), load(shrink), add(even, odd)))


@inlined
def _sums(p, numbers, at, count, f, out):
    """out · f + Σ p[i] · number at numbers[·] + at[i] into ``out``."""
    sums = zeros(numbers)
    for i in range(count):
        sums = fma_each(numbers, at[i], load(p + BYTES * i), sums)
    renew_each(out, f, sums)


@compile_loop
def _values(p, d, v, at, count, shrink, out):
    """out · shrink + Σ p[i] · value at v + at[i] into ``out``; d is a multiple of 4 from 8 on."""
    f = load(shrink)
    c = 0
    while d - c >= 6 and d - c != 8:  # blocks of 6, and one or two of 4 for the rest
        u = v + 4 * c
        _sums(p, (u, u + 4, u + 8, u + 12, u + 16, u + 20), at, count, f, out + BYTES * c)
        c += 6
    while c < d:
        u = v + 4 * c
        _sums(p, (u, u + 4, u + 8, u + 12), at, count, f, out + BYTES * c)
        c += 4


# Sixteen queries at work: maximum, sum, factor for what came before; queries and sums of values, lanes side by side;
# logits of a chunk, later its weights.


@compile_loop
def _begin(work, d, where, factor):
    """Sixteen queries, times a factor, that have seen nothing yet."""
    q, out = work + 3 * BYTES, work + (3 + d) * BYTES
    for c in range(0, d, 8):
        turn_in(where, 4 * c, factor, q + BYTES * c)
        turn_in(where + 8 * 8, 4 * c, factor, q + BYTES * c + BYTES // 2)
    store(work, same(LOWEST))
    for row in range(work + BYTES, work + 3 * BYTES, BYTES):
        store(row, zero())
    for row in range(out, out + BYTES * d, BYTES):
        store(row, zero())


@compile_loop
def _chunk(work, d, k, v, at, bits, count):
    """They see ``count`` keys more; at and bits have room for what rounds them up."""
    top, total, shrink = work, work + BYTES, work + 2 * BYTES
    q, out, z = work + 3 * BYTES, work + (3 + d) * BYTES, work + (3 + 2 * d) * BYTES
    whole = (count + AT_ONCE - 1) // AT_ONCE * AT_ONCE
    for i in range(count, whole):
        at[i], bits[i] = at[count - 1], 0
    before = load(top)
    _logits(q, d, k, at, bits, whole, z, top)
    store(shrink, power(before, load(top)))
    _weights(z, whole, top, shrink, total)
    _values(z, d, v, at, count, shrink, out)


@compile_loop
def _finish(work, d, where, lse):
    """Attention and log-sum-exp to where they belong."""
    total, share, out = work + BYTES, work + 2 * BYTES, work + (3 + d) * BYTES
    store(share, inverse(load(total)))
    for c in range(0, d, 8):
        turn_out(out + BYTES * c, share, where, 4 * c)
        turn_out(out + BYTES * c + BYTES // 2, share + BYTES // 2, where + 8 * 8, 4 * c)
    found = carray(pointer(work), 2 * LANES, np.float32)
    for i in range(LANES):
        carray(pointer(lse[i]), 1, np.float32)[0] = LN2 * found[i] + math.log(found[LANES + i])


@compile_loop
def _line(work, d, k, v, at, bits, first, count):
    """``count`` keys that every lane sees, from number ``first`` on."""
    for start in range(first, first + count, CHUNK):
        some = min(CHUNK, first + count - start)
        for i in range(some):
            at[i], bits[i] = (start + i) * (4 * d), SEEN_BY_ALL
        _chunk(work, d, k, v, at, bits, some)


@compile_loop
def _window(work, d, k, v, at, bits, seen, runs, reach, y, x, tall, wide, start, of_row, of_column):
    """The keys near a patch with its corner at (y, x) of a grid of tall x wide keys.

    Key (0, 0) is token ``start``; of_row, of_column: tokens from one to the next. seen, runs: ``compiled.near``,
    which begins ``reach`` (rows, columns) before the corner.
    """
    up, left = reach
    start, of_row, of_column = 4 * d * start, 4 * d * of_row, 4 * d * of_column  # bytes
    count = 0
    for i in range(max(0, up - y), min(runs.shape[0], up - y + tall)):
        j, stop = max(runs[i, 0], left - x), min(runs[i, 1], left - x + wide)
        line = start + (y + i - up) * of_row + (x - left) * of_column
        while j < stop:
            last = min(stop, j + CHUNK - count)
            for n in range(j, last):
                at[count + n - j], bits[count + n - j] = line + n * of_column, seen[i, n]
            count += last - j
            j = last
            if count == CHUNK:
                _chunk(work, d, k, v, at, bits, count)
                count = 0
    if count:
        _chunk(work, d, k, v, at, bits, count)


@inlined
def _seat(n, lane, i, token, spare, where):
    """Lane ``i`` is a token of a head, or nobody below 0: that has something to read and somewhere to write."""
    if token < 0:
        where[:, i] = spare
        return
    b, h = lane // n[1], lane % n[1]
    for t in range(3):
        address, of_batch, of_head, of_token = n[13 + 4 * t : 17 + 4 * t]
        where[t, i] = address + b * of_batch + h * of_head + token * of_token


@inlined
def _keys(n, lane):
    """Where the keys, values, extra keys and extra values of a query head begin."""
    heads, key_heads, d, tokens = n[1:5]
    g = 4 * d * (lane // heads * key_heads + lane % heads // (heads // key_heads))
    return n[25] + g * tokens, n[26] + g * tokens, n[27] + g * n[29], n[28] + g * n[29]


@compile_loop
def _row(n, item, seen, runs, factor, floats, where, at, bits):
    """The ``item``-th row of patches. n: a counter and ``compiled._heads``'s numbers; the rest: see ``part``."""
    d, _, first, rows, columns, dilation, ty, tx, down, text = n[3:13]
    reach = (seen.shape[0] - ty) // 2, (seen.shape[1] - tx) // 2
    # Each residue of the dilation is a grid of its own, whose steps are ``dilation`` tokens long.
    y, rest = item % down * ty, item // down
    x_off, rest = rest % min(dilation, columns), rest // min(dilation, columns)
    y_off, lane = rest % min(dilation, rows), rest // min(dilation, rows)
    tall, wide = (rows - y_off + dilation - 1) // dilation, (columns - x_off + dilation - 1) // dilation
    k, v, ek, ev = _keys(n, lane)
    work = floats.ctypes.data
    spare = work + BYTES * (3 + 2 * d)
    corner, of_row, of_column = first + y_off * columns + x_off, dilation * columns, dilation
    for x in range(0, wide if y < tall else 0, tx):
        for i in range(LANES):
            own_y, own_x = y + i // tx, x + i % tx
            token = first + (y_off + own_y * dilation) * columns + x_off + own_x * dilation
            _seat(n, lane, i, token if own_y < tall and own_x < wide else -1, spare, where)
        _begin(work, d, where.ctypes.data, factor)
        _window(work, d, k, v, at, bits, seen, runs, reach, y, x, tall, wide, corner, of_row, of_column)
        _line(work, d, k, v, at, bits, 0 if first else rows * columns, text)
        _line(work, d, ek, ev, at, bits, 0, n[29])
        _finish(work, d, where[1].ctypes.data, where[2])


@compile_loop
def _text(n, item, factor, floats, where, at, bits):
    """The ``item``-th sixteen tokens of text, of which each sees every token and no extra key."""
    d, tokens, first, rows, columns, text = n[3], n[4], n[5], n[6], n[7], n[12]
    of_head = (text + LANES - 1) // LANES
    lane, start = item // of_head, item % of_head * LANES
    k, v, _, _ = _keys(n, lane)
    work = floats.ctypes.data
    for i in range(LANES):
        token = start + i + (0 if first else rows * columns)
        _seat(n, lane, i, token if start + i < text else -1, work + BYTES * (3 + 2 * d), where)
    _begin(work, d, where.ctypes.data, factor)
    _line(work, d, k, v, at, bits, 0, tokens)
    _finish(work, d, where[1].ctypes.data, where[2])


# ---------------------------------------------------------------- a thread's part of a loop


@compile_body
def part(data):
    n = carray(data, NUMBERS + 1)
    d = n[3]
    images, items, at_seen, high, across, at_runs, at_factor = n[30:]
    seen = carray(pointer(at_seen), (high, across), np.int32)
    runs = carray(pointer(at_runs), (high, 2), np.int64)
    factor = carray(pointer(at_factor), 1, np.float32)[0]
    at, bits = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int32)
    where = np.empty((3, LANES), np.int64)  # addresses: of queries, of attention, of log-sum-exp
    # An array, not its address, is handed on: it lives as long as it is named.
    floats = np.zeros(LANES * (3 + 2 * d + CHUNK) + d, np.float32)
    item = take(data)
    while item < items:
        if item < images:
            _row(n, item, seen, runs, factor, floats, where, at, bits)
        else:
            _text(n, item - images, factor, floats, where, at, bits)
        item = take(data)
