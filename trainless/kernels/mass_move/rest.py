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


def edit_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new: Tensor,
    lse: Tensor,
    *,
    pairs: Tensor,
    source: Tensor,
    keep: Tensor,
    active: Tensor | None,
    heads: list[int],
    seen: Visibility,
    terms: Terms,
) -> None:
    """Edit all rows of the heads of ``new`` that ``pairs`` (B, h) marks, in place.

    source (B, h, Lk), keep (B, h, Lq), active (B, h, Lq) or None; ``heads`` says which query heads h counts.
    """
    share = query.shape[1] // key.shape[1]
    for batch in pairs.any(1).nonzero()[:, 0].tolist():
        members = pairs[batch].nonzero()[:, 0]
        at = torch.as_tensor([heads[n] for n in members.tolist()], device=query.device)
        of = at // share
        rest, total = _without(
            query[batch, at], key[batch, of], value[batch, of], source[batch, members],
            seen.row_of_batch(batch), terms,
        )  # fmt: skip
        part, k = new[batch, at], keep[batch, members]
        own = lse[batch, at].to(total.dtype)
        mixed = mix(part, rest, k, total_mass(own[None], terms, at))
        receives = ~torch.isneginf(total) & (k != 1)
        receives = receives if active is None else receives & active[batch, members]
        new[batch, at] = torch.where(receives[..., None], mixed.to(new.dtype), part)


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


def _without(
    query: Tensor, key: Tensor, value: Tensor, source: Tensor, seen: Visibility, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Attention over all keys but the source, per head (h, L, D): output, and lse (h, Lq), -inf if none is left."""
    h, lq, _ = query.shape
    lk = key.shape[1]
    query, key, value = query[None], key[None], value[None]
    if seen.window is None and (not seen.causal or lq == lk):
        hidden = source if seen.keys is None else source | ~seen.keys
        mask = torch.zeros(1, h, 1, lk, dtype=query.dtype, device=query.device)
        mask.masked_fill_(hidden[None, :, None], -torch.inf)
        out, lse = _flash(query, key, value, 0.0, seen.causal, attn_mask=mask, scale=terms.scale)
        return out[0], lse[0].masked_fill(_blind(hidden, lq, seen.causal), -torch.inf)
    parts = []
    for n in range(h):  # a mask that differs from row to row: one head's blocks at a time are enough memory
        one = replace(seen, dense=~source[None, n : n + 1, None].expand(-1, -1, lq, -1))
        parts.append(
            fused(*(t[:, n : n + 1] for t in (query, key, value)), visibility=one, terms=Terms(terms.scale))
        )
    return torch.cat([o[0] for o, _ in parts]), torch.cat([total[0] for _, total in parts])


def _blind(hidden: Tensor, lq: int, causal: bool) -> Tensor:
    """bool (h, Lq): rows for which every key that causal order leaves is hidden."""
    none = hidden.long().cumprod(1).bool()  # True up to the first key that is not hidden
    return none if causal else none[:, -1:].expand(-1, lq)


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
