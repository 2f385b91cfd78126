"""``mass_move`` in torch: a correction of rank |source|, on top of the output that is already there.

With P the probabilities of the source keys, s their sum, w the sum over all keys (1, less under learned
sinks) and o the output, keeping ``keep`` of s and giving the rest to everyone else in proportion is

    o' = c·o + (keep - c)·P V_S,    c = (w - keep·s) / (w - s).

Only the source columns are ever looked at. c grows without bound as s approaches w, and with it the
rounding error that o carries already; rows where c passes a limit are computed again from their logits,
as keep·s·o^S + (w - keep·s)·o^R with both groups normalised on their own. That form also finds the rows
whose visible keys all are sources: nothing can receive there, so they stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..common import BLOCK, Terms, bias_block, key_heads_of, pick_heads, shared_logits, statistics_dtype
from ..visibility import Visibility

# c beyond which a row is computed again. o carries rounding errors, and c multiplies them: with 2 the result
# is as accurate as editing the probabilities in the same precision, with 8 it is six times worse (float32,
# root mean square). float64 has digits to spare. For keep = 0.4, c = 2 is a source mass of 0.625.
LIMIT = {torch.float64: 100.0, torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 2.0}


def mass_move(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    source: Tensor,
    keep: float | Tensor,
    target: Tensor | None,
    rows: Tensor | None,
    heads: list[int] | None,
    visibility: Visibility,
    terms: Terms,
) -> Tensor:
    """See ``api.mass_move``."""
    b, h, lq, d = query.shape
    if 0 in (b, lq, key.shape[2]) or source.shape[1] == 0:
        return out
    wide, device = statistics_dtype(query), query.device
    group = _Columns.gather(source, key, value, heads, h, wide)
    other = None if target is None else _Columns.gather(target, key, value, heads, h, wide)
    if group is None or (target is not None and other is None):
        return out
    new = out.clone()
    picked = None if heads is None else torch.as_tensor(heads, device=device)
    count = source.shape[1]
    widest = max(group.index.shape[-1], 0 if other is None else other.index.shape[-1])
    step = max(1, min(lq, BLOCK // (b * count * max(widest, d))))
    kept = torch.as_tensor(keep, dtype=wide, device=device).expand(b, count, lq)
    again = []
    for i0 in range(0, lq, step):
        i1 = min(lq, i0 + step)
        at = torch.arange(i0, i1, device=device)
        q = pick_heads(query[:, :, i0:i1], picked).to(wide)
        total = pick_heads(lse[:, :, i0:i1], picked).to(wide)
        o = pick_heads(out[:, :, i0:i1], picked)
        k = kept[:, :, i0:i1]
        active = None if rows is None else rows[:, :, i0:i1]
        p = group.weights(q, total, visibility, terms, picked, at)
        s = p.sum(-1)
        if other is None:
            w = _total_mass(total, terms, picked)
            c = (w - k * s) / (w - s)
            still = (s == 0) | (k == 1)
            hard = ~still & ~((c <= LIMIT[out.dtype]) & (w > s))
            idle = hard | still if active is None else hard | still | ~active
            c = c.masked_fill(idle, 1)
            k = k.masked_fill(idle, 1)
            hard = hard if active is None else hard & active
            again.append(hard)
            edited = torch.mul(o, c[..., None]).to(wide)
            edited += group.times_values(p * (k - c)[..., None])
        else:
            freed = (1 - k) * s
            share, some = other.shares(q, visibility, terms, picked, at)
            freed = freed.masked_fill(~some if active is None else ~(some & active), 0)
            gone = torch.where(s > 0, freed / s, 0)
            edited = o + other.times_values(share * freed[..., None])
            edited -= group.times_values(p * gone[..., None])
        if picked is None:
            new[:, :, i0:i1] = edited
        else:
            new[:, picked, i0:i1] = edited.to(new.dtype)
    if again:
        hard = torch.cat(again, -1)
        if bool(hard.any()):
            _exact(query, key, value, new, lse, hard, group, source, kept, heads, visibility, terms)
    return new


def _total_mass(lse: Tensor, terms: Terms, heads: Tensor | None) -> Tensor | float:
    """Probability of all keys together, per row: what a learned sink leaves."""
    if terms.sink_logits is None:
        return 1.0
    sink = terms.sink_logits.to(lse.dtype)
    held = torch.exp((sink if heads is None else sink[heads]).view(1, -1, 1) - lse)
    return 1 - held.masked_fill(torch.isneginf(lse), 0)


class _Columns:
    """Chosen keys of each query head, padded to the largest number of them.

    index, filled: (B, h, S), key (B, h, S, D), value (B, h, S, Dv) in the wide dtype.
    """

    def __init__(self, index: Tensor, filled: Tensor, key: Tensor, value: Tensor):
        self.index, self.filled, self.key, self.value = index, filled, key, value

    @classmethod
    def gather(
        cls, chosen: Tensor, key: Tensor, value: Tensor, heads: list[int] | None, h: int, wide: torch.dtype
    ) -> _Columns | None:
        """None when nothing is chosen in any head."""
        counts = chosen.sum(-1)
        most = int(counts.max())
        if most == 0:
            return None
        index = torch.zeros(*chosen.shape[:2], most, dtype=torch.long, device=chosen.device)
        at = chosen.nonzero(as_tuple=True)
        index[at[0], at[1], (chosen.cumsum(-1) - 1)[at]] = at[2]
        filled = torch.arange(most, device=chosen.device) < counts[..., None]
        batch = torch.arange(key.shape[0], device=key.device)[:, None, None]
        of = key_heads_of(h, key.shape[1], heads, key.device)[None, :, None]
        return cls(index, filled, key[batch, of, index].to(wide), value[batch, of, index].to(wide))

    def weights(
        self, q: Tensor, lse: Tensor, seen: Visibility, terms: Terms, heads: Tensor | None, rows: Tensor
    ) -> Tensor:
        """Probabilities of the chosen keys, (B, h, rows, S)."""
        z = self._logits(q, seen, terms, heads, rows)
        blind = torch.isneginf(lse)
        return z.sub_(lse.masked_fill(blind, 0)[..., None]).exp_().masked_fill_(blind[..., None], 0)

    def shares(
        self, q: Tensor, seen: Visibility, terms: Terms, heads: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Proportions among the chosen keys, (B, h, rows, S), and which rows see any, (B, h, rows)."""
        z = self._logits(q, seen, terms, heads, rows)
        some = ~torch.isneginf(z.amax(-1))
        return torch.softmax(z, -1).masked_fill_(~some[..., None], 0), some

    def times_values(self, weights: Tensor) -> Tensor:
        return weights @ self.value

    def _logits(
        self, q: Tensor, seen: Visibility, terms: Terms, heads: Tensor | None, rows: Tensor
    ) -> Tensor:
        # Scaled after the product, as where lse was made, so that the two cancel to the last bit.
        z = (q @ self.key.transpose(-1, -2)).mul_(terms.scale)
        if terms.softcap is not None:
            z = terms.softcap * torch.tanh(z / terms.softcap)
        if terms.position_bias is not None:
            lk = seen.lk
            bias = bias_block(terms.position_bias, heads, rows, 0, lk)
            bias = bias.expand(*z.shape[:3], lk)
            z = z + bias.gather(-1, self.index[:, :, None].expand(-1, -1, z.shape[2], -1))
        added = seen.bias_columns(self.index, rows, heads)
        if added is not None:
            z = z + added
        visible = seen.columns(self.index, rows, heads)
        hidden = ~self.filled[:, :, None] if visible is None else ~(visible & self.filled[:, :, None])
        return z.masked_fill_(hidden, -torch.inf)


