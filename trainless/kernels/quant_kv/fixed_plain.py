"""A decode step on packed buffers of fixed size, and packing one more group, in torch.

No shape depends on data. On the CPU the counters are read to leave out groups that no row has yet, and steps in which
none is packed; elsewhere nothing is read, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..common import Terms, statistics_dtype
from . import blocked, rows
from .api import _products
from .fixed import FixedPacked, Stepping
from .format import quantise


def decode(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    sections: Sequence[FixedPacked],
    terms: Terms,
    how: Stepping,
) -> tuple[Tensor, Tensor]:
    """Put a token into the ring of the first buffers and attend to it and to the codes of all: output, log-sum-exp."""
    first = sections[0]
    if key is not None and value is not None:
        append(key, value, first, how.real)
        if how.aged is not None:
            how.aged.add_(1 if how.real is None else how.real)
    on_cpu = query.device.type == "cpu"
    segments, seen = [], []
    for number, section in enumerate(sections):
        held = section.holds()[:, None]
        valid = how.valid[number] if how.valid else None
        held = (held if valid is None else held & valid).expand(-1, section.key.shape[1], -1)
        own = section.segments(int(section.packed.max()) if on_cpu else None)
        # Nothing is ever put into the ring of the others.
        segments += own if number == 0 else own[:1]
        seen.append(held if number == 0 else held[..., : own[0].slots])
    involved = [query, *(t for section in sections for t in section.tensors().values())]
    form = _products(involved)[0] if on_cpu else cast(rows.Products, blocked)
    out, p, lse = rows.rows(query, segments, terms, torch.cat(seen, 2)[:, :, None], True, form)
    assert lse is not None
    if how.scores is not None:
        slots = first.slots
        start = slots - first.tail_key.shape[2] if how.ring_only else 0
        how.scores.copy_(p[:, :, 0, start:slots])
    return out, lse[..., 0]


def append(key: Tensor, value: Tensor, buffers: FixedPacked, real: Tensor | None = None) -> None:
    """One token into the ring of every row; real (B,) bool: rows whose token is no padding."""
    ring = buffers.tail_key.shape[2]
    at = (buffers.age.long() % ring)[:, None, None, None]
    for into, new in ((buffers.tail_key, key), (buffers.tail_value, value)):
        index = at.expand_as(new)
        if real is not None:
            new = torch.where(real[:, None, None, None], new, into.gather(2, index))
        into.scatter_(2, index, new)
    buffers.age.add_(1 if real is None else real)


def pack_group(buffers: FixedPacked, residual: Tensor) -> None:
    """See ``fixed_api.pack_group``."""
    size, groups, ring = buffers.size, buffers.key.shape[2], buffers.tail_key.shape[2]
    due = (buffers.age - buffers.packed >= residual + size) & (buffers.packed < groups * size)
    if due.device.type == "cpu" and not bool(due.any()):
        return  # as in all steps but one of a group
    place = (buffers.packed[:, None] + torch.arange(size, device=due.device)) % ring
    index = place[:, None, :, None].long()
    oldest = [
        t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3]))
        for t in (buffers.tail_key, buffers.tail_value)
    ]
    made = quantise(oldest[0][:, :, None], oldest[1][:, :, None], buffers.k_bits, buffers.v_bits)
    group = (buffers.packed // size).clamp_max(groups - 1).long()
    for name, new in made.tensors().items():
        put(getattr(buffers, name), new, group, due)
    buffers.packed.add_(due * size)


def put(into: Tensor, new: Tensor, group: Tensor, due: Tensor) -> None:
    """new (B, Hkv, 1, …) into group ``group`` (B,) of (B, Hkv, G, …), in the rows that are ``due`` (B,)."""
    ones = (1,) * (into.dim() - 1)
    at = group.view(-1, *ones).expand_as(new)
    into.scatter_(2, at, torch.where(due.view(-1, *ones), new.to(into.dtype), into.gather(2, at)))


def probabilities_dtype(query: Tensor) -> torch.dtype:
    """Of the scores that ``decode`` writes."""
    return statistics_dtype(query)
