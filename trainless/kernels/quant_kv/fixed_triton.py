# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803, RUF005, B007
# mypy: disable-error-code="no-untyped-def,assignment"
"""Triton form of a decode step on packed buffers of fixed size: one launch, which a CUDA graph can replay.

The grid is (batch row and key head, part). The first parts share the groups that are packed now, as the counters say;
the others have 64 slots of the ring each, and one of them writes the new token there. The last part to finish merges
what all have found: first every CLUSTER parts, then the clusters.

Codes are read two bytes at a time. A word holds 16 / bits codes, and bits at one place of all words are one *plane*:
masked and put under the exponent of 1024 they are half-precision numbers 1024 + 2^place · code without any conversion.
K's step is multiplied into the query once per group, K's minimum and the 1024 are one number per row and group; V's step
is multiplied into the probabilities, V's minimum and the 1024 are one number per row, and V's root multiplies the sum of
a group. Compiled for sm_90 a loop takes fewer than four instructions per code (docs/measured.md); it has not been timed
on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..split import last_lane, merge_parts
from ..tickets import CLUSTER, MOST
from ..tiles import tanh
from .fixed import FixedPacked

RING = 64  # slots of the ring per part, or a multiple where the ring is long
PROGRAMS = 528  # that the codes are shared among: four for each multiprocessor of the largest GPUs
ROWS = 16  # query rows of a key head, at most
LOG2E = math.log2(math.e)
EXACT, BF16, FP16 = 0, 1, 2  # what parameters are numbers of


@triton.jit
def _planes(x, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Words (uint16) as planes of numbers: plane 2 · p + b has the codes of place p of byte b.

    1024 + 2^(BITS · p) · code as float16; with KIND 0 the codes themselves as float32. ASM takes two words at once.
    """
    if ASM and KIND != 0:
        if BITS == 4:
            found = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.u32 t, $4, 8;"
                "lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xEA; lop3.b32 $1, t, 0x000f000f, 0x64006400, 0xEA;"
                "lop3.b32 $2, $4, 0x00f000f0, 0x64006400, 0xEA; lop3.b32 $3, t, 0x00f000f0, 0x64006400, 0xEA; }",
                "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        elif BITS == 8:
            found = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.u32 t, $2, 8;"
                "lop3.b32 $0, $2, 0x00ff00ff, 0x64006400, 0xEA; lop3.b32 $1, t, 0x00ff00ff, 0x64006400, 0xEA; }",
                "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            found = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.u32 t, $8, 8;"
                "lop3.b32 $0, $8, 0x00030003, 0x64006400, 0xEA; lop3.b32 $1, t, 0x00030003, 0x64006400, 0xEA;"
                "lop3.b32 $2, $8, 0x000c000c, 0x64006400, 0xEA; lop3.b32 $3, t, 0x000c000c, 0x64006400, 0xEA;"
                "lop3.b32 $4, $8, 0x00300030, 0x64006400, 0xEA; lop3.b32 $5, t, 0x00300030, 0x64006400, 0xEA;"
                "lop3.b32 $6, $8, 0x00c000c0, 0x64006400, 0xEA; lop3.b32 $7, t, 0x00c000c0, 0x64006400, 0xEA; }",
                "=r,=r,=r,=r,=r,=r,=r,=r,r", [x],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
    else:
        found = ()
        for p in tl.static_range(8 // BITS):
            for b in tl.static_range(2):
                if KIND == 0:
                    plane = ((x >> (8 * b + BITS * p)) & ((1 << BITS) - 1)).to(tl.float32)
                else:
                    plane = ((x >> (8 * b)) & (((1 << BITS) - 1) << (BITS * p))) | 0x6400
                    plane = plane.to(tl.uint16).to(tl.float16, bitcast=True)
                found = found + (plane,)
    return found


@triton.jit
def _words(base, tokens, wide, width: tl.constexpr, BW: tl.constexpr):
    """Rows ``tokens`` of a (tokens, width) matrix of words as (tokens, BW), zero past the width."""
    at = base + tokens[:, None] * width + wide[None, :]
    if width == BW:
        return tl.load(at)
    return tl.load(at, mask=(wide < width)[None, :], other=0)


@triton.jit
def _pair(table, at, here, ALL: tl.constexpr, KIND: tl.constexpr):
    """(table[2 · at], table[2 · at + 1]) as float32, 0 unless ``here``; two-byte numbers are read as words of four."""
    if KIND == 0:
        return tl.load(table + 2 * at, mask=here, other=0.0), tl.load(
            table + 2 * at + 1, mask=here, other=0.0
        )
    if ALL:
        word = tl.load(table + at)
    else:
        word = tl.load(table + at, mask=here, other=0)
    if KIND == 1:
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    low, high = (word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16)
    return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _dot(a, b, acc, KIND: tl.constexpr):
    if KIND == 0:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _finish(z, scale, softcap, CAP: tl.constexpr):
    """Logits to base 2; without a cap the scale is in the query already."""
    if CAP:
        z = softcap * tanh(z * scale / softcap) * 1.4426950408889634
    return z


@triton.jit
def _of_codes(
    q, key, key_step, key_min, value, value_step, value_min, value_root, valid, scores, part_out, part_lse,
    lane, part, spot, held, r, groups, slots, code_parts, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, SIZE: tl.constexpr,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr, VALID: tl.constexpr,
    SCORES: tl.constexpr, CAP: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One part of the groups that are packed."""
    rows = tl.arange(0, BR)
    in_r = rows < r
    once = scale * 1.4426950408889634
    if CAP:
        once = 1.0
    half = tl.float16 if KIND != 0 else tl.float32
    offset = 1024.0 if KIND != 0 else 0.0
    best = tl.full((BR,), float("-inf"), tl.float32)
    kw: tl.constexpr = D * KBITS // 16  # words of a token
    vw: tl.constexpr = DV * VBITS // 16
    wide = tl.arange(0, BK)
    wide_v = tl.arange(0, BV)
    in_k = wide < kw
    in_v = wide_v < vw
    tokens = tl.arange(0, BN)
    halves = tl.arange(0, BN // 2)
    used = held // SIZE
    share = tl.cdiv(used, code_parts)
    tiles: tl.constexpr = SIZE // BN
    first = tl.minimum(part * share, used) * tiles
    last = tl.minimum((part + 1) * share, used) * tiles
    total = tl.zeros((BN, BR), tl.float32)
    qs = ()
    accs = ()
    for n in tl.static_range(16 // KBITS):
        channel = (n // 2) * (2 * kw) + (n % 2) + 2 * wide
        of = q + (lane * r + rows[None, :]) * D + channel[:, None]
        qs = qs + (tl.load(of, mask=in_r[None, :] & in_k[:, None], other=0.0).to(tl.float32) * once,)
    for n in tl.static_range(16 // VBITS):
        accs = accs + (tl.zeros((BR, BV), tl.float32),)
    for tile in tl.range(first, last):
        group = lane * groups + tile // tiles
        slot = lane * groups * SIZE + tile * BN
        raw = _words(key + slot * kw, tokens, wide, kw, BK)
        raw_v = _words(value + slot * vw, tokens, wide_v, vw, BV)
        codes = _planes(raw, KBITS, KIND, ASM)
        base = tl.zeros((BK, BR), tl.float32)
        z = tl.zeros((BN, BR), tl.float32)
        for n in tl.static_range(8 // KBITS):
            at = group * (D // 2) + n * kw + wide
            # A plane holds 2^place · code.
            by = 1.0 / (1 << (KBITS * n)) if KIND != 0 else 1.0
            even, odd = _pair(key_step, at, in_k, kw == BK, KIND)
            low, high = _pair(key_min, at, in_k, kw == BK, KIND)
            even = (qs[2 * n] * (even * by)[:, None]).to(half)
            odd = (qs[2 * n + 1] * (odd * by)[:, None]).to(half)
            base += qs[2 * n] * low[:, None]
            base += qs[2 * n + 1] * high[:, None]
            if KIND != 0:
                base -= offset * even.to(tl.float32)
                base -= offset * odd.to(tl.float32)
            z = _dot(codes[2 * n], even, z, KIND)
            z = _dot(codes[2 * n + 1], odd, z, KIND)
        z += tl.sum(base, 0)[None, :]
        z = _finish(z, scale, softcap, CAP)
        number = tile * BN + tokens
        if VALID:
            ok = tl.load(valid + lane * slots + number) != 0
            z = tl.where(ok[:, None], z, float("-inf"))
        if SCORES:
            into = scores + (lane * r + rows[None, :]) * slots + number[:, None]
            tl.store(into, z, mask=in_r[None, :])
        top = tl.maximum(best, tl.max(z, 0))
        safe = top
        if VALID:
            safe = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp2(best - safe)
        w = tl.exp2(z - safe[None, :])
        total = total * fade[None, :] + w
        best = top
        steps = tl.reshape(tl.join(*_pair(value_step, slot // 2 + halves, halves < BN, True, KIND)), (BN,))
        least = tl.reshape(tl.join(*_pair(value_min, slot // 2 + halves, halves < BN, True, KIND)), (BN,))
        weight = (w * steps[:, None]).to(half)
        low = tl.sum(w * least[:, None], 0)
        over = low * 0.0
        if KIND != 0:
            over = offset * tl.sum(weight.to(tl.float32), 0)
        weight = tl.trans(weight)
        codes = _planes(raw_v, VBITS, KIND, ASM)
        renewed = ()
        for n in tl.static_range(8 // VBITS):
            by = 1.0 / (1 << (VBITS * n)) if KIND != 0 else 1.0
            even, odd = _pair(value_root, group * (DV // 2) + n * vw + wide_v, in_v, vw == BV, KIND)
            add = (low - over * by)[:, None]
            none = tl.zeros((BR, BV), tl.float32)
            more = (_dot(weight, codes[2 * n], none, KIND) * by + add) * even[None, :]
            renewed = renewed + (accs[2 * n] * fade[:, None] + more,)
            more = (_dot(weight, codes[2 * n + 1], none, KIND) * by + add) * odd[None, :]
            renewed = renewed + (accs[2 * n + 1] * fade[:, None] + more,)
        accs = renewed
    whole = tl.sum(total, 0)
    norm = tl.where(whole > 0, whole, 1.0)
    for n in tl.static_range(16 // VBITS):
        channel = (n // 2) * (2 * vw) + (n % 2) + 2 * wide_v
        tl.store(
            part_out + spot[:, None] * DV + channel[None, :], accs[n] / norm[:, None],
            mask=in_r[:, None] & in_v[None, :],
        )  # fmt: skip
    tl.store(part_lse + spot, tl.where(whole > 0, best + tl.log2(norm), float("-inf")), mask=in_r)


@triton.jit
def _of_ring(
    q, new_k, new_v, tail_k, tail_v, valid, scores, part_out, part_lse,
    lane, first, last, spot, held, seen, until, r, ring, slots, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, KIND: tl.constexpr, APPEND: tl.constexpr, VALID: tl.constexpr,
    SCORES: tl.constexpr, CAP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Slots first..last of the ring; the tokens seen..until, of which there is one at most, are new and written."""
    rows = tl.arange(0, BR)
    in_r = rows < r
    once = scale * 1.4426950408889634
    if CAP:
        once = 1.0
    wide = tl.arange(0, BD)
    wide_v = tl.arange(0, BW)
    of = q + (lane * r + rows[None, :]) * D + wide[:, None]
    query = tl.load(of, mask=in_r[None, :] & (wide < D)[:, None], other=0.0)
    best = tl.full((BR,), float("-inf"), tl.float32)
    whole = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BW), tl.float32)
    if APPEND:
        # The new token comes first, so that what follows finds it in its slot.
        at = seen % ring
        if (until > seen) & (at >= first) & (at < last):
            own_k = tl.load(new_k + lane * D + wide, mask=wide < D, other=0.0)
            own_v = tl.load(new_v + lane * DV + wide_v, mask=wide_v < DV, other=0.0)
            tl.store(tail_k + (lane * ring + at) * D + wide, own_k, mask=wide < D)
            tl.store(tail_v + (lane * ring + at) * DV + wide_v, own_v, mask=wide_v < DV)
        tl.debug_barrier()
    for start in range(first, last, BT):
        place = start + tl.arange(0, BT)
        # The slot of token n is n % ring.
        token = held + (place - held % ring + ring) % ring
        here = (place < last) & (token < until)
        from_k = tail_k + (lane * ring + place)[:, None] * D + wide[None, :]
        from_v = tail_v + (lane * ring + place)[:, None] * DV + wide_v[None, :]
        inside = here[:, None] & (wide < D)[None, :]
        inside_v = here[:, None] & (wide_v < DV)[None, :]
        k = tl.load(from_k, mask=inside, other=0.0)
        v = tl.load(from_v, mask=inside_v, other=0.0)
        z = _dot(k, query, tl.zeros((BT, BR), tl.float32), KIND) * once
        z = _finish(z, scale, softcap, CAP)
        number = slots - ring + place
        if VALID:
            here = here & (tl.load(valid + lane * slots + number, mask=here, other=0) != 0)
        z = tl.where(here[:, None], z, float("-inf"))
        if SCORES:
            into = scores + (lane * r + rows[None, :]) * slots + number[:, None]
            tl.store(into, z, mask=in_r[None, :] & (place < last)[:, None])
        top = tl.maximum(best, tl.max(z, 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        w = tl.exp2(z - safe[None, :])
        fade = tl.exp2(best - safe)
        whole = whole * fade + tl.sum(w, 0)
        acc = _dot(tl.trans(w).to(v.dtype), v, acc * fade[:, None], KIND)
        best = top
    norm = tl.where(whole > 0, whole, 1.0)
    inside_v = in_r[:, None] & (wide_v < DV)[None, :]
    tl.store(part_out + spot[:, None] * DV + wide_v[None, :], acc / norm[:, None], mask=inside_v)
    tl.store(part_lse + spot, tl.where(whole > 0, best + tl.log2(norm), float("-inf")), mask=in_r)


@triton.jit
def _packed_decode(
    q, new_k, new_v, key, key_step, key_min, value, value_step, value_min, value_root, tail_k, tail_v, packed, age,
    tickets, valid, real, sinks, scores, part_out, part_lse, out, lse,
    hkv, r, groups, ring, slots, parts, code_parts, clusters, ring_share, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, SIZE: tl.constexpr,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr, APPEND: tl.constexpr,
    VALID: tl.constexpr, REAL: tl.constexpr, SINKS: tl.constexpr, SCORES: tl.constexpr, CAP: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch = lane // hkv
    rows = tl.arange(0, BR)
    held = tl.load(packed + batch)
    seen = tl.load(age + batch)
    until = seen
    if APPEND:
        until = seen + 1
        if REAL:
            until = seen + tl.where(tl.load(real + batch) != 0, 1, 0)
    spot = (lane * parts + part) * r + rows
    if part < code_parts:
        _of_codes(
            q, key, key_step, key_min, value, value_step, value_min, value_root, valid, scores, part_out, part_lse,
            lane, part, spot, held, r, groups, slots, code_parts, scale, softcap,
            D, DV, SIZE, KBITS, VBITS, KIND, ASM, VALID, SCORES, CAP, BR, BN, BK, BV,
        )  # fmt: skip
    else:
        first = (part - code_parts) * ring_share
        _of_ring(
            q, new_k, new_v, tail_k, tail_v, valid, scores, part_out, part_lse,
            lane, first, tl.minimum(first + ring_share, ring), spot, held, seen, until, r, ring, slots, scale, softcap,
            D, DV, KIND, APPEND, VALID, SCORES, CAP, BR, BD, BW, BT,
        )  # fmt: skip
    done = merge_parts(
        part_out, part_lse, out, lse, sinks, tickets, lane, part, parts, clusters, hkv, r, DV, SINKS, BW,
    )  # fmt: skip
    # Everybody has read the counter by the time the last lane is done.
    if APPEND:
        if done == 1:
            if last_lane(tickets, batch, hkv):
                tl.store(age + batch, until)


@triton.jit
def _probabilities(
    scores, lse, packed, age, valid, hkv, r, ring, slots, after, VALID: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 into probabilities, in place; zero where there is no token. ``age`` counts the new one."""
    row = tl.program_id(0).to(tl.int64)
    lane = row // r
    slot = tl.program_id(1) * BN + tl.arange(0, BN)
    held, seen = tl.load(packed + lane // hkv), tl.load(age + lane // hkv)
    place = slot - (slots - ring)
    token = held + (place - held % ring + ring) % ring
    here = ((place < 0) & (slot < held)) | ((place >= 0) & (slot < slots) & (token < seen))
    if VALID:
        here = here & (tl.load(valid + lane * slots + slot, mask=here, other=0) != 0)
    z = tl.load(scores + row * slots + slot, mask=here, other=float("-inf"))
    whole = tl.load(lse + row) * 1.4426950408889634
    p = tl.exp2(z - tl.where(whole == float("-inf"), 0.0, whole))
    tl.store(scores + row * slots + slot, tl.where(here, p, 0.0), mask=slot < slots)


@triton.jit
def _code(x, least, step, BITS: tl.constexpr):
    """Codes of x by parameters as they are stored: rounded to the nearest, halves to the even one."""
    found = tl.div_rn(x - least, tl.where(step > 0, step, 1.0))
    # Adding and taking away 1.5 · 2^23 leaves no room for a fraction.
    found = (found + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(found, 0.0), (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def _pack(
    key, key_step, key_min, value, value_step, value_min, value_root, tail_k, tail_v, packed, age, tickets, residual,
    hkv, groups, ring,
    D: tl.constexpr, DV: tl.constexpr, SIZE: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The oldest group of the ring of one lane into codes, if its row is due."""
    lane = tl.program_id(0).to(tl.int64)
    batch = lane // hkv
    held, seen = tl.load(packed + batch), tl.load(age + batch)
    due = (seen - held >= tl.load(residual + batch) + SIZE) & (held < groups * SIZE)
    if due:
        kw: tl.constexpr = D * KBITS // 8
        vw: tl.constexpr = DV * VBITS // 8
        tokens = tl.arange(0, BS)
        there = tokens < SIZE
        place = lane * ring + (held + tokens) % ring
        group = lane * groups + held // SIZE
        slot = group * SIZE + tokens
        wide = tl.arange(0, BK)
        byte = tl.zeros((BS, BK), tl.int32)
        inside = there[:, None] & (wide < kw)[None, :]
        for p in tl.static_range(8 // KBITS):
            x = tl.load(tail_k + place[:, None] * D + (p * kw + wide)[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            low = tl.min(tl.where(inside, x, float("inf")), 0)
            high = tl.max(tl.where(inside, x, float("-inf")), 0)
            step = tl.div_rn(high - low, (1 << KBITS) - 1.0).to(key_step.dtype.element_ty)
            least = low.to(key_min.dtype.element_ty)
            tl.store(key_step + group * D + p * kw + wide, step, mask=wide < kw)
            tl.store(key_min + group * D + p * kw + wide, least, mask=wide < kw)
            byte |= _code(x, least.to(tl.float32)[None, :], step.to(tl.float32)[None, :], KBITS) << (
                KBITS * p
            )
        tl.store(key + slot[:, None] * kw + wide[None, :], byte.to(tl.uint8), mask=inside)
        wide_v = tl.arange(0, BV)
        inside_v = there[:, None] & (wide_v < vw)[None, :]
        low_v = tl.full((BS,), float("inf"), tl.float32)
        high_v = tl.full((BS,), float("-inf"), tl.float32)
        for p in tl.static_range(8 // VBITS):
            of = tail_v + place[:, None] * DV + (p * vw + wide_v)[None, :]
            x = tl.load(of, mask=inside_v, other=0.0).to(tl.float32)
            root = tl.sqrt_rn(tl.max(tl.abs(x), 0)).to(value_root.dtype.element_ty)
            root = tl.where(root.to(tl.float32) > 0, root.to(tl.float32), 1.0)
            tl.store(
                value_root + group * DV + p * vw + wide_v,
                root.to(value_root.dtype.element_ty),
                mask=wide_v < vw,
            )
            x = tl.div_rn(x, root[None, :] + tl.zeros((BS, BV), tl.float32))
            low_v = tl.minimum(low_v, tl.min(tl.where(inside_v, x, float("inf")), 1))
            high_v = tl.maximum(high_v, tl.max(tl.where(inside_v, x, float("-inf")), 1))
        step_v = tl.div_rn(high_v - low_v, (1 << VBITS) - 1.0).to(value_step.dtype.element_ty)
        least_v = low_v.to(value_min.dtype.element_ty)
        tl.store(value_step + slot, step_v, mask=there)
        tl.store(value_min + slot, least_v, mask=there)
        byte_v = tl.zeros((BS, BV), tl.int32)
        for p in tl.static_range(8 // VBITS):
            of = tail_v + place[:, None] * DV + (p * vw + wide_v)[None, :]
            x = tl.load(of, mask=inside_v, other=0.0).to(tl.float32)
            root = tl.sqrt_rn(tl.max(tl.abs(x), 0)).to(value_root.dtype.element_ty)
            root = tl.where(root.to(tl.float32) > 0, root.to(tl.float32), 1.0)
            x = tl.div_rn(x, root[None, :] + tl.zeros((BS, BV), tl.float32))
            found = _code(x, least_v.to(tl.float32)[:, None], step_v.to(tl.float32)[:, None], VBITS)
            byte_v |= found << (VBITS * p)
        tl.store(value + slot[:, None] * vw + wide_v[None, :], byte_v.to(tl.uint8), mask=inside_v)
    if last_lane(tickets, batch, hkv):
        if due:
            tl.store(packed + batch, held + SIZE)


def refuses(query: Tensor, buffers: FixedPacked, terms: Terms) -> tuple[str, ...]:
    """Why this form cannot take a call; empty when it can."""
    d, dv, size = query.shape[3], buffers.tail_value.shape[3], buffers.size
    share = query.shape[1] // buffers.tail_key.shape[1]
    found = []
    if not {buffers.k_bits, buffers.v_bits} <= {2, 4, 8}:
        found.append(f"triton: {buffers.k_bits} and {buffers.v_bits} bits")
    if size % 16:
        found.append(f"triton: groups of {size} tokens, a multiple of 16 is needed")
    if max(d, dv) > 256 or d * buffers.k_bits % 16 or dv * buffers.v_bits % 16:
        found.append(f"triton: head width {d} (value {dv})")
    if share > ROWS:
        found.append(f"triton: {share} query heads to a key head")
    if terms.position_bias is not None:
        found.append("triton: position bias")
    if len({t.dtype for t in (query, buffers.tail_key, buffers.tail_value)}) > 1:
        found.append("triton: several dtypes")
    return tuple(found)


def plan(buffers: FixedPacked, share: int) -> dict[str, int]:
    """Numbers of a launch that depend on shapes alone: parts, clusters, sizes of tiles, warps and stages."""
    lanes = buffers.key.shape[0] * buffers.key.shape[1]
    d, dv = buffers.tail_key.shape[3], buffers.tail_value.shape[3]
    ring = buffers.tail_key.shape[2]
    ring_share = RING * triton.cdiv(ring, RING * MOST * CLUSTER // 4)
    ring_parts = triton.cdiv(ring, ring_share)
    # Every part has two groups at least when the buffers are full.
    wanted = min(triton.cdiv(PROGRAMS, lanes), triton.cdiv(buffers.key.shape[2], 2))
    code_parts = max(1, min(wanted, MOST * CLUSTER - ring_parts))
    wide = max(16, triton.next_power_of_2(max(d * buffers.k_bits, dv * buffers.v_bits) // 16))
    power = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
    many = buffers.k_bits == 8 or buffers.v_bits == 8 or max(d, dv) > 128 or share > 8
    return {
        "parts": code_parts + ring_parts,
        "code_parts": code_parts,
        "clusters": triton.cdiv(code_parts + ring_parts, CLUSTER),
        "BR": 8 if share <= 8 else 16,
        "BN": math.gcd(64, buffers.size),
        "BK": power(d * buffers.k_bits // 16),
        "BV": power(dv * buffers.v_bits // 16),
        "BD": power(d),
        "BW": power(dv),
        "BT": 16,
        "ring_share": ring_share,
        "num_warps": 2 if many or wide > 64 else 1,
        "num_stages": 2,
    }


def decode(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    buffers: FixedPacked,
    terms: Terms,
    valid: Tensor | None = None,
    real: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``fixed_api.packed_decode``: one launch, and a second one where probabilities are asked for."""
    f = buffers
    b, h, _, d = query.shape
    hkv, ring, dv = f.tail_key.shape[1], f.tail_key.shape[2], f.tail_value.shape[3]
    r = h // hkv
    numbers = plan(f, r)
    parts = numbers["parts"]
    wide = {"dtype": torch.float32, "device": query.device}
    part_out = torch.empty(b * hkv, parts, r, dv, **wide)  # type: ignore[call-overload]
    part_lse = torch.empty(b * hkv, parts, r, **wide)  # type: ignore[call-overload]
    out = torch.empty(b, h, 1, dv, dtype=query.dtype, device=query.device)
    lse = torch.empty(b, h, **wide)  # type: ignore[call-overload]
    kind = {torch.float32: EXACT, torch.bfloat16: BF16, torch.float16: FP16}[query.dtype]
    parameters = (f.key_step, f.key_min, f.value_step, f.value_min, f.value_root)
    tables = [t if kind == EXACT or t is None else t.view(torch.uint32) for t in parameters]
    none = query
    query = query.contiguous()
    mask = none if valid is None else valid.contiguous().view(torch.uint8)
    there = none if real is None else real.view(torch.uint8)
    _packed_decode[(b * hkv, parts)](
        query, none if key is None else key.contiguous(), none if value is None else value.contiguous(),
        f.key.view(torch.uint16), tables[0], tables[1], f.value.view(torch.uint16), tables[2], tables[3], tables[4],
        f.tail_key, f.tail_value, f.packed, f.age, f.tickets, mask, there,
        none if terms.sink_logits is None else terms.sink_logits, none if scores is None else scores,
        part_out, part_lse, out, lse,
        hkv, r, f.key.shape[2], ring, f.slots, parts, numbers["code_parts"], numbers["clusters"],
        numbers["ring_share"], terms.scale, terms.softcap or 1.0, D=d, DV=dv, SIZE=f.size,
        KBITS=f.k_bits, VBITS=f.v_bits, KIND=kind, ASM=not triton.knobs.runtime.interpret, APPEND=key is not None,
        VALID=valid is not None, REAL=real is not None, SINKS=terms.sink_logits is not None,
        SCORES=scores is not None, CAP=terms.softcap is not None,
        **{n: numbers[n] for n in ("BR", "BN", "BK", "BV", "BD", "BW", "BT", "num_warps", "num_stages")},
    )  # fmt: skip
    if scores is not None:
        _probabilities[(b * h, triton.cdiv(f.slots, 1024))](
            scores, lse, f.packed, f.age, mask, hkv, r, ring, f.slots, 0, VALID=valid is not None, BN=1024,
        )  # fmt: skip
    return out, lse


def pack_group(buffers: FixedPacked, residual: Tensor) -> None:
    """See ``fixed_api.pack_group``: one launch, whose programs end at once where nothing is due."""
    f = buffers
    b, hkv, ring, d = f.tail_key.shape
    dv = f.tail_value.shape[3]
    power = triton.next_power_of_2
    _pack[(b * hkv,)](
        f.key, f.key_step, f.key_min, f.value, f.value_step, f.value_min, f.value_root, f.tail_key, f.tail_value,
        f.packed, f.age, f.tickets, residual, hkv, f.key.shape[2], ring,
        D=d, DV=dv, SIZE=f.size, KBITS=f.k_bits, VBITS=f.v_bits, BS=power(f.size), BK=power(f.key.shape[4]),
        BV=power(f.value.shape[4]), num_warps=8,
    )  # fmt: skip
