"""The edited output as a mix of two: the attention that is there, and attention without the source keys.

With w the sum of a row (1, less under learned sinks), o its output and o_R the attention over all keys but
the source, normalised among themselves, keeping ``keep`` of the source and scaling the others up is

    o' = keep·o + w·(1 - keep)·o_R,

because o = s·o_S + (w - s)·o_R whatever the share s of the source. Nothing is divided by w - s, so rows that
have nearly everything on the source are as accurate as any other, in every dtype. The price is one more
attention call over the heads in question, or over the rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..common import BLOCK, Terms, shared_logits, statistics_dtype
from ..lse.blocked import _flash, fused, fused_reasons
from ..visibility import Visibility


def possible(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, terms: Terms) -> bool:
    """Whether the fused operator can leave the source out of this call; if not, ``edit_rows`` can."""
    return terms.plain and seen.structured and not fused_reasons(query, key, value, terms)


def edit_from(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new: Tensor,
    lse: Tensor,
    *,
    start: Tensor,
    source: Tensor,
    keep: Tensor,
    active: Tensor | None,
    heads: list[int],
    seen: Visibility,
    terms: Terms,
) -> None:
    """Edit the rows of ``new`` from ``start`` (B, h) on, in place; a start of Lq leaves the head alone.

    source (B, h, Lk), keep (B, h, Lq), active (B, h, Lq) or None; ``heads`` says which query heads h counts.
    """
    share, lq = query.shape[1] // key.shape[1], query.shape[2]
    for batch, first in _groups(start, lq):
        members = (start[batch] == first).nonzero()[:, 0]
        at = torch.as_tensor([heads[n] for n in members.tolist()], device=query.device)
        of = at // share
        rest, total = _without(
            query[batch, at, first:], key[batch, of], value[batch, of], source[batch, members],
            seen.row_of_batch(batch), first, terms.scale,
        )  # fmt: skip
        part, k = new[batch, at, first:], keep[batch, members, first:]
        mixed = mix(part, rest, k, total_mass(lse[batch, at, first:].to(total.dtype)[None], terms, at))
        receives = ~torch.isneginf(total) & (k != 1)
        receives = receives if active is None else receives & active[batch, members, first:]
        new[batch, at, first:] = torch.where(receives[..., None], mixed.to(new.dtype), part)


def _groups(start: Tensor, lq: int) -> list[tuple[int, int]]:
    """Batch row and start of heads that can be done in one call."""
    return sorted({(batch, first) for batch, row in enumerate(start.tolist()) for first in row if first < lq})


def mix(out: Tensor, rest: Tensor, keep: Tensor, mass: Tensor | float) -> Tensor:
    """keep·out + mass·(1 - keep)·rest, in the dtype of ``keep``; out and rest (…, rows, Dv), keep (…, rows)."""
    given = (1 - keep) * mass
    given = given if given.dim() == keep.dim() else given[0]
    return torch.addcmul(out.to(keep.dtype) * keep[..., None], rest.to(keep.dtype), given[..., None])


def total_mass(lse: Tensor, terms: Terms, heads: Tensor | None) -> Tensor | float:
    """Probability of all keys together, per row of lse (B, h, rows): what a learned sink leaves."""
    if terms.sink_logits is None:
        return 1.0
    sink = terms.sink_logits.to(lse.dtype)
    held = torch.exp((sink if heads is None else sink[heads]).view(1, -1, 1) - lse)
    return 1 - held.masked_fill(torch.isneginf(lse), 0)


def splits(seen: Visibility) -> bool:
    """Whether rows from any one on can be done without the earlier ones."""
    return seen.window is None and (not seen.causal or seen.offset >= 0)


def _without(
    query: Tensor, key: Tensor, value: Tensor, source: Tensor, seen: Visibility, first: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of the rows from ``first`` on over all keys but the source, head by head.

    query (h, rows, D), key and value (h, Lk, D), source (h, Lk). Returns out (h, rows, D) and lse (h, rows),
    zeros and -inf where no key is left.
    """
    h, n, _ = query.shape
    lk = key.shape[1]
    if not splits(seen):
        assert first == 0
        parts = []
        for i in range(h):  # the mask differs from row to row: memory for one head's blocks at a time
            one = replace(seen, dense=~source[None, i : i + 1, None].expand(-1, -1, n, -1))
            call = (query[None, i : i + 1], key[None, i : i + 1], value[None, i : i + 1])
            parts.append(fused(*call, visibility=one, terms=Terms(scale)))
        return torch.cat([o[0] for o, _ in parts]), torch.cat([total[0] for _, total in parts])
    hidden = source if seen.keys is None else source | ~seen.keys
    # What lies before the first row is seen by all of them; then comes a square in causal order.
    edge = seen.offset + first if seen.causal else lk
    found = [
        _part(query, key[:, lo:hi], value[:, lo:hi], hidden[:, lo:hi], causal, scale)
        for lo, hi, causal in ((0, edge, False), (edge, lk, True))
        if hi > lo and not bool(hidden[:, lo:hi].all())
    ]
    if not found:
        return torch.zeros_like(query), torch.full_like(
            query[..., 0], -torch.inf, dtype=statistics_dtype(query)
        )
    if len(found) == 1:
        return found[0]
    (out, lse), (other, weight) = found
    total = torch.logaddexp(lse, weight)
    held, added = (torch.exp(x - total).nan_to_num(0.0)[..., None] for x in (lse, weight))
    return out * held + other * added, total


