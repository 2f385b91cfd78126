"""``group_mass`` in torch: the asked rows alone, a few at a time; every row of logits is read once and dropped."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..common import BLOCK, Terms, powers, shared_logits, statistics_dtype
from ..visibility import Visibility


def group_mass(
    query: Tensor,
    key: Tensor,
    *,
    groups: Tensor,
    count: int,
    rows: Tensor | None,
    lse: Tensor | None,
    visibility: Visibility,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """See ``api.group_mass``."""
    b, h, lq, _ = query.shape
    wide, device = statistics_dtype(query), query.device
    mass = torch.zeros(b, h, lq, count, dtype=wide, device=device)
    total = torch.full((b, h, lq), -torch.inf, dtype=wide, device=device)
    if 0 in (b, h, lq) or key.shape[2] == 0:
        return mass, total
    for n in range(b):
        asked = torch.arange(lq, device=device) if rows is None else rows[n].nonzero()[:, 0]
        if not len(asked):
            continue
        one = None if lse is None else lse[n]
        mass[n][:, asked], total[n][:, asked] = _of_one(
            query[n], key[n], members(groups[n], count, wide), asked, one, visibility.row_of_batch(n),
            terms_of_batch(terms, n),
        )  # fmt: skip
    return mass, total


def members(groups: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(1|Hkv, Lk) numbers of groups as (1|Hkv, Lk, count) ones and zeros."""
    return (groups[..., None] == torch.arange(1, count + 1, device=groups.device)).to(dtype)


def terms_of_batch(terms: Terms, n: int) -> Terms:
    bias = terms.position_bias
    return terms if bias is None or bias.shape[0] == 1 else replace(terms, position_bias=bias[n : n + 1])


def _of_one(
    query: Tensor, key: Tensor, of: Tensor, asked: Tensor, lse: Tensor | None, seen: Visibility, terms: Terms
) -> tuple[Tensor, Tensor]:
    """query (H, Lq, D), key (Hkv, Lk, D), of (1|Hkv, Lk, G): masses (H, n, G) and lse (H, n) of the rows asked."""
    h, lk, wide = query.shape[0], key.shape[1], of.dtype
    keys = key.to(wide).transpose(-1, -2)
    masses, totals = [], []
    for at in asked.split(max(1, BLOCK // (h * lk))):
        p, total = row_weights(query, keys, at, None if lse is None else lse[:, at], seen, terms)
        grouped = p.view(key.shape[0], -1, p.shape[-1])
        lo, hi = seen.span(int(at[0]), int(at[-1]) + 1)
        masses.append((grouped @ of[:, lo:hi]).view(h, len(at), of.shape[-1]))
        totals.append(total)
    return torch.cat(masses, 1), torch.cat(totals, 1)


def row_weights(
    query: Tensor,
    keys: Tensor,
    at: Tensor,
    lse: Tensor | None,
    seen: Visibility,
    terms: Terms,
    heads: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities (H, n, hi - lo) of the rows ``at`` (ascending) over the keys of their span, and lse (H, n).

    query (H, Lq, D); keys (Hkv, D, Lk) in the dtype of the statistics; ``seen`` has a batch of 1. A given
    lse (H, n) is what the logits are normalised by. heads: which query heads these are, None for all; then lse is
    given.
    """
    z = row_logits(query, keys, at, seen, terms, heads)
    if lse is None:
        total = torch.logsumexp(z, -1) if z.shape[-1] else z.new_full(z.shape[:2], -torch.inf)
        if terms.sink_logits is not None:
            sinks = terms.sink_logits.to(z.dtype).view(-1, 1)
            total = torch.where(torch.isneginf(total), total, torch.logaddexp(total, sinks))
    else:
        total = lse.to(z.dtype)
    blind = torch.isneginf(total)
    p = powers(z.sub_(total.masked_fill(blind, 0)[..., None]))
    return p.masked_fill_(blind[..., None], 0), total


def row_logits(
    query: Tensor, keys: Tensor, at: Tensor, seen: Visibility, terms: Terms, heads: Tensor | None
) -> Tensor:
    """Logits (H, n, hi - lo) behind ``row_weights``; -inf where a row does not see a key."""
    lo, hi = seen.span(int(at[0]), int(at[-1]) + 1)
    q = query[:, at].to(keys.dtype).reshape(keys.shape[0], -1, query.shape[-1])
    z = (q @ keys[..., lo:hi]).mul_(terms.scale).view(1, query.shape[0], len(at), hi - lo)
    return shared_logits(z, terms, seen, heads, at, lo, hi)[0]