def _exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new: Tensor,
    lse: Tensor,
    hard: Tensor,
    group: _Columns,
    source: Tensor,
    keep: Tensor,
    heads: list[int] | None,
    seen: Visibility,
    terms: Terms,
) -> None:
    """Compute the rows ``hard`` (B, h, Lq) of ``new`` again from their logits, in place."""
    h = query.shape[1]
    wide, share = statistics_dtype(query), h // key.shape[1]
    chosen = list(range(h)) if heads is None else heads
    step = max(1, BLOCK // key.shape[2])
    for batch, n in hard.any(-1).nonzero().tolist():
        head = chosen[n]
        one = torch.tensor([head], device=query.device)
        keys, values = key[batch, head // share].to(wide), value[batch, head // share].to(wide)
        part, bias = seen.row_of_batch(batch), terms.position_bias
        own = terms if bias is None or bias.shape[0] == 1 else replace(terms, position_bias=bias[batch][None])
        inner = group.index[batch, n, group.filled[batch, n]]
        for rows in hard[batch, n].nonzero()[:, 0].split(step):
            hi = part.span(int(rows[0]), int(rows[-1]) + 1)[1]
            z = (query[batch, head, rows].to(wide) @ keys[:hi].t()).mul_(terms.scale)
            z = shared_logits(z[None, None], own, part, one, rows, 0, hi)[0, 0]
            inside = z[:, inner[inner < hi]]
            outside = z.masked_fill_(source[batch, n, :hi], -torch.inf)
            top = outside.amax(-1, keepdim=True)
            receives = ~torch.isneginf(top)
            weights = outside.sub_(torch.where(receives, top, 0)).exp_()
            total = weights.sum(-1, keepdim=True).masked_fill_(~receives, 1)
            held = torch.where(receives, top, 0) + total.log()
            s = torch.exp(torch.logsumexp(inside, -1, keepdim=True) - held)  # relative to the other keys
            row_lse = lse[batch, head : head + 1, rows].to(wide)[None]
            mass = _total_mass(row_lse, terms, one)
            w = mass if isinstance(mass, float) else mass[0, 0, :, None]
            s = w * (s / (1 + s)).masked_fill(torch.isposinf(s), 1)
            k = keep[batch, n, rows, None]
            edited = (k * s) * (torch.softmax(inside, -1) @ values[inner[inner < hi]])
            edited += (w - k * s) / total * (weights @ values[:hi])
            new[batch, head, rows] = torch.where(receives, edited.to(new.dtype), new[batch, head, rows])
