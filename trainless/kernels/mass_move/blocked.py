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

from ..column_mass import RowScale
from ..column_mass.together import LOG2E
from ..common import BLOCK, Terms, bias_block, key_heads_of, powers, statistics_dtype, take
from ..visibility import Visibility
from . import by_rows, rest

# c beyond which a row takes the other form. o carries rounding errors, and c multiplies them. On SmolLM2's
# calls, against float64: 2 in float32 gives a root mean square error 1.3 times that of edited probabilities in
# float32, 4 gives 2 times (largest error: 1e-5 of the largest output), 16 gives 6 times. An output that is kept
# in float32 for half-precision input has digits to spare, as has float64; one that is in half precision has not.
# For keep = 0.4, c = 4 is a source mass of 0.83.
LIMIT = {torch.float64: 100.0, torch.float32: 4.0, torch.float16: 2.0, torch.bfloat16: 2.0}
WIDER = 64.0  # an output wider than the input
# float32, and the probabilities are those that went into the output, to the bit: 16 gives 1.2 to 2.3 times the
# root mean square error of edited probabilities, and a largest error of 4e-6 of the largest output.
SAME_ROUNDING = 16.0

NEVER = -1e30  # as a logit: its exponential is zero, and it makes no NaN

# From LONG rows on, SAMPLE of them decide from which of CUTS rows on a head attends to the rest once more. The
# prices are per key and row, that of the fused operator being 1: for a column that is edited, for a row that is
# computed from its logits.
LONG, SAMPLE, CUTS = 256, 64, 8
COLUMN_PRICE, ROW_PRICE = 4.0, 3.0


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
    row_scale: RowScale | None = None,
) -> Tensor:
    """See ``api.mass_move``."""
    b, h, lq, _ = query.shape
    if 0 in (b, lq, key.shape[2]) or not bool(source.any()):
        return out
    chosen = list(range(h)) if heads is None else heads
    kept = torch.as_tensor(keep, dtype=statistics_dtype(query), device=query.device)
    kept = kept.expand(b, len(chosen), lq)
    active = None if rows is None else rows.expand(b, len(chosen), lq)
    limit = LIMIT[out.dtype] if out.dtype == query.dtype else WIDER
    if row_scale is not None:
        limit = max(limit, SAME_ROUNDING)
    new = out.clone()
    if target is not None and active is not None:
        by_rows.edit(
            query, key, value, new, lse, source=source, keep=kept, target=target, active=active,
            heads=chosen, seen=visibility, terms=terms,
        )  # fmt: skip
        return new
    start = torch.full(source.shape[:2], lq, device=query.device)
    if target is None and lq >= LONG and rest.possible(query, key, value, visibility, terms):
        start = _starts(query, key, value, lse, source, kept, chosen, limit, visibility, terms)
        rest.edit_from(
            query, key, value, new, lse, start=start, source=source, keep=kept, active=active,
            heads=chosen, seen=visibility, terms=terms,
        )  # fmt: skip
    earlier = torch.arange(lq, device=query.device) < start[..., None]
    active = earlier if active is None else active & earlier
    left = (source.any(-1) & (start > 0)).any(0).nonzero()[:, 0]  # a head without a source costs nothing
    if len(left):
        heads = [chosen[n] for n in left.tolist()]
        target = None if target is None else target[:, left]
        _edit_columns(
            query, key, value, new, lse, source[:, left], kept[:, left], target, active[:, left], heads,
            limit, visibility, terms, row_scale,
        )  # fmt: skip
    return new


