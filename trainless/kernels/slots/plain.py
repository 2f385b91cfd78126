"""A decode step over fixed slots in torch: no shape depends on data and no value is read, so it traces whole.

``decode`` is ``write``, ``attend`` and ``settle`` one after the other; a caller whose attention comes from elsewhere
takes the first and the last of them. All of them write into the buffers that they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms, statistics_dtype
from ..draws import drawn
from ..lse import widened_product
from ..turning import Turn
from .state import ADDED, FixedSlots, SlotRule, SlotStep

FAR = torch.iinfo(torch.int32).max  # beyond any position


def decode(step: SlotStep) -> Tensor:
    """See ``api.slot_decode``."""
    query, key, value, slots, rule, terms, real, turn = step
    write(key, value, slots, real)
    out, p = attend(query, slots, terms, turn)
    settle(p, slots, rule, real)
    return out


def write(key: Tensor, value: Tensor, slots: FixedSlots, real: Tensor | None = None) -> None:
    """Put one token, key (B, Hkv, 1, D) and value (B, Hkv, 1, Dv), into the free slot of every row and head.

    real (B,) bool: rows whose token is no padding; a padding's slot stays empty.
    """
    at = slots.free.long()[..., None]
    slots.keys.scatter_(2, at[..., None].expand(*at.shape, key.shape[3]), key)
    slots.values.scatter_(2, at[..., None].expand(*at.shape, value.shape[3]), value)
    new = slots.age if real is None else torch.where(real, slots.age, -1)
    slots.positions.scatter_(2, at, new[:, None, None].expand_as(at))
    if slots.scores is not None:
        slots.scores.scatter_(2, at, 0.0)
    if slots.shifts is not None:
        slots.shifts.scatter_(2, at, 0)


def attend(query: Tensor, slots: FixedSlots, terms: Terms, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    """Output (B, H, 1, Dv) in the dtype of the query, and probabilities (B, H, S) in float32 at least.

    A row without tokens gives zeros. ``terms`` may hold a soft-cap and learned sinks, and no bias.
    """
    b, h, _, d = query.shape
    hkv, size = slots.keys.shape[1:3]
    n, wide = b * hkv, statistics_dtype(query)
    # The scale is put into the few numbers of the query, not into the logits of every slot.
    q = query.reshape(n, h // hkv, d).to(wide) * terms.scale
    keys = slots.keys
    if turn is not None:
        assert slots.shifts is not None
        keys = turn(keys, slots.shifts)
    z = widened_product(q, keys.view(n, size, d).transpose(1, 2))
    if terms.softcap is not None:
        z = torch.tanh(z / terms.softcap) * terms.softcap
    z = z.masked_fill((slots.positions < 0).view(n, 1, size), -torch.inf)
    if terms.sink_logits is not None:
        sink = terms.sink_logits.to(wide).view(1, h, 1).expand(b, h, 1).reshape(n, -1, 1)
        p = torch.softmax(torch.cat([z, sink], 2), 2)[..., :-1]
    else:
        p = torch.softmax(z, 2).nan_to_num(0.0)
    out = widened_product(p, slots.values.view(n, size, -1))
    return out.view(b, h, 1, -1).to(query.dtype), p.view(b, h, size)


def settle(p: Tensor, slots: FixedSlots, rule: SlotRule, real: Tensor | None = None) -> None:
    """Bring the scores up to date with probabilities p (B, H, S), and evict one token from rows over their limit."""
    s = slots
    age, count = (s.age + 1, s.count + 1) if real is None else (s.age + real, s.count + real)
    if s.scores is not None and rule.score in ADDED:
        mass = grouped(p, s.positions.shape[1], rule)
        if real is not None:
            mass = mass * real[:, None, None]
        s.scores.add_(mass) if rule.score == "sum" else s.scores.copy_(mass)
    over = count > s.limit.clamp_max(s.size - 1)
    barred = (s.positions < 0) | (s.positions >= (age - s.recent.clamp_min(1))[:, None, None])
    if s.never is not None:
        place, runs = s.positions[..., None], s.never[:, None, None]
        barred = barred | ((place >= runs[..., 0]) & (place < runs[..., 1])).any(3)
    candidates = s.positions.masked_fill(barred, FAR)
    worth = s.scores
    if s.lots is not None:
        worth = drawn(s.lots[..., None], s.positions)
    if worth is not None:
        if rule.normalise:
            worth = worth / (age[:, None, None] - s.positions).clamp_min(1)
        worth = worth.masked_fill(barred, torch.inf)
        # Among equals the older one goes.
        candidates = candidates.masked_fill(worth != worth.amin(2, keepdim=True), FAR)
    victim = candidates.argmin(2, keepdim=True)
    went = s.positions.gather(2, victim)
    s.positions.scatter_(2, victim, went.masked_fill(over[:, None, None], -1))
    if s.shifts is not None:
        older = (s.positions >= 0) & (s.positions < went) & over[:, None, None]
        s.shifts.add_(older)
    s.free.copy_((s.positions < 0).int().argmax(2))
    s.age.copy_(age)
    s.count.copy_(count - over.int())


def grouped(p: Tensor, hkv: int, rule: SlotRule) -> Tensor:
    """(B, H, S) of query heads to (B, Hkv, S), as the rule says."""
    b, _, size = p.shape
    if rule.shared:
        return p.mean(1, keepdim=True).expand(b, hkv, size)
    groups = p.view(b, hkv, -1, size)
    if rule.gqa == "sum":
        return groups.sum(2)
    if rule.gqa == "mean":
        return groups.mean(2)
    return groups.amax(2) if rule.gqa == "max" else groups[:, :, 0]
