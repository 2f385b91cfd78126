"""Softmax attention between two products over packed segments: what every form on torch tensors shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..common import Terms, statistics_dtype
from .format import Segment


class Products(Protocol):
    """The two products with codes; B batch, Hkv key heads, r query rows of a key head, K slots of all segments."""

    def logits(self, q: Tensor, segment: Segment, z: Tensor, start: int) -> None:
        """q (B, Hkv, r, D) times the keys of a segment into z (B, Hkv, r, K), from slot ``start`` on."""

    def values(self, p: Tensor, segment: Segment, start: int) -> Tensor:
        """p (B, Hkv, r, K), from slot ``start`` on, times the values of a segment: (B, Hkv, r, Dv)."""


def rows(
    query: Tensor,
    segments: Sequence[Segment],
    terms: Terms,
    valid: Tensor | None,
    lse: bool,
    form: Products,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``api.packed_rows``."""
    b, h, lq, d = query.shape
    hkv = segments[0].key.shape[1]
    wide = statistics_dtype(query)
    r = h // hkv * lq
    # The scale is put into the few numbers of the query, not into the logits of every slot.
    q = query.reshape(b, hkv, r, d).to(wide) * terms.scale
    z = q.new_empty(b, hkv, r, sum(s.slots for s in segments))
    start = 0
    for segment in segments:
        form.logits(q, segment, z, start)
        start += segment.slots
    z = _finish(z.view(b, h, lq, -1), terms, valid, hkv)
    sinks = terms.sink_logits
    total = torch.logsumexp(z, -1) if lse else None
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None, None].expand(b, h, lq, 1)
        p = torch.softmax(torch.cat([z, sink], -1), -1)[..., :-1]
        if total is not None:
            total = torch.where(total.isneginf(), total, torch.logaddexp(total, sink[..., 0]))
    else:
        p = torch.softmax(z, -1)
        if valid is not None:
            # Rows without a valid key. A backward pass reads what the softmax gave.
            p = p.nan_to_num(0.0) if p.requires_grad else p.nan_to_num_(0.0)
    return weigh(p, segments, form).to(query.dtype), p, total


def _finish(z: Tensor, terms: Terms, valid: Tensor | None, hkv: int) -> Tensor:
    if terms.softcap is not None:
        z = z.div_(terms.softcap).tanh_()
        z = z * terms.softcap if z.requires_grad else z.mul_(terms.softcap)
    if terms.position_bias is not None:
        z += terms.position_bias
    if valid is not None:
        b, h, lq, slots = z.shape
        grouped = z.view(b, hkv, h // hkv, lq, slots)
        seen = valid.unflatten(1, (hkv, -1)) if valid.shape[1] == h else valid[:, :, None]
        grouped.masked_fill_(~seen, -torch.inf)
    return z


def weigh(p: Tensor, segments: Sequence[Segment], form: Products) -> Tensor:
    """Probabilities (B, H, Lq, K) times packed values: (B, H, Lq, Dv) in the dtype of ``p``."""
    b, h, lq, _ = p.shape
    hkv = segments[0].value.shape[1]
    p = p.reshape(b, hkv, h // hkv * lq, -1)
    out, start = None, 0
    for segment in segments:
        part = form.values(p, segment, start)
        out = part if out is None else out + part
        start += segment.slots
    assert out is not None
    return out.view(b, h, lq, -1)
