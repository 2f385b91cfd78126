# What Numba compiles carries no annotations: it finds the types itself.
# mypy: ignore-errors
"""A decode step over packed buffers as loops that Numba compiles for the CPU: everything is read once, where it lies.

A lane is one key head of one batch row. Its slots are cut into *items*, spans of a fixed length of the codes of each
section and of the ring. An item has a softmax of its own, to base 2; the thread that ends last merges the items of every
lane in order, so that the result depends neither on the number of threads nor on what else is in the batch. As in
``..loops`` K's step and minimum are folded into the query, V's into the probabilities, and V's root multiplies a sum.

Tables are int64 arrays whose fields are named below; addresses count bytes, and nothing checks them.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from ... import lanes as wide
from ...openmp import arrive, compile_body, compile_loop, compile_sum, pointer, take
from ..loops import STEP, _undo, _unpack

SPAN = 1024  # slots of an item
RAW = 16
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # what numbers are
LOG2E = 1 / math.log(2)
SIDE = 16  # numbers that one vector holds

# The fields of a step.
STEP_FIELDS = (
    "taken", "arrived", "due", "rows", "hkv", "r", "d", "dv", "sections", "ring", "need", "query_kind", "kind", "capped",
    "score_slots", "ring_scores", "numbers", "query", "key", "value", "tail_key", "tail_value", "age", "real", "sinks",
    "residual", "aged", "scores", "out", "lse", "parts",
)  # fmt: skip
(
    TAKEN, ARRIVED, DUE, ROWS, HKV, R, D, DV, SECTIONS, RING, NEED, QUERY_KIND, KIND, CAPPED, SCORE_SLOTS, RING_SCORES,
    NUMBERS, QUERY, KEY, VALUE, TAIL_KEY, TAIL_VALUE, AGE, REAL, SINKS, RESIDUAL, AGED, SCORES, OUT, LSE, PARTS,
) = range(len(STEP_FIELDS))  # fmt: skip
# The fields of a section, of which as many follow as a step has sections. first_score: -1 where no scores are kept.
SECTION_FIELDS = (
    "k_bits", "v_bits", "groups", "size", "first_score", "key", "key_step", "key_min", "value", "value_step",
    "value_min", "value_root", "packed", "valid", "valid_slots",
)  # fmt: skip
(
    K_BITS, V_BITS, GROUPS, SIZE, FIRST_SCORE, S_KEY, KEY_STEP, KEY_MIN, S_VALUE, VALUE_STEP, VALUE_MIN, VALUE_ROOT,
    PACKED, VALID, VALID_SLOTS,
) = range(len(SECTION_FIELDS))  # fmt: skip


# ---------------------------------------------------------------- numbers


@compile_loop
def load(kind, address, first, count, into):
    """``count`` numbers from number ``first`` at an address on, as float32."""
    if kind == FLOAT32:
        given = carray(pointer(address + 4 * first), (count,), np.float32)
        for i in range(count):
            into[i] = given[i]
        return
    half, bits = carray(pointer(address + 2 * first), (count,), np.uint16), into.view(np.uint32)
    if kind == BFLOAT16:
        for i in range(count):
            bits[i] = np.uint32(half[i]) << np.uint32(16)
        return
    for i in range(count):
        bits[i] = (np.uint32(half[i]) & np.uint32(0x7FFF)) << np.uint32(13)
    for i in range(count):
        into[i] *= np.float32(2.0**112)  # the exponents of the two kinds begin at different places
    for i in range(count):
        size, sign = np.uint32(half[i]) & np.uint32(0x7FFF), np.uint32(half[i]) & np.uint32(0x8000)
        endless = np.uint32(0x7F800000) if size >= np.uint32(0x7C00) else np.uint32(0)
        bits[i] = bits[i] | endless | (sign << np.uint32(16))


@compile_loop
def save(kind, source, address, first):
    """float32 numbers to a place; rounded to the nearest, halves to the even one, where those are bfloat16."""
    if kind != BFLOAT16:
        into = carray(pointer(address + 4 * first), source.shape, np.float32)
        for i in range(source.shape[0]):
            into[i] = source[i]
        return
    half, bits = carray(pointer(address + 2 * first), source.shape, np.uint16), source.view(np.uint32)
    for i in range(source.shape[0]):
        x = bits[i]
        up = np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))
        unordered = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        half[i] = np.uint16(0x7FC0) if unordered else np.uint16((x + up) >> np.uint32(16))


@compile_loop
def copy(source, target, count):
    """Bytes."""
    one, other = carray(pointer(source), (count,), np.uint8), carray(pointer(target), (count,), np.uint8)
    for i in range(count):
        other[i] = one[i]


@compile_sum
def _highest(z, i, count):
    found = z[i, 0]
    for s in range(1, count):
        found = max(found, z[i, s])
    return found


@compile_sum
def _total(z, i, count):
    found = np.float32(0)
    for s in range(count):
        found += z[i, s]
    return found


@compile_loop
def powers(address, count, low):
    """2 ** (x - low) of ``count`` numbers at an address, and of those behind them up to a multiple of SIDE."""
    least = wide.same(low)
    for s in range(0, count, SIDE):
        at = address + 4 * s
        wide.store(at, wide.power(wide.load(at), least))


# ---------------------------------------------------------------- keys


@compile_sum
def _key_sums(q, table, i):
    found = np.float32(0)
    for c in range(q.shape[1]):
        found += q[i, c] * table[c]
    return found


@compile_sum
def _dots(folded, base, x, z, at):
    """z[:, at : at + STEP]: base + folded · x."""
    r, d = folded.shape
    for i in range(r):
        s0 = s1 = s2 = s3 = base[i]
        for c in range(d):
            f = folded[i, c]
            s0 += f * x[0, c]
            s1 += f * x[1, c]
            s2 += f * x[2, c]
            s3 += f * x[3, c]
        z[i, at], z[i, at + 1], z[i, at + 2], z[i, at + 3] = s0, s1, s2, s3


@compile_loop
def _raw(kind, address, slot, stop, width, x):
    """STEP tokens from ``slot`` on that are numbers; the last one again where there are fewer."""
    for t in range(STEP):
        load(kind, address, min(slot + t, stop - 1) * width, width, x[t])


@compile_loop
def raw_logits(kind, address, slot, stop, q, x, z, at):
    """z[:, at :]: q times the keys of the slots slot..stop of a lane at an address."""
    base = np.zeros(q.shape[0], np.float32)
    for s in range(slot, stop, STEP):
        _raw(kind, address, s, stop, q.shape[1], x)
        _dots(q, base, x, z, at + s - slot)


@compile_loop
def code_logits(n, lane, slot, stop, kind, q, x, z):
    """z: q times the keys of the slots slot..stop of a section; n: its fields."""
    r, d = q.shape
    bits, size, groups = n[K_BITS], n[SIZE], n[GROUPS]
    slots = groups * size
    if bits == RAW:
        address = n[S_KEY] + lane * slots * d * (4 if kind == FLOAT32 else 2)
        raw_logits(kind, address, slot, stop, q, x, z, 0)
        return
    width = d * bits // 8
    codes = carray(pointer(n[S_KEY] + lane * slots * width), (1, slots, width), np.uint8)
    folded, base, table, undo = (
        np.empty((r, d), np.float32),
        np.empty(r, np.float32),
        np.empty(d, np.float32),
        _undo(bits, width, q),
    )
    at = 0
    while slot < stop:
        group = slot // size
        end = min(stop, (group + 1) * size)
        load(kind, n[KEY_MIN], (lane * groups + group) * d, d, table)
        for i in range(r):
            base[i] = _key_sums(q, table, i)
        load(kind, n[KEY_STEP], (lane * groups + group) * d, d, table)
        for i in range(r):
            for c in range(d):
                folded[i, c] = q[i, c] * table[c] * undo[c]
        for s in range(slot, end, STEP):
            _unpack(codes, 0, s, end, bits, x)
            _dots(folded, base, x, z, at + s - slot)
        at += end - slot
        slot = end


# ---------------------------------------------------------------- values


@compile_loop
def _weighed(weights, x, sums, at):
    """sums += weights[:, at : at + STEP] · x."""
    r, d = sums.shape
    for i in range(r):
        w0, w1, w2, w3 = weights[i, at], weights[i, at + 1], weights[i, at + 2], weights[i, at + 3]
        for c in range(d):
            sums[i, c] += w0 * x[0, c] + w1 * x[1, c] + w2 * x[2, c] + w3 * x[3, c]


@compile_loop
def raw_values(kind, address, slot, stop, p, at, x, weights, sums):
    """sums += p[:, at :] times the values of the slots slot..stop of a lane at an address."""
    r, d = sums.shape
    count = stop - slot
    for i in range(r):
        for s in range(count):
            weights[i, s] = p[i, at + s]
        for t in range(STEP):  # what stands behind the end counts for nothing
            weights[i, count + t] = 0
    for s in range(slot, stop, STEP):
        _raw(kind, address, s, stop, d, x)
        _weighed(weights, x, sums, s - slot)


@compile_sum
def _least(p, i, at, table, count):
    found = np.float32(0)
    for s in range(count):
        found += p[i, at + s] * table[s]
    return found


@compile_loop
def code_values(n, lane, slot, stop, kind, p, x, weights, out):
    """out += p times the values of the slots slot..stop of a section; n: its fields."""
    r, d = out.shape
    bits, size, groups = n[V_BITS], n[SIZE], n[GROUPS]
    slots = groups * size
    if bits == RAW:
        address = n[S_VALUE] + lane * slots * d * (4 if kind == FLOAT32 else 2)
        raw_values(kind, address, slot, stop, p, 0, x, weights, out)
        return
    width = d * bits // 8
    codes = carray(pointer(n[S_VALUE] + lane * slots * width), (1, slots, width), np.uint8)
    sums, low, undo = np.empty((r, d), np.float32), np.empty(r, np.float32), _undo(bits, width, p)
    table, root = np.empty(SPAN, np.float32), np.empty(d, np.float32)
    at = 0
    while slot < stop:
        group = slot // size
        end = min(stop, (group + 1) * size)
        count = end - slot
        load(kind, n[VALUE_MIN], lane * slots + slot, count, table)
        for i in range(r):
            low[i] = _least(p, i, at, table, count)
        load(kind, n[VALUE_STEP], lane * slots + slot, count, table)
        for i in range(r):
            for s in range(count):
                weights[i, s] = p[i, at + s] * table[s]
            for t in range(STEP):  # what stands behind the end counts for nothing
                weights[i, count + t] = 0
        sums[:] = 0
        for s in range(slot, end, STEP):
            _unpack(codes, 0, s, end, bits, x)
            _weighed(weights, x, sums, s - slot)
        load(kind, n[VALUE_ROOT], (lane * groups + group) * d, d, root)
        for i in range(r):
            for c in range(d):
                out[i, c] += (sums[i, c] * undo[c] + low[i]) * root[c]
        at += count
        slot = end


# ---------------------------------------------------------------- items


@compile_loop
def finish(z, first, count, capped, cap, valid, valid_first, scores, score_first, score_slots):
    """Logits z[:, first : first + count] as they are compared: capped, to base 2, -inf where hidden; noted as scores."""
    for i in range(z.shape[0]):
        if capped:
            for s in range(first, first + count):
                z[i, s] = np.float32(cap * math.tanh(z[i, s] / cap) * LOG2E)
        if valid.shape[0]:
            for s in range(count):
                if not valid[valid_first + s]:
                    z[i, first + s] = -np.inf
        if score_first >= 0:
            for s in range(count):
                scores[i * score_slots + score_first + s] = z[i, first + s]


@compile_loop
def own_softmax(z, count, top, total):
    """z as powers beside each row's highest, which ``top`` receives, ``total`` the sum."""
    for i in range(z.shape[0]):
        for s in range(count, (count + SIDE - 1) // SIDE * SIDE):
            z[i, s] = -np.inf
        top[i], total[i] = -np.inf, 0
        if count:
            top[i] = _highest(z, i, count)
        if top[i] == -np.inf:
            for s in range(count):
                z[i, s] = 0
            continue
        powers(np.int64(z[i].ctypes.data), count, top[i])
        total[i] = _total(z, i, count)


@compile_loop
def blank(scores, first, stop, r, slots):
    """No token stands there: -inf."""
    for i in range(r):
        for s in range(first, stop):
            scores[i * slots + s] = -np.inf


@compile_loop
def of_codes(n, section, lane, span, q, x, z, weights, cap, top, total, out):
    """One item of a section."""
    r = n[R]
    row, slots = lane // n[HKV], section[GROUPS] * section[SIZE]
    held = carray(pointer(section[PACKED]), (n[ROWS],), np.int32)[row]
    slot, last = span * SPAN, min(slots, (span + 1) * SPAN)
    stop = max(slot, min(last, held))
    kept = section[FIRST_SCORE]
    scores = carray(pointer(n[SCORES] + 4 * lane * r * n[SCORE_SLOTS]), (r * n[SCORE_SLOTS],), np.float32)
    if kept >= 0:
        blank(scores, kept + stop, kept + last, r, n[SCORE_SLOTS])
    many = section[VALID_SLOTS]
    valid = carray(pointer(section[VALID] + lane * many), (many,), np.uint8)
    count = stop - slot
    if count:
        code_logits(section, lane, slot, stop, n[KIND], q, x, z)
        at = kept + slot if kept >= 0 else -1
        finish(z, 0, count, n[CAPPED], cap, valid, slot, scores, at, n[SCORE_SLOTS])
    own_softmax(z, count, top, total)
    if count:
        code_values(section, lane, slot, stop, n[KIND], z, x, weights, out)


@compile_loop
def of_ring(n, section, lane, span, q, x, z, weights, cap, top, total, out):
    """One item of the ring, which the new token is written into; section: the first one, behind whose codes it stands."""
    r, ring, kind = n[R], n[RING], n[KIND]
    row = lane // n[HKV]
    held = np.int64(carray(pointer(section[PACKED]), (n[ROWS],), np.int32)[row])
    age = np.int64(carray(pointer(n[AGE]), (n[ROWS],), np.int32)[row])
    slot, last = span * SPAN, min(ring, (span + 1) * SPAN)
    size = 4 if kind == FLOAT32 else 2
    keys, values = n[TAIL_KEY] + lane * ring * n[D] * size, n[TAIL_VALUE] + lane * ring * n[DV] * size
    if comes(n, row):
        at = age % ring
        if slot <= at < last:
            copy(n[KEY] + lane * n[D] * size, keys + at * n[D] * size, n[D] * size)
            copy(n[VALUE] + lane * n[DV] * size, values + at * n[DV] * size, n[DV] * size)
        age += 1
    kept, slots = n[RING_SCORES], section[GROUPS] * section[SIZE]
    scores = carray(pointer(n[SCORES] + 4 * lane * r * n[SCORE_SLOTS]), (r * n[SCORE_SLOTS],), np.float32)
    if kept >= 0:
        blank(scores, kept + slot, kept + last, r, n[SCORE_SLOTS])
    many = section[VALID_SLOTS]
    valid = carray(pointer(section[VALID] + lane * many), (many,), np.uint8)
    # What waits is one run of slots, or one up to the end and one from the beginning on.
    first = held % ring
    begins = max(slot, first), max(slot, 0)
    ends = min(last, first + age - held), min(last, first + age - held - ring)
    count = 0
    for piece in range(2):
        a, b = begins[piece], ends[piece]
        if a < b:
            raw_logits(kind, keys, a, b, q, x, z, count)
            at = kept + a if kept >= 0 else -1
            finish(z, count, b - a, n[CAPPED], cap, valid, slots + a, scores, at, n[SCORE_SLOTS])
            count += b - a
    own_softmax(z, count, top, total)
    count = 0
    for piece in range(2):
        a, b = begins[piece], ends[piece]
        if a < b:
            raw_values(kind, values, a, b, z, count, x, weights, out)
            count += b - a


@compile_loop
def comes(n, row):
    """Whether a token comes into this row."""
    if n[KEY] == 0:
        return False
    return n[REAL] == 0 or carray(pointer(n[REAL]), (n[ROWS],), np.uint8)[row] != 0


@compile_loop
def one_item(n, item, per_lane):
    """The item's part of the softmax and of its sums, to its place in ``parts``: (r, [top, total, sums])."""
    r, d, dv = n[R], n[D], n[DV]
    lane, rest = item // per_lane, item % per_lane
    which, base = 0, len(STEP_FIELDS)
    while which < n[SECTIONS]:
        section = n[base : base + len(SECTION_FIELDS)]
        spans = (section[GROUPS] * section[SIZE] + SPAN - 1) // SPAN
        if rest < spans:
            break
        rest -= spans
        which, base = which + 1, base + len(SECTION_FIELDS)
    numbers = carray(pointer(n[NUMBERS]), (2,), np.float64)
    scale, cap = numbers[0], numbers[1]
    q = np.empty((r, d), np.float32)
    factor = np.float32(scale) if n[CAPPED] else np.float32(scale * LOG2E)
    for i in range(r):
        load(n[QUERY_KIND], n[QUERY], (lane * r + i) * d, d, q[i])
        for c in range(d):
            q[i, c] *= factor
    x, z = np.empty((STEP, max(d, dv)), np.float32), np.empty((r, SPAN + SIDE), np.float32)
    weights, out = np.empty((r, SPAN + STEP), np.float32), np.zeros((r, dv), np.float32)
    top, total = np.empty(r, np.float32), np.empty(r, np.float32)
    if which < n[SECTIONS]:
        section = n[base : base + len(SECTION_FIELDS)]
        of_codes(n, section, lane, rest, q, x, z, weights, cap, top, total, out)
    else:
        section = n[len(STEP_FIELDS) : len(STEP_FIELDS) + len(SECTION_FIELDS)]
        of_ring(n, section, lane, rest, q, x, z, weights, cap, top, total, out)
    into = carray(pointer(n[PARTS] + 4 * item * r * (2 + dv)), (r, 2 + dv), np.float32)
    for i in range(r):
        into[i, 0], into[i, 1] = top[i], total[i]
        for c in range(dv):
            into[i, 2 + c] = out[i, c]


# ---------------------------------------------------------------- the end


@compile_loop
def merge(n, lane, i, per_lane):
    """Row i of a lane from its items, in order: its output, its log-sum-exp, its probabilities."""
    r, dv, head = n[R], n[DV], lane % n[HKV] * n[R] + i
    parts = carray(pointer(n[PARTS] + 4 * lane * per_lane * r * (2 + dv)), (per_lane, r, 2 + dv), np.float32)
    top = np.float32(-np.inf)
    for item in range(per_lane):
        top = max(top, parts[item, i, 0])
    found, total = np.zeros(dv, np.float32), 0.0
    lse = -np.inf
    if top > -np.inf:
        highest = np.float64(top)
        sink = -np.inf
        if n[SINKS]:
            sink = carray(pointer(n[SINKS]), (n[HKV] * r,), np.float32)[head] * LOG2E
            highest = max(highest, sink)
        total = 2.0 ** (sink - highest)
        for item in range(per_lane):
            if parts[item, i, 1] > 0:
                total += parts[item, i, 1] * 2.0 ** (parts[item, i, 0] - highest)
        for item in range(per_lane):
            if parts[item, i, 1] > 0:
                share = np.float32(2.0 ** (parts[item, i, 0] - highest) / total)
                for c in range(dv):
                    found[c] += parts[item, i, 2 + c] * share
        lse = highest + math.log2(total)
    save(n[QUERY_KIND], found, n[OUT], (lane * r + i) * dv)
    carray(pointer(n[LSE]), (n[ROWS] * n[HKV] * r,), np.float32)[lane * r + i] = lse / LOG2E
    if n[SCORE_SLOTS]:
        share_out(n[SCORES] + 4 * (lane * r + i) * n[SCORE_SLOTS], n[SCORE_SLOTS], lse)


@compile_loop
def share_out(address, slots, lse):
    """Logits at an address as probabilities."""
    if lse == -np.inf:
        return zero(address, slots)
    whole = slots // SIDE * SIDE
    powers(address, whole, np.float32(lse))
    rest, at = np.full(SIDE, -np.inf, np.float32), address + 4 * whole
    scores = carray(pointer(at), (slots - whole,), np.float32)
    for s in range(slots - whole):
        rest[s] = scores[s]
    powers(np.int64(rest.ctypes.data), SIDE, np.float32(lse))
    for s in range(slots - whole):
        scores[s] = rest[s]


@compile_loop
def zero(address, slots):
    scores = carray(pointer(address), (slots,), np.float32)
    for s in range(slots):
        scores[s] = 0


@compile_loop
def end(n, per_lane):
    """What comes after all items: the lanes are merged, the tokens counted, and told whether a row is due."""
    for lane in range(n[ROWS] * n[HKV]):
        for i in range(n[R]):
            merge(n, lane, i, per_lane)
    first = n[len(STEP_FIELDS) : len(STEP_FIELDS) + len(SECTION_FIELDS)]
    age = carray(pointer(n[AGE]), (n[ROWS],), np.int32)
    packed = carray(pointer(first[PACKED]), (n[ROWS],), np.int32)
    for row in range(n[ROWS]):
        if comes(n, row):
            age[row] += 1
            if n[AGED]:
                carray(pointer(n[AGED]), (n[ROWS],), np.int32)[row] += 1
        if n[NEED]:
            waits = n[NEED]
            if n[RESIDUAL]:
                waits += carray(pointer(n[RESIDUAL]), (n[ROWS],), np.int32)[row]
            if age[row] - packed[row] >= waits and packed[row] < first[GROUPS] * first[SIZE]:
                n[DUE] = 1


@compile_body
def step_part(data):
    sections = carray(data, len(STEP_FIELDS))[SECTIONS]
    n = carray(data, len(STEP_FIELDS) + sections * len(SECTION_FIELDS))
    per_lane = (n[RING] + SPAN - 1) // SPAN
    for which in range(sections):
        base = len(STEP_FIELDS) + which * len(SECTION_FIELDS)
        per_lane += (n[base + GROUPS] * n[base + SIZE] + SPAN - 1) // SPAN
    items = n[ROWS] * n[HKV] * per_lane
    item = take(data)
    while item < items:
        one_item(n, item, per_lane)
        if arrive(data) == items - 1:
            end(n, per_lane)
        item = take(data)
