# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""One query row against many keys, as loops that Numba compiles for the CPU: logits, softmax, weighted sum of values.

Keys and values may be in half precision, which NumPy and Numba hardly know: their bits are read as integers and widened
in registers, so that nothing but single numbers is ever held in another dtype. bfloat16 is read as uint16, float16 as
int16. Sums are in float32. Logits are in units of log 2, so that ``lanes.power`` makes probabilities of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import lanes
from .openmp import compile_loop, compile_sum

BITS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
LOG2 = 1.4426950408889634
NEVER = np.float32(-np.inf)
TILE = 32  # values at a time


def padded(width: int) -> int:
    """Places that a row of ``width`` logits takes: a multiple of the numbers that are computed side by side."""
    return -(-width // lanes.LANES) * lanes.LANES


@intrinsic
def widen(context, x):
    """A number as float32, from its bits where it is in half precision."""
    number, whole = ir.FloatType(), ir.IntType(32)

    def same(context, builder, signature, given):
        return given[0]

    def brain(context, builder, signature, given):
        wide = builder.shl(builder.zext(given[0], whole), ir.Constant(whole, 16))
        return builder.bitcast(wide, number)

    def half(context, builder, signature, given):
        bits = builder.zext(given[0], whole)
        rest = builder.shl(builder.and_(bits, ir.Constant(whole, 0x7FFF)), ir.Constant(whole, 13))
        # Exponents are 112 apart; the product is exact, also for numbers below the smallest normal one.
        finite = builder.bitcast(
            builder.fmul(builder.bitcast(rest, number), ir.Constant(number, 2.0**112)), whole
        )
        special = builder.or_(rest, ir.Constant(whole, 0x7F800000))
        largest = ir.Constant(whole, 0x7C00)
        ends = builder.icmp_unsigned("==", builder.and_(bits, largest), largest)
        sign = builder.shl(builder.and_(bits, ir.Constant(whole, 0x8000)), ir.Constant(whole, 16))
        return builder.bitcast(builder.or_(builder.select(ends, special, finite), sign), number)

    codes = {types.float32: same, types.uint16: brain, types.int16: half}
    return types.float32(x), codes[x]


@compile_loop
def widen_row(source, at, target, into, factor):
    """target[into] = source[at] · factor."""
    for d in range(source.shape[1]):
        target[into, d] = widen(source[at, d]) * factor


@compile_sum
def dot(q, row, keys, slot):
    total = np.float32(0)
    for d in range(keys.shape[1]):
        total += q[row, d] * widen(keys[slot, d])
    return total


@compile_loop
def capped(z, row, width, softcap):
    """Soft-cap a row of logits: softcap · tanh(z / softcap), in units of log 2; -inf stays."""
    near, far = np.float32(1 / (LOG2 * softcap)), np.float32(LOG2 * softcap)
    for s in range(width):
        if z[row, s] > NEVER:
            z[row, s] = math.tanh(z[row, s] * near) * far


@compile_loop
def _across(x, start):
    """The largest of, and the sum of, sixteen numbers."""
    best, total = x[start], np.float32(0)
    for n in range(lanes.LANES):
        best, total = max(best, x[start + n]), total + x[start + n]
    return best, total


@compile_loop
def softmax(z, row, width, more, hold):
    """Logits z[row] to probabilities; ``more``: a further logit without a place, -inf for none. hold: 16 numbers.

    z (rows, a multiple of 16), -inf from ``width`` on. A row of -inf alone becomes zeros.
    """
    here = z.ctypes.data + row * z.shape[1] * 4
    bytes_ = z.shape[1] * 4
    held = hold.ctypes.data
    best = lanes.same(NEVER)
    for n in range(0, bytes_, lanes.BYTES):
        best = lanes.highest((lanes.load(here + n),), best)
    lanes.store(held, best)
    top, _ = _across(hold, 0)
    top = max(top, more)
    if top == NEVER:
        for s in range(z.shape[1]):
            z[row, s] = np.float32(0)
        return
    far, total = lanes.same(top), lanes.zero()
    for n in range(0, bytes_, lanes.BYTES):
        p = lanes.power(lanes.load(here + n), far)
        total = lanes.add(total, p)
        lanes.store(here + n, p)
    lanes.store(held, total)
    _, whole = _across(hold, 0)
    if more > NEVER:
        lanes.store(held, lanes.power(lanes.same(more), far))
        whole += hold[0]
    share = np.float32(1) / whole
    for s in range(width):
        z[row, s] *= share


@compile_loop
def weighted(p, first, count, width, values, out):
    """out[row] = sum of p[row, s] · values[s] over s < width, for ``count`` rows; out in float32.

    Values are read a tile at a time, by all rows while it is in the cache.
    """
    n = values.shape[1]
    for row in range(first, first + count):
        for d in range(n):
            out[row, d] = np.float32(0)
    for start in range(0, width, TILE):
        stop = min(width, start + TILE)
        for row in range(first, first + count):
            s = start
            while s + 4 <= stop:
                a, b, c, e = p[row, s], p[row, s + 1], p[row, s + 2], p[row, s + 3]
                for d in range(n):
                    out[row, d] += (
                        a * widen(values[s, d]) + b * widen(values[s + 1, d])
                        + c * widen(values[s + 2, d]) + e * widen(values[s + 3, d])
                    )  # fmt: skip
                s += 4
            while s < stop:
                for d in range(n):
                    out[row, d] += p[row, s] * widen(values[s, d])
                s += 1
