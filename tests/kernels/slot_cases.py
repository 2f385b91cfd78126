"""Fixed slots in some state, and a step of them; shared by the tests of every form."""

from __future__ import annotations

import torch

from trainless.kernels.draws import lots
from trainless.kernels.slots import ADDED, FixedSlots, SlotRule, fixed_slots
from trainless.kernels.turning import NEAR, Turn

RULES = {
    "oldest": SlotRule(),
    "sum": SlotRule("sum"),
    "sum-max-normalised": SlotRule("sum", gqa="max", normalise=True),
    "sum-first": SlotRule("sum", gqa="first"),
    "last-mean": SlotRule("last", gqa="mean"),
    "last-shared": SlotRule("last", gqa="mean", shared=True),
    "draw": SlotRule("draw"),
}
# (B, H, Hkv, slots, held, D): one lane, a group of heads, rows of different lengths, a slot for one token only
SHAPES = [(2, 4, 2, 13, 12, 16), (1, 6, 2, 40, 20, 24), (1, 1, 1, 2, 1, 8)]


def make(shape, rule: SlotRule, dtype=torch.float64, never=None, short=False, turned=False) -> FixedSlots:
    """Slots whose rows may hold up to ``held`` tokens; ``short``: the last row holds fewer as yet."""
    b, _, hkv, size, held, d = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keys, values = (torch.randn(b, hkv, held, d, dtype=torch.float64).to(dtype) for _ in range(2))
    positions = torch.arange(3, 3 + held).expand(b, hkv, held).clone()
    if short and b > 1:
        positions[-1, :, : held // 2] = -1
    limit = torch.full((b,), held)
    scores = None
    if rule.score in ADDED:
        scores = torch.rand(b, hkv if not rule.shared else 1, held).expand(b, hkv, held).to(wide).clone()
        scores[..., held // 3 : held // 3 * 2] = 0.0  # equal ones, of which the oldest goes
    return fixed_slots(
        keys, values, positions, size, age=torch.full((b,), 3 + held), limit=limit, recent=min(3, held),
        scores=scores, never=never, shifts=_gone(positions, 3 + held) if turned else None,
        lots=lots(1 << 70, torch.arange(hkv)) if rule.score == "draw" else None,
    )  # fmt: skip


def _gone(positions, age):
    """(B, Hkv, W): how many tokens went between each and the newest."""
    there = positions >= 0
    newer = (there[..., None, :] & (positions[..., None, :] > positions[..., :, None])).sum(3)
    return ((age - 1 - positions - newer) * there).to(torch.int32)


def turn(d, reach=4):
    """Turns of pairs of channels by angles of each pair's own; the last two channels do not turn where there are many."""
    still = 2 if d > 8 else 0
    half = (d - still) // 2
    angle = torch.rand(half, dtype=torch.float64)
    distances = torch.arange(NEAR), torch.arange(reach) * NEAR
    partner = torch.cat([torch.arange(half, 2 * half), torch.arange(half), torch.arange(2 * half, d)])
    tables = []
    for each in distances:
        far = each[:, None] * angle
        one, none = torch.ones(len(each), still), torch.zeros(len(each), still)
        cos, sin = torch.cat([far.cos(), far.cos(), one], 1), torch.cat([-far.sin(), far.sin(), none], 1)
        tables.append(torch.stack([cos, sin], 1).float())
    return Turn(*tables, partner.to(torch.int32))


def token(shape, dtype=torch.float64):
    """(query, key, value) of one token."""
    b, h, hkv, _, _, d = shape
    sizes = (h, hkv, hkv)
    return tuple(torch.randn(b, n, 1, d, dtype=torch.float64).to(dtype) for n in sizes)


def copied(slots: FixedSlots, dtype=None) -> FixedSlots:
    """The same state in memory of its own; floating-point tensors in another dtype if one is given."""
    change = lambda t: t.clone() if dtype is None or not t.is_floating_point() else t.to(dtype)  # noqa: E731
    return FixedSlots(**{name: change(t).clone() for name, t in slots.tensors().items()})