def _part(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """One fused call; hidden (h, keys). Rows that see nothing: zeros and -inf."""
    mask = torch.zeros(1, *hidden.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(hidden[None], -torch.inf)[:, :, None]
    out, lse = _flash(query[None], key[None], value[None], 0.0, causal, attn_mask=mask, scale=scale)
    none = hidden.long().cumprod(1).bool()  # True up to the first key that is not hidden
    none = none if causal else none[:, -1:].expand(-1, query.shape[1])
    return out[0].masked_fill(none[..., None], 0), lse[0].masked_fill(none, -torch.inf)


def edit_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new: Tensor,
    lse: Tensor,
    *,
    hard: Tensor,
    source: Tensor,
    keep: Tensor,
    heads: list[int],
    seen: Visibility,
    terms: Terms,
) -> None:
    """Edit the rows of ``new`` that ``hard`` (B, h, Lq) marks, in place, from their own logits."""
    wide, share = statistics_dtype(query), query.shape[1] // key.shape[1]
    step = max(1, BLOCK // key.shape[2])
    for batch, n in hard.any(-1).nonzero().tolist():
        head = heads[n]
        one = torch.tensor([head], device=query.device)
        keys, values = key[batch, head // share].to(wide), value[batch, head // share].to(wide)
        part, bias = seen.row_of_batch(batch), terms.position_bias
        own = terms if bias is None or bias.shape[0] == 1 else replace(terms, position_bias=bias[batch][None])
        for rows in hard[batch, n].nonzero()[:, 0].split(step):
            hi = part.span(int(rows[0]), int(rows[-1]) + 1)[1]
            z = (query[batch, head, rows].to(wide) @ keys[:hi].t()).mul_(terms.scale)
            z = shared_logits(z[None, None], own, part, one, rows, 0, hi)[0, 0]
            z.masked_fill_(source[batch, n, :hi], -torch.inf)
            receives = ~torch.isneginf(z.amax(-1, keepdim=True))
            rest = torch.softmax(z, -1).masked_fill_(~receives, 0) @ values[:hi]
            mass = total_mass(lse[batch, head : head + 1, rows].to(wide)[None], terms, one)
            mass = mass if isinstance(mass, float) else mass[0, 0]
            before = new[batch, head, rows]
            edited = mix(before, rest, keep[batch, n, rows], mass)
            new[batch, head, rows] = torch.where(receives, edited.to(new.dtype), before)
