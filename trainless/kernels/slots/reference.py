"""The meaning of a decode step over fixed slots, row by row and head by head; for tests, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..draws import drawn
from .state import FixedSlots, SlotRule, SlotStep


def decode(step: SlotStep) -> Tensor:
    """See ``api.slot_decode``; the buffers are written."""
    query, key, value, slots, rule, terms, real, turn = step
    b, h = query.shape[:2]
    hkv, size = slots.keys.shape[1:3]
    out = query.new_zeros(b, h, 1, value.shape[3])
    for row in range(b):
        there = real is None or bool(real[row])
        mass = torch.zeros(h, size, dtype=query.dtype)
        for head in range(h):
            group = head // (h // hkv)
            if head % (h // hkv) == 0:
                _write(key, value, slots, row, group, there)
            held = (slots.positions[row, group] >= 0).nonzero()[:, 0]
            keys = slots.keys[row, group]
            if turn is not None:
                keys = turn(keys[None, None], _moved(slots, row, group)[None, None])[0, 0]
            z = keys[held] @ query[row, head, 0] * terms.scale
            if terms.softcap is not None:
                z = terms.softcap * torch.tanh(z / terms.softcap)
            if len(held):
                sink = [] if terms.sink_logits is None else [terms.sink_logits[head].to(z.dtype)]
                total = torch.logsumexp(torch.cat([z, *(s[None] for s in sink)]), 0)
                mass[head, held] = torch.exp(z - total)
            out[row, head, 0] = mass[head] @ slots.values[row, group]
        slots.age[row] += int(there)
        slots.count[row] += int(there)
        over = int(slots.count[row]) > min(int(slots.limit[row]), size - 1)
        for group in range(hkv):
            own = mass if rule.shared else mass[group * (h // hkv) : (group + 1) * (h // hkv)]
            _score(own, slots, rule, row, group, there)
            if over:
                slots.positions[row, group, _victim(slots, rule, row, group)] = -1
            if slots.shifts is not None:
                slots.shifts[row, group] = _moved(slots, row, group, int(over))
            slots.free[row, group] = int((slots.positions[row, group] < 0).nonzero()[0, 0])
        slots.count[row] -= int(over)
    return out


def _moved(slots: FixedSlots, row: int, head: int, gone: int = 0) -> Tensor:
    """(S,): how many tokens went between each kept one and the newest; gone: of those not yet off the count."""
    positions = slots.positions[row, head]
    missing = int(slots.age[row]) - int(slots.count[row]) + gone
    moved = [
        missing - (p - int(((positions >= 0) & (positions < p)).sum())) if p >= 0 else 0
        for p in positions.tolist()
    ]
    return torch.tensor(moved)


def _write(key: Tensor, value: Tensor, slots: FixedSlots, row: int, head: int, there: bool) -> None:
    at = int(slots.free[row, head])
    slots.keys[row, head, at], slots.values[row, head, at] = key[row, head, 0], value[row, head, 0]
    slots.positions[row, head, at] = slots.age[row] if there else -1
    if slots.scores is not None:
        slots.scores[row, head, at] = 0


def _score(mass: Tensor, slots: FixedSlots, rule: SlotRule, row: int, head: int, there: bool) -> None:
    if slots.scores is None or rule.score is None:
        return
    ways = {"sum": mass.sum(0), "mean": mass.mean(0), "max": mass.amax(0), "first": mass[0]}
    found = (mass.mean(0) if rule.shared else ways[rule.gqa]) * there
    held = slots.scores[row, head]
    slots.scores[row, head] = held + found if rule.score == "sum" else found


def _victim(slots: FixedSlots, rule: SlotRule, row: int, head: int) -> int:
    age = int(slots.age[row])
    best, worst = -1, (math.inf, math.inf)
    for slot, position in enumerate(slots.positions[row, head].tolist()):
        if position < 0 or position >= age - max(1, int(slots.recent[row])):
            continue
        if slots.never is not None and any(a <= position < z for a, z in slots.never[row].tolist()):
            continue
        worth = 0.0 if slots.scores is None else float(slots.scores[row, head, slot])
        if slots.lots is not None:
            worth = float(drawn(slots.lots[row, head], slots.positions[row, head, slot]))
        if rule.normalise:
            worth /= age - position
        if (worth, position) < worst:
            best, worst = slot, (worth, position)
    return best
