"""``mass_move`` in torch: a correction of rank |source|, on top of the output that is already there.

With P the probabilities of the source keys, s their sum, w the sum over all keys (1, less under learned
sinks) and o the output, keeping ``keep`` of s and giving the rest to everyone else in proportion is

    o' = c·o + (keep - c)·P V_S,    c = (w - keep·s) / (w - s).

Only the source columns are ever looked at. c grows without bound as s approaches w, and with it the
rounding error that o carries already; rows where c passes a limit take the other form, in ``rest.py``, which
attends to the remaining keys once more. So do whole heads in which many rows would, or whose source is so
large that its columns cost more than that. That form also finds the rows whose visible keys all are sources:
nothing can receive there, so they stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import BLOCK, Terms, bias_block, key_heads_of, pick_heads, statistics_dtype
from ..visibility import Visibility
from . import rest

# c beyond which a row is computed again. o carries rounding errors, and c multiplies them: with 2 the result
# is as accurate as editing the probabilities in the same precision, with 8 it is six times worse (float32,
# root mean square). float64 has digits to spare. For keep = 0.4, c = 2 is a source mass of 0.625.
LIMIT = {torch.float64: 100.0, torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 2.0}


# From this many rows on, heads are looked at for the other form: SAMPLE of their rows. It is taken where more
# than OFTEN of these are beyond the limit, or where the source has more than LARGE of all keys.
LONG, SAMPLE, OFTEN, LARGE = 256, 64, 1 / 16, 1 / 8


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
    b, h, lq, _ = query.shape
    if 0 in (b, lq, key.shape[2]) or not bool(source.any()):
        return out
    chosen = list(range(h)) if heads is None else heads
    kept = torch.as_tensor(keep, dtype=statistics_dtype(query), device=query.device)
    kept = kept.expand(b, len(chosen), lq)
    active = None if rows is None else rows.expand(b, len(chosen), lq)
    new = out.clone()
    if target is None and lq >= LONG and rest.possible(query, key, value, visibility, terms):
        crowded = _crowded(query, key, value, lse, source, kept, chosen, visibility, terms)
        rest.edit_heads(
            query, key, value, new, lse, pairs=crowded, source=source, keep=kept, active=active,
            heads=chosen, seen=visibility, terms=terms,
        )  # fmt: skip
        source = source & ~crowded[..., None]
    left = source.any(-1).any(0).nonzero()[:, 0]  # a head without a source costs nothing
    if len(left):
        source, kept = source[:, left], kept[:, left]
        active = None if active is None else active[:, left]
        target = None if target is None else target[:, left]
        heads = [chosen[n] for n in left.tolist()]
        _edit_columns(query, key, value, new, lse, source, kept, target, active, heads, visibility, terms)
    return new


def _crowded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    source: Tensor,
    keep: Tensor,
    heads: list[int],
    seen: Visibility,
    terms: Terms,
) -> Tensor:
    """bool (B, h): heads that are better served by attending to the rest once more, judged by some rows."""
    large = source.sum(-1) > LARGE * source.shape[-1]
    if bool((large | ~source.any(-1)).all()):
        return large
    picked = torch.as_tensor(heads, device=query.device)
    group = _Columns.gather(source & ~large[..., None], key, value, heads, query.shape[1], keep.dtype)
    assert group is not None
    at = torch.linspace(0, query.shape[2] - 1, SAMPLE, device=query.device).long()
    total = lse[:, picked][..., at].to(keep.dtype)
    s = group.weights(query[:, picked][:, :, at].to(keep.dtype), total, seen, terms, picked, at).sum(-1)
    k, w = keep[..., at], rest.total_mass(total, terms, picked)
    hard = (s > 0) & (k != 1) & ~((w - k * s <= LIMIT[query.dtype] * (w - s)) & (w > s))
    return large | (hard.to(keep.dtype).mean(-1) > OFTEN)


def _edit_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new: Tensor,
    lse: Tensor,
    source: Tensor,
    keep: Tensor,
    target: Tensor | None,
    active: Tensor | None,
    heads: list[int],
    seen: Visibility,
    terms: Terms,
) -> None:
    """Edit ``heads`` of ``new`` in place, a block of rows at a time."""
    b, h, lq, d = query.shape
    wide, device = keep.dtype, query.device
    group = _Columns.gather(source, key, value, heads, h, wide)
    other = None if target is None else _Columns.gather(target, key, value, heads, h, wide)
    if group is None or (target is not None and other is None):
        return
    picked = None if heads == list(range(h)) else torch.as_tensor(heads, device=device)
    widest = max(group.index.shape[-1], 0 if other is None else other.index.shape[-1])
    step = max(1, min(lq, BLOCK // (b * len(heads) * max(widest, d))))
    again = []
    for i0 in range(0, lq, step):
        i1 = min(lq, i0 + step)
        at = torch.arange(i0, i1, device=device)
        q = pick_heads(query[:, :, i0:i1], picked).to(wide)
        total = pick_heads(lse[:, :, i0:i1], picked).to(wide)
        o = pick_heads(new[:, :, i0:i1], picked)
        k = keep[:, :, i0:i1]
        asked = None if active is None else active[:, :, i0:i1]
        p = group.weights(q, total, seen, terms, picked, at)
        s = p.sum(-1)
        if other is None:
            w = rest.total_mass(total, terms, picked)
            c = (w - k * s) / (w - s)
            still = (s == 0) | (k == 1)
            hard = ~still & ~((c <= LIMIT[new.dtype]) & (w > s))
            idle = hard | still if asked is None else hard | still | ~asked
            c = c.masked_fill(idle, 1)
            k = k.masked_fill(idle, 1)
            again.append(hard if asked is None else hard & asked)
            edited = torch.mul(o, c[..., None]).to(wide)
            edited += group.times_values(p * (k - c)[..., None])
        else:
            freed = (1 - k) * s
            share, some = other.shares(q, seen, terms, picked, at)
            freed = freed.masked_fill(~some if asked is None else ~(some & asked), 0)
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
            rest.edit_rows(
                query, key, value, new, lse, hard=hard, source=source, keep=keep, heads=heads, seen=seen,
                terms=terms,
            )  # fmt: skip


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
