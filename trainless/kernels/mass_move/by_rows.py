"""``mass_move`` between two named groups in some rows: their probabilities once more, a few rows at a time.

Where the receiving group is named it may be most of the keys (the tokens of an image), and only some rows are
edited (text that looks at it). Then whole rows are cheaper than columns, and nothing is gathered:

    p' = keep·p on the source,  p·(1 + (1 - keep)·s / t) on the target,  p elsewhere,   o' = p' V,

with s and t what source and target have. Nothing is taken from the output that is there, so its rounding does
not matter; a target whose probability is too small to divide by shares by its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import BLOCK, Terms, head_groups
from ..group_mass.blocked import row_logits, row_weights, terms_of_batch
from ..visibility import Visibility

SMALL = 1e-18  # a target with less than this is shared out by its logits


def edit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new: Tensor,
    lse: Tensor,
    *,
    source: Tensor,
    keep: Tensor,
    target: Tensor,
    active: Tensor,
    heads: list[int],
    seen: Visibility,
    terms: Terms,
) -> None:
    """Edit the rows ``active`` (B, h, Lq) of ``heads`` of ``new`` in place; keep (B, h, Lq)."""
    h, hkv, wide, device = query.shape[1], key.shape[1], keep.dtype, query.device
    active = active & (keep != 1) & source.any(-1, keepdim=True) & target.any(-1, keepdim=True)
    for n in range(query.shape[0]):
        mine = active[n].any(-1).nonzero()[:, 0].tolist()
        # Key heads with equally many edited query heads go together.
        for of, picked in head_groups(h, hkv, [heads[i] for i in mine]):
            at = torch.as_tensor([heads.index(i) for i in picked], device=device)
            every, some = torch.as_tensor(picked, device=device), torch.as_tensor(of, device=device)
            whole = len(picked) == h
            q = query[n] if whole else query[n, every]
            keys, values = ((t[n] if len(of) == hkv else t[n, some]).to(wide) for t in (key, value))
            asked, part, own = active[n, at], seen.row_of_batch(n), terms_of_batch(terms, n)
            rows = asked.any(0).nonzero()[:, 0]
            for block in rows.split(max(1, BLOCK // (len(picked) * key.shape[2]))):
                _edit_block(
                    q, keys.transpose(-1, -2), values, new, lse[n, every][:, block], n, every, block,
                    source[n, at], target[n, at], keep[n, at][:, block], asked[:, block], part, own,
                )  # fmt: skip


def _edit_block(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new: Tensor,
    lse: Tensor,
    n: int,
    heads: Tensor,
    rows: Tensor,
    source: Tensor,
    target: Tensor,
    keep: Tensor,
    active: Tensor,
    seen: Visibility,
    terms: Terms,
) -> None:
    """Edit ``rows`` of some heads of batch row ``n``: query (h, Lq, D), source (h, Lk), keep, active, lse (h, rows)."""
    p, _ = row_weights(query, keys, rows, lse, seen, terms, heads)
    lo, hi = seen.span(int(rows[0]), int(rows[-1]) + 1)
    source, target = source[:, None, lo:hi], target[:, None, lo:hi]
    s, t = (p * source).sum(-1, keepdim=True), (p * target).sum(-1, keepdim=True)
    k = keep[..., None]
    small = (t < SMALL) & active[..., None]
    shares = p / t.clamp_min(SMALL)
    if bool(small.any()):
        z = row_logits(query, keys, rows, seen, terms, heads).masked_fill_(~target, -torch.inf)
        able = ~torch.isneginf(z.amax(-1, keepdim=True))
        active = active & (able | ~small)[..., 0]
        shares = torch.where(small, torch.softmax(z, -1).masked_fill_(~able, 0), shares)
    p = torch.where(source, p * k, torch.where(target, shares * (t + (1 - k) * s), p))
    grouped = p.view(values.shape[0], -1, hi - lo)
    edited = (grouped @ values[:, lo:hi]).view(*p.shape[:2], -1).to(new.dtype)
    # A row from which nothing is taken keeps its bits.
    active = active & (s > 0)[..., 0]
    at = (heads[:, None], rows[None])
    new[n][at] = torch.where(active[..., None], edited, new[n][at])