def _starts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    source: Tensor,
    keep: Tensor,
    heads: list[int],
    limit: float,
    seen: Visibility,
    terms: Terms,
) -> Tensor:
    """(B, h): the row from which on attending to the rest once more is the cheaper form, Lq for nowhere.

    Sources tend to be early tokens and, where a head looks at its neighbourhood, the last ones, which few rows
    see: so what is dear is often only the end.
    """
    lq, lk = query.shape[2], key.shape[2]
    group = _Columns.gather(source, key, value, heads, query.shape[1], keep.dtype)
    assert group is not None
    picked = torch.as_tensor(heads, device=query.device)
    at = torch.linspace(0, lq - 1, SAMPLE, device=query.device).long()
    total = lse[:, picked][..., at].to(keep.dtype)
    p = group.weights(query[:, picked][:, :, at].to(keep.dtype), total, seen, terms, picked, at)
    s = group.with_sums(p)[1]
    k, w = keep[..., at], rest.total_mass(total, terms, picked)
    hard = (s > 0) & (k != 1) & ~((w - k * s <= limit * (w - s)) & (w > s))
    last = (at + seen.offset).clamp(0, lk - 1) if seen.causal else torch.full_like(at, lk - 1)
    keys, sources = last + 1, source.cumsum(-1)[..., last]
    dear = COLUMN_PRICE * sources + ROW_PRICE * hard * keys
    steps = torch.arange(0, SAMPLE + 1, SAMPLE // CUTS if rest.splits(seen) else SAMPLE, device=at.device)
    before = torch.nn.functional.pad(dear.cumsum(-1), (1, 0))[..., steps]
    after = keys.sum() - torch.nn.functional.pad(keys.cumsum(-1), (1, 0))[steps]
    best = (before + after).argmin(-1)
    first = torch.nn.functional.pad(at, (0, 1), value=lq)[steps][best]
    return torch.where(source.any(-1), first, lq)


def _edit_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new: Tensor,
    lse: Tensor,
    source: Tensor,
    keep: Tensor,
    target: Tensor | None,
    active: Tensor,
    heads: list[int],
    limit: float,
    seen: Visibility,
    terms: Terms,
    row_scale: RowScale | None,
) -> None:
    """Edit the rows ``active`` (B, h, Lq) of ``heads`` of ``new`` in place, a block of rows at a time."""
    b, _, lq, d = query.shape
    wide, device = keep.dtype, query.device
    whole = _Columns.gather(source, key, value, heads, query.shape[1], wide)
    others = None if target is None else _Columns.gather(target, key, value, heads, query.shape[1], wide)
    if whole is None or (target is not None and others is None):
        return
    every = torch.as_tensor(heads, device=device)
    widest = max(whole.index.shape[-1], 0 if others is None else others.index.shape[-1])
    step = max(1, min(lq, BLOCK // (b * len(heads) * max(widest, d))))
    again = torch.zeros_like(active)
    for i0 in range(0, lq, step):
        i1 = min(lq, i0 + step)
        hi = i1 + seen.offset if seen.causal else seen.lk
        inside = active[:, :, i0:i1].any(-1) & (whole.index[..., 0] < hi)
        mine = inside.any(0).nonzero()[:, 0]
        if not len(mine):
            continue
        # Sources that no row of this block sees yet are left out; so are heads without any.
        group = whole.narrow(mine, hi)
        other = None if others is None else others.narrow(mine, hi)
        picked, index = every[mine], every[mine].tolist()
        at = torch.arange(i0, i1, device=device)
        q = take(query[:, :, i0:i1], index).to(wide)
        total = take(lse[:, :, i0:i1], index).to(wide)
        o = take(new[:, :, i0:i1], index)
        if o.requires_grad:
            o = o.clone()  # a gradient asks for what stood here, and it is written over below
        k = take(keep[:, :, i0:i1], mine.tolist())
        asked = take(active[:, :, i0:i1], mine.tolist())
        scale = None
        if row_scale is not None:
            scale = RowScale(*(take(t[:, :, i0:i1], index) for t in (row_scale.m, row_scale.inverse)))
        p = group.weights(q, total, seen, terms, picked, at, scale)
        held, s = group.with_sums(p)
        if other is None:
            w = rest.total_mass(total, terms, picked)
            c = (w - k * s) / (w - s)
            still = (s == 0) | (k == 1) | ~asked
            hard = ~still & ~((c <= limit) & (w > s))
            again[:, mine, i0:i1] = hard
            c = c.masked_fill(hard | still, 1)
            k = k.masked_fill(hard | still, 1)
            edited = torch.addcmul(held * (k - c)[..., None], o, c[..., None])
        else:
            freed = (1 - k) * s
            share, some = other.shares(q, seen, terms, picked, at)
            freed = freed.masked_fill(~(some & asked), 0)
            gone = torch.where(s > 0, freed / s, 0)
            edited = o + other.times_values(share * freed[..., None])
            edited -= held * gone[..., None]
        new[:, picked, i0:i1] = edited.to(new.dtype)
    if bool(again.any()):
        rest.edit_rows(
            query, key, value, new, lse, hard=again, source=source, keep=keep, heads=heads, seen=seen,
            terms=terms,
        )  # fmt: skip


class _Columns:
    """Chosen keys of each query head, padded to the largest number of them.

    index, filled: (B, h, S), key (B, h, S, D) in the wide dtype; value (B, h, S, Dv + 1), the last 1, or 0 if repeated.
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
        # A head with fewer repeats its first: a probability like any other, against a value of zero.
        index = chosen.long().argmax(-1, keepdim=True).repeat(1, 1, most)
        at = chosen.nonzero(as_tuple=True)
        index[at[0], at[1], (chosen.cumsum(-1) - 1)[at]] = at[2]
        filled = torch.arange(most, device=chosen.device) < counts[..., None]
        batch = torch.arange(key.shape[0], device=key.device)[:, None, None]
        of = key_heads_of(h, key.shape[1], heads, key.device)[None, :, None]
        values = torch.zeros(*index.shape, value.shape[-1] + 1, dtype=wide, device=value.device)
        values[..., :-1], values[..., -1] = value[batch, of, index], 1
        return cls(index, filled, key[batch, of, index].to(wide), values * filled[..., None])

    def narrow(self, heads: Tensor, hi: int) -> _Columns:
        """Of some of the heads, the keys below ``hi``; at least one, so that nothing is empty."""
        width = max(1, int(((self.index[:, heads] < hi) & self.filled[:, heads]).sum(-1).max()))
        parts = (self.index, self.filled, self.key, self.value)
        return _Columns(*(take(part[:, :, :width], heads.tolist()) for part in parts))

    def weights(
        self,
        q: Tensor,
        lse: Tensor,
        seen: Visibility,
        terms: Terms,
        heads: Tensor | None,
        rows: Tensor,
        scale: RowScale | None = None,
    ) -> Tensor:
        """Probabilities of the chosen keys, (B, h, rows, S), those of a repeated key too."""
        if not (terms.plain and seen.structured):
            z = self._logits(q, seen, terms, heads, rows)
            blind = torch.isneginf(lse)
            return powers(z.sub_(lse.masked_fill(blind, 0)[..., None])).masked_fill_(blind[..., None], 0)
        keys = self.key.flatten(0, 1).transpose(-1, -2)
        if scale is not None:  # the steps of the sweep, in its order
            z = torch.bmm((q * (terms.scale * LOG2E)).flatten(0, 1), keys).view(*lse.shape, -1)
            p = z.sub_(scale.m[..., None]).exp2_().mul_(scale.inverse[..., None])
        else:
            minus = lse.neg().masked_fill_(torch.isneginf(lse), NEVER)
            base = minus.flatten(0, 1)[..., None].expand(-1, -1, keys.shape[-1])
            p = torch.baddbmm(base, q.flatten(0, 1), keys, alpha=terms.scale).exp_().view(*lse.shape, -1)
        simple = seen.window is None and seen.keys is None
        if simple and (not seen.causal or int(self.index.max()) <= int(rows[0]) + seen.offset):
            return p
        visible = seen.columns(self.index, rows, heads)
        return p if visible is None else p.masked_fill_(~visible, 0)

    def with_sums(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """weights times values (B, h, rows, Dv), and the sums of the weights (B, h, rows)."""
        both = weights @ self.value
        return both[..., :-1], both[..., -1]

    def shares(
        self, q: Tensor, seen: Visibility, terms: Terms, heads: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Proportions among the chosen keys, (B, h, rows, S), and which rows see any, (B, h, rows)."""
        z = self._logits(q, seen, terms, heads, rows)
        some = ~torch.isneginf(z.amax(-1))
        return torch.softmax(z, -1).masked_fill_(~some[..., None], 0), some

    def times_values(self, weights: Tensor) -> Tensor:
        return weights @ self.value[..., :-1]

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
