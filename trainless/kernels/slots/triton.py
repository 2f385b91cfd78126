# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of a decode step over fixed slots: two launches, which a CUDA graph can replay.

The first attends: a grid of (batch row and key head, part of the slots), one of whose programs writes the new token,
and the last of which merges the parts. The second brings the scores up to date and chooses what goes, over (batch row
and key head, block of slots): every block names the one of its slots that is worth least, and the last block decides.
Not timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..draws import MIX, POSITION, whole
from ..split import MOST as CLUSTERS
from ..split import last_lane, merge_parts
from ..tickets import CLUSTER, MOST
from ..tiles import tanh
from ..turning import NEAR
from .state import GROUPS, SCORES, FixedSlots, SlotStep

SHARE = 64  # slots per part, at least
PROGRAMS = 264  # that the slots are shared among: two for each multiprocessor of the largest GPUs
BLOCK = 1024  # slots per program of the second kernel
FAR = tl.constexpr(2147483647)
SUM, LAST, DRAWN = (SCORES.index(name) for name in ("sum", "last", "draw"))
PLACES, MIXED = tl.constexpr(whole(POSITION)), tl.constexpr(whole(MIX))


@triton.jit
def _attend(
    q, new_k, new_v, keys, values, positions, free, age, real, sinks, shifts, near_turns, far_turns, partner, tickets,
    logits, part_out, part_lse, out, lse,
    hkv, r, slots, parts, share, clusters, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, EXACT: tl.constexpr, REAL: tl.constexpr, SINKS: tl.constexpr,
    LOGITS: tl.constexpr, CAP: tl.constexpr, TURN: tl.constexpr, NEAR: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch = lane // hkv
    at = tl.load(free + lane)
    seen = tl.load(age + batch)
    if REAL:
        seen = tl.where(tl.load(real + batch) != 0, seen, -1)
    rows = tl.arange(0, BR)
    wide = tl.arange(0, BD)
    wide_v = tl.arange(0, BV)
    in_r = rows < r
    of = q + (lane * r + rows[None, :]) * D + wide[:, None]
    query = tl.load(of, mask=in_r[None, :] & (wide < D)[:, None], other=0.0)
    first = part * share
    last = tl.minimum(first + share, slots)
    if (at >= first) & (at < last):
        # The new token comes first, so that what follows finds it in its slot.
        own = lane * slots + at
        tl.store(positions + own, seen)
        own_k = tl.load(new_k + lane * D + wide, mask=wide < D, other=0.0)
        own_v = tl.load(new_v + lane * DV + wide_v, mask=wide_v < DV, other=0.0)
        tl.store(keys + own * D + wide, own_k, mask=wide < D)
        tl.store(values + own * DV + wide_v, own_v, mask=wide_v < DV)
        if TURN:
            tl.store(shifts + own, 0)
    tl.debug_barrier()
    best = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BN, BR), tl.float32)
    acc = tl.zeros((BR, BV), tl.float32)
    for start in tl.range(first, last, BN):
        place = start + tl.arange(0, BN)
        here = place < last
        near = (lane * slots + place)[:, None]
        position = tl.load(positions + lane * slots + place, mask=here, other=-1)
        k = tl.load(keys + near * D + wide[None, :], mask=here[:, None] & (wide < D)[None, :], other=0.0)
        if TURN:
            distance = tl.load(shifts + lane * slots + place, mask=here, other=0)[:, None]
            k = _turned(keys, k, near, distance, near_turns, far_turns, partner, here, wide, D, NEAR)
        v = tl.load(
            values + near * DV + wide_v[None, :], mask=here[:, None] & (wide_v < DV)[None, :], other=0.0
        )
        if EXACT:
            z = tl.dot(k, query, input_precision="ieee")
        else:
            z = tl.dot(k, query)
        if CAP:
            z = softcap * tanh(z * scale / softcap) * 1.4426950408889634
        else:
            z = z * (scale * 1.4426950408889634)
        z = tl.where((position >= 0)[:, None], z, float("-inf"))
        if LOGITS:
            into = logits + (lane * r + rows[None, :]) * slots + place[:, None]
            tl.store(into, z, mask=in_r[None, :] & here[:, None])
        top = tl.maximum(best, tl.max(z, 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        w = tl.exp2(z - safe[None, :])
        fade = tl.exp2(best - safe)
        total = total * fade[None, :] + w
        if EXACT:
            acc = tl.dot(tl.trans(w), v, acc * fade[:, None], input_precision="ieee")
        else:
            acc = tl.dot(tl.trans(w).to(v.dtype), v, acc * fade[:, None])
        best = top
    whole = tl.sum(total, 0)
    norm = tl.where(whole > 0, whole, 1.0)
    spot = (lane * parts + part) * r + rows
    inside_v = in_r[:, None] & (wide_v < DV)[None, :]
    tl.store(part_out + spot[:, None] * DV + wide_v[None, :], acc / norm[:, None], mask=inside_v)
    tl.store(part_lse + spot, tl.where(whole > 0, best + tl.log2(norm), float("-inf")), mask=in_r)
    merge_parts(
        part_out, part_lse, out, lse, sinks, tickets, lane, part, parts, clusters, hkv, r, DV, SINKS, BV,
    )  # fmt: skip


@triton.jit
def _turned(
    keys, k, near, distance, near_turns, far_turns, partner, here, wide,
    D: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Keys (slots, D) turned by ``distance`` (slots, 1); see ``turning.Turn``."""
    inside = here[:, None] & (wide < D)[None, :]
    other = tl.load(partner + wide, mask=wide < D, other=0)
    beside = tl.load(keys + near * D + other[None, :], mask=inside, other=0.0).to(tl.float32)
    a = far_turns + distance // NEAR * (2 * D) + wide[None, :]
    b = near_turns + distance % NEAR * (2 * D) + wide[None, :]
    cos_a, sin_a = tl.load(a, mask=inside, other=0.0), tl.load(a + D, mask=inside, other=0.0)
    cos_b, sin_b = tl.load(b, mask=inside, other=0.0), tl.load(b + D, mask=inside, other=0.0)
    turned = k.to(tl.float32) * (cos_a * cos_b - sin_a * sin_b) + beside * (sin_a * cos_b + cos_a * sin_b)
    return turned.to(k.dtype)


@triton.jit
def _mass(
    logits, lse, lane, hkv, r, place, here, slots, GQA: tl.constexpr, SHARED: tl.constexpr, BN: tl.constexpr
):
    """What the query heads of a key head, or with SHARED of the layer, give each slot together."""
    mass = tl.zeros((BN,), tl.float32)
    first = lane * r
    count = r
    if SHARED:
        first = lane // hkv * hkv * r
        count = hkv * r
    for row in range(count):
        whole = tl.load(lse + first + row) * 1.4426950408889634
        z = tl.load(logits + (first + row) * slots + place, mask=here, other=float("-inf"))
        p = tl.exp2(z - tl.where(whole == float("-inf"), 0.0, whole))
        if GQA == 2:
            mass = tl.maximum(mass, p)
        elif GQA == 3:
            mass = tl.where(row == 0, p, mass)
        else:
            mass += p
    if SHARED or GQA == 1:
        mass = mass / count
    return mass


@triton.jit
def _drawn(lot, position):
    """See ``draws.drawn``."""
    x = lot + position.to(tl.int64) * PLACES
    for _ in tl.static_range(2):
        x = (x ^ ((x >> 32) & 0xFFFFFFFF)) * MIXED
    x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return ((x >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) / 9007199254740992.0


@triton.jit
def _settle(
    logits, lse, positions, scores, shifts, lots, free, age, count, limit, recent, never, real, tickets, found_worth,
    found_slot, hkv, r, slots, blocks, runs,
    SCORE: tl.constexpr, GQA: tl.constexpr, SHARED: tl.constexpr, NORMALISE: tl.constexpr, REAL: tl.constexpr,
    TURN: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    batch = lane // hkv
    at = tl.load(free + lane)
    there = 1
    if REAL:
        there = tl.where(tl.load(real + batch) != 0, 1, 0)
    now = tl.load(age + batch) + there
    held = tl.load(count + batch) + there
    over = held > tl.minimum(tl.load(limit + batch), slots - 1)
    place = block * BN + tl.arange(0, BN)
    here = place < slots
    position = tl.load(positions + lane * slots + place, mask=here, other=-1)
    barred = (position < 0) | (position >= now - tl.maximum(tl.load(recent + batch), 1))
    for run in range(runs):
        start, stop = tl.load(never + (batch * runs + run) * 2), tl.load(never + (batch * runs + run) * 2 + 1)
        barred = barred | ((position >= start) & (position < stop))
    worth = tl.zeros((BN,), tl.float32)
    if SCORE == 3:
        worth = _drawn(tl.load(lots + lane), position)
    elif SCORE != 0:
        mass = _mass(logits, lse, lane, hkv, r, place, here, slots, GQA, SHARED, BN) * there
        if SCORE == 1:
            old = tl.load(scores + lane * slots + place, mask=here, other=0.0)
            mass += tl.where(place == at, 0.0, old)
        tl.store(scores + lane * slots + place, mass, mask=here)
        worth = mass
        if NORMALISE:
            worth = worth / tl.maximum(now - position, 1).to(tl.float32)
    # The least worth, among equals the oldest; and the first slot that is empty.
    worth = tl.where(barred, float("inf"), worth)
    least = tl.min(worth, 0)
    oldest = tl.min(tl.where(barred | (worth != least), FAR, position), 0)
    victim = tl.min(tl.where(barred | (position != oldest), FAR, place), 0)
    empty = tl.min(tl.where(here & (position < 0), place, FAR), 0)
    spot = lane * blocks + block
    tl.store(found_worth + spot, least)
    tl.store(found_slot + spot * 3, oldest)
    tl.store(found_slot + spot * 3 + 1, victim)
    tl.store(found_slot + spot * 3 + 2, empty)
    tl.debug_barrier()
    own = tickets + lane * (CLUSTERS + 2)
    if tl.atomic_add(own, 1) == blocks - 1:
        tl.store(own, 0)
        each = tl.arange(0, BB)
        there_is = each < blocks
        spots = lane * blocks + each
        worths = tl.load(found_worth + spots, mask=there_is, other=float("inf"))
        ages = tl.load(found_slot + spots * 3, mask=there_is, other=FAR)
        victims = tl.load(found_slot + spots * 3 + 1, mask=there_is, other=FAR)
        empties = tl.load(found_slot + spots * 3 + 2, mask=there_is, other=FAR)
        first_age = tl.min(tl.where(worths == tl.min(worths, 0), ages, FAR), 0)
        gone = tl.min(tl.where((ages == first_age) & (first_age < FAR), victims, FAR), 0)
        next_free = tl.min(empties, 0)
        if over & (gone < FAR):
            tl.store(positions + lane * slots + gone, -1)
            next_free = tl.minimum(next_free, gone)
            if TURN:
                for start in range(0, slots, BN):
                    each_place = start + tl.arange(0, BN)
                    within = each_place < slots
                    held_at = lane * slots + each_place
                    older = tl.load(positions + held_at, mask=within, other=-1)
                    moved = tl.load(shifts + held_at, mask=within, other=0)
                    moved += ((older >= 0) & (older < first_age)).to(tl.int32)
                    tl.store(shifts + held_at, moved, mask=within)
        tl.store(free + lane, next_free)
        if last_lane(tickets, batch, hkv):
            tl.store(age + batch, now)
            tl.store(count + batch, held - over.to(tl.int32))


def refuses(step: SlotStep) -> tuple[str, ...]:
    """Why this form cannot take a call; empty when it can."""
    query, slots = step.query, step.slots
    d, dv, share = query.shape[3], slots.values.shape[3], query.shape[1] // slots.keys.shape[1]
    found = []
    if max(d, dv) > 256 or share > 16:
        found.append(f"triton: {share} query heads to a key head of width {d} (value {dv})")
    if slots.size > 1024 * BLOCK:
        found.append(f"triton: {slots.size} slots")
    if len({t.dtype for t in (query, slots.keys, slots.values)}) > 1:
        found.append("triton: several dtypes")
    return tuple(found)


def plan(slots: FixedSlots, share: int) -> dict[str, int]:
    """Numbers of the first launch that depend on shapes alone."""
    b, hkv, size, d = slots.keys.shape
    wanted = max(1, min(triton.cdiv(PROGRAMS, b * hkv), CLUSTER * MOST, triton.cdiv(size, SHARE)))
    each = triton.cdiv(triton.cdiv(size, wanted), SHARE) * SHARE
    parts = triton.cdiv(size, each)
    power = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
    return {
        "parts": parts,
        "share": each,
        "clusters": triton.cdiv(parts, CLUSTER),
        "BR": 8 if share <= 8 else 16,
        # Keys that are turned come twice, and the tables with them.
        "BN": 64 if slots.keys.dtype.itemsize == 2 and slots.shifts is None else 32,
        "BD": power(d),
        "BV": power(slots.values.shape[3]),
    }


def decode(step: SlotStep) -> Tensor:
    """See ``api.slot_decode``."""
    query, key, value, slots, rule, terms, real, turn = step
    s, (b, h, _, d) = slots, query.shape
    hkv, size, dv = s.keys.shape[1], s.size, s.values.shape[3]
    r = h // hkv
    numbers = plan(s, r)
    parts = numbers["parts"]
    blocks = triton.cdiv(size, BLOCK)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    none = query = query.contiguous()
    shifts, (near, far, partner) = s.positions if turn is None else s.shifts, turn or (none, none, none)
    there = none if real is None else real.view(torch.uint8)
    lse, out = made(b, h), made(b, h, 1, dv, dtype=query.dtype)
    score = SCORES.index(rule.score)
    scored = score in (SUM, LAST)
    logits = made(b, h, size) if scored else lse
    _attend[(b * hkv, parts)](
        query, key.contiguous(), value.contiguous(), s.keys, s.values, s.positions, s.free, s.age, there,
        none if terms.sink_logits is None else terms.sink_logits, shifts, near, far, partner, s.tickets,
        logits, made(b * hkv, parts, r, dv), made(b * hkv, parts, r), out, lse,
        hkv, r, size, parts, numbers["share"], numbers["clusters"], terms.scale, terms.softcap or 1.0,
        D=d, DV=dv, EXACT=query.dtype == torch.float32, REAL=real is not None, SINKS=terms.sink_logits is not None,
        LOGITS=scored, CAP=terms.softcap is not None, TURN=turn is not None, NEAR=NEAR,
        **{n: numbers[n] for n in ("BR", "BN", "BD", "BV")},
    )  # fmt: skip
    runs = 0 if s.never is None else s.never.shape[1]
    _settle[(b * hkv, blocks)](
        logits, lse, s.positions, s.positions if s.scores is None else s.scores, shifts,
        s.positions if s.lots is None else s.lots, s.free, s.age, s.count, s.limit,
        s.recent, s.positions if s.never is None else s.never, there, s.tickets,
        made(b * hkv, blocks, dtype=torch.float64 if score == DRAWN else torch.float32),
        made(b * hkv, blocks, 3, dtype=torch.int32), hkv, r, size, blocks, runs,
        SCORE=score, GQA=GROUPS.index(rule.gqa), SHARED=rule.shared, NORMALISE=rule.normalise,
        REAL=real is not None, TURN=turn is not None, BN=min(BLOCK, triton.next_power_of_2(size)),
        BB=triton.next_power_of_2(blocks),
    )  # fmt: skip
    return out
