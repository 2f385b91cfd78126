"""Listed blocks under causality alone, in calls over all blocks of queries whose lists are equally long.

A call of its own for each block of queries costs more than what it computes. So the blocks of keys before a block of
queries, which all its rows see whole, are gathered for many of them at once, those with lists of one length together, a
cache's worth at a time; each block's own keys are one causal call for all; the log-sum-exp of the two puts them together.
Heads of a group that name the same blocks are rows of one call, so that keys and values are gathered once for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import BLOCK, Terms, statistics_dtype
from ..lse.api import attention
from ..visibility import Visibility
from .patterns import Blocks


def by_length(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Blocks,
    batch: int,
    seen: Visibility,
    terms: Terms,
) -> None:
    """One row of the batch, written into ``out`` (1, H, Lq, Dv); keys before the first query are whole blocks."""
    (_, h, lq, d), hkv, size = query.shape, key.shape[1], pattern.size
    listed, shift = _lanes(pattern, batch, h, hkv), seen.offset // size
    lanes, count = listed.shape[:2]
    own = torch.arange(count, device=listed.device)[:, None] + shift
    before = (listed >= 0) & (listed < own)
    lengths = before.sum(2)
    order = (
        torch.where(before, listed, pattern.size * key.shape[2]).sort(2).values
    )  # those before stand first
    missing = count * size - lq
    q, k, v = (F.pad(t[0], (0, 0, 0, missing)) if missing else t[0] for t in (query, key, value))
    blocks = q.unflatten(1, (count, size))  # (h, blocks, size, d)
    keys, values = (t.unflatten(1, (-1, size)) for t in (k, v))
    near, near_lse = _attend(
        blocks.transpose(0, 1),
        keys[:, shift:].transpose(0, 1),
        values[:, shift:].transpose(0, 1),
        terms,
        causal=True,
    )
    near, near_lse = near.transpose(0, 1), near_lse.transpose(0, 1)  # (h, blocks, size, …)
    stands = (listed == own).any(2).repeat_interleave(h // lanes, 0)
    if not bool(stands.all()):
        near_lse = near_lse.masked_fill(~stands[..., None], -torch.inf)
    # Rows of one call: a block's tokens of all heads of a lane.
    rows = blocks.unflatten(0, (lanes, h // lanes)).transpose(1, 2).flatten(2, 3)
    wide = statistics_dtype(query)
    far = torch.zeros(lanes, count, rows.shape[2], value.shape[3], dtype=wide, device=query.device)
    far_lse = torch.full(rows.shape[:3], -torch.inf, dtype=wide, device=query.device)
    for length in torch.unique(lengths).tolist():
        if not length:
            continue
        lane, block = (lengths == length).nonzero(as_tuple=True)
        step = max(1, BLOCK // (length * size * d))
        for some, at in zip(lane.split(step), block.split(step), strict=True):
            of = (some // (lanes // hkv))[:, None], order[some, at, :length]
            k, v = (t[of].flatten(1, 2)[:, None] for t in (keys, values))
            part, lse = _attend(rows[some, at][:, None], k, v, terms, causal=False)
            far[some, at], far_lse[some, at] = part[:, 0].to(wide), lse[:, 0]
    far = far.unflatten(2, (h // lanes, size)).transpose(1, 2).flatten(0, 1)
    far_lse = far_lse.unflatten(2, (h // lanes, size)).transpose(1, 2).flatten(0, 1)
    whole = torch.logaddexp(near_lse, far_lse)
    if terms.sink_logits is not None:
        blind = torch.isneginf(whole)
        whole = torch.logaddexp(whole, terms.sink_logits.to(whole.dtype).view(-1, 1, 1)).masked_fill(
            blind, -torch.inf
        )
    base = whole.masked_fill(torch.isneginf(whole), 0)[..., None]
    far = far.mul_(torch.exp(far_lse[..., None] - base)).addcmul_(near, torch.exp(near_lse[..., None] - base))
    out[0] = far.flatten(1, 2)[:, :lq].to(out.dtype)


def _lanes(pattern: Blocks, batch: int, h: int, hkv: int) -> Tensor:
    """(lanes, blocks, n): lists that differ from each other; a lane is one query head, or the heads of one key head."""
    listed = pattern.index[batch if pattern.index.shape[0] > 1 else 0]
    if listed.shape[0] == 1:
        return listed.expand(hkv, -1, -1)
    groups = listed.unflatten(0, (hkv, h // hkv))
    return groups[:, 0] if bool((groups == groups[:, :1]).all()) else listed


def _attend(query: Tensor, key: Tensor, value: Tensor, terms: Terms, causal: bool) -> tuple[Tensor, Tensor]:
    seen = Visibility(query.shape[2], key.shape[2], query.device, causal=causal)
    return attention(query, key, value, visibility=seen, scale=terms.scale)
