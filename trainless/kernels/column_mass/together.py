"""Output, log-sum-exp and column mass of one call in a single sweep, for output that will be edited anyway.

Each block of rows is multiplied with the keys once, exponentiated in place, and read twice: against the values
with a further column of ones (the output and the sum of each row), and against one over those sums (the mass
of each column). The fused operator followed by ``blocked`` multiplies with the keys twice.

No pass over the block looks for the largest logit of a row. Any number m will do for z - m that keeps the
exponentials in range, and two bounds are at hand: the logit of the row's own key from below, the product of
norms from above. Rows for which they are too far apart are done with their true maximum.

Its output does not have the bits of ``F.scaled_dot_product_attention``; it is float32 whatever the input, so
an edit of it rounds once. benchmarks/attention_kernels.py times it beside the two calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common import BLOCK, Terms, statistics_dtype
from ..visibility import Visibility

LOG2E = math.log2(math.e)
_ROWS = 768  # (group, row) pairs per product
# In base 2. A row's exponentials may reach 2^UP, times at most a few thousand keys and the values; its largest
# must not lie below 2^-DOWN, or what counts beside it would leave the range of normal numbers.
_UP, _DOWN = 80.0, 90.0


def together_reasons(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, terms: Terms
) -> tuple[str, ...]:
    """Why this form cannot do the call; empty when it can."""
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"together: made for the CPU, not {query.device.type}")
    if not terms.plain:
        reasons.append("together: soft-cap or position bias")
    if not seen.structured or seen.window is not None or (seen.causal and seen.offset < 0):
        reasons.append(f"together: {seen.kind}")
    if 0 in query.shape or 0 in key.shape:
        reasons.append("together: empty input")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        reasons.append("together: gradients are asked for")
    return tuple(reasons)


@dataclass(frozen=True)
class RowScale:
    """How a sweep normalised its rows: p = 2^(z·log2(e) - m) · inverse, both (B, h, Lq).

    With it the probabilities of single keys can be had again with the very rounding that went into the output,
    where exp(z - lse) differs in the last digits of the log-sum-exp.
    """

    m: Tensor
    inverse: Tensor


def attention_and_mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visibility: Visibility,
    terms: Terms,
    rows: Tensor | None,
    heads: list[int],
) -> tuple[Tensor, Tensor, Tensor, RowScale]:
    """out (B, h, Lq, Dv), lse (B, h, Lq), column mass (B, h, Lk), scale of the h query heads ``heads``.

    All in float32 (float64 for float64 input). rows: bool (B, Lq), the rows that the mass adds up.
    """
    b, h, lq, _ = query.shape
    hkv, lk, dv = key.shape[1], key.shape[2], value.shape[3]
    wide, share = statistics_dtype(query), h // hkv
    out = torch.empty(b, len(heads), lq, dv, dtype=wide, device=query.device)
    lse = torch.empty(b, len(heads), lq, dtype=wide, device=query.device)
    mass = torch.zeros(b, len(heads), lk, dtype=wide, device=query.device)
    kept, inverse = torch.empty_like(lse), torch.empty_like(lse)
    members: dict[int, list[int]] = {}
    for n, head in enumerate(heads):
        members.setdefault(head // share, []).append(n)
    for batch in range(b):
        exists = None if visibility.keys is None else visibility.keys.expand(b, -1)[batch]
        counted = None if rows is None else rows[batch]
        for g, mine in members.items():
            at = [heads[n] for n in mine]
            sinks = None if terms.sink_logits is None else terms.sink_logits[at].to(wide)
            found = _one_key_head(
                query[batch, at], key[batch, g].to(wide), value[batch, g].to(wide), terms.scale, sinks,
                visibility.causal, exists, counted,
            )  # fmt: skip
            out[batch, mine], lse[batch, mine], mass[batch, mine] = found[:3]
            kept[batch, mine], inverse[batch, mine] = found[3:]
    return out, lse, mass, RowScale(kept, inverse)


def _one_key_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sinks: Tensor | None,
    causal: bool,
    exists: Tensor | None,
    counted: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query (h, Lq, D) on key (Lk, D) and value (Lk, Dv); exists (Lk,), counted (Lq,), sinks (h,) or None."""
    h, lq, d = query.shape
    lk, dv, wide = key.shape[0], value.shape[1], key.dtype
    offset, factor = lk - lq, scale * LOG2E
    out, lse = query.new_empty(h, lq, dv, dtype=wide), query.new_empty(h, lq, dtype=wide)
    mass = query.new_zeros(h, lk, dtype=wide)
    kept, scales = torch.empty_like(lse), torch.empty_like(lse)
    keys = torch.cat([key, key.new_ones(lk, 1)], 1).t().contiguous()  # the last feature is multiplied by -m
    values = value.new_zeros(lk, -(-(dv + 1) // 8) * 8)
    values[:, :dv], values[:, dv] = value, 1
    if exists is not None:
        values *= exists[:, None]
    longest = key.norm(dim=1).amax()
    step = max(1, min(lq, _ROWS // h, 2 * BLOCK // (h * lk)))
    below = torch.ones(step, step, dtype=wide, device=query.device).tril_()
    buffer = query.new_empty(h * step * lk, dtype=wide)
    for i0 in range(0, lq, step):
        i1 = min(lq, i0 + step)
        n, hi = i1 - i0, i1 + offset if causal else lk
        packed = query.new_empty(h, n, d + 1, dtype=wide)
        torch.mul(query[:, i0:i1].to(wide), factor, out=packed[..., :d])
        z = buffer[: h * n * hi].view(h * n, hi)
        own = slice(i0 + offset, i1 + offset)
        m = None
        if not causal or exists is None or bool(exists[own].all()):
            m = _reference(packed[..., :d], key[own] if causal else None, longest)
        if m is None:
            torch.mm(packed[..., :d].reshape(h * n, d), keys[:d, :hi], out=z)
            m = _true_maximum(z.view(h, n, hi), i0 + offset if causal else None, exists)
            z.sub_(m.view(-1, 1)).exp2_()
        else:
            torch.neg(m, out=packed[..., d])
            torch.mm(packed.view(h * n, d + 1), keys[:, :hi], out=z)
            z.exp2_()
            if causal:  # finite, so a product hides them; tril_ would copy
                z.view(h, n, hi)[..., i0 + offset :].mul_(below[:n, :n])
        both = torch.mm(z, values[:hi]).view(h, n, -1)
        total = both[..., dv]
        seen = total > 0
        held = torch.where(seen, (total.log2() + m) / LOG2E, -torch.inf)
        share: Tensor | float = 1.0
        if sinks is not None:
            whole = torch.logaddexp(held, sinks[:, None])
            share = torch.where(seen, torch.exp(held - whole), 0)
            held = torch.where(seen, whole, held)
        inverse = torch.where(seen, share / total, 0)
        torch.mul(both[..., :dv], inverse[..., None], out=out[:, i0:i1])
        lse[:, i0:i1], kept[:, i0:i1], scales[:, i0:i1] = held, m, inverse
        if counted is not None:
            inverse = inverse * counted[i0:i1]
        mass[:, :hi] += torch.bmm(inverse[:, None], z.view(h, n, hi))[:, 0]
    if exists is not None:
        mass *= exists
    return out, lse, mass, kept, scales


def _reference(query: Tensor, own: Tensor | None, longest: Tensor) -> Tensor | None:
    """A number per row (h, n) whose distance to the largest logit is harmless; None if that cannot be said.

    query (h, n, D), scaled to base-2 logits; own (n, D): the key that each row is sure to see.
    """
    above = query.norm(dim=-1) * longest
    if own is None:
        below = -above
    else:
        below = (query * own).sum(-1)
    m = torch.maximum(below, above - _UP)
    return m if bool((m - below <= _DOWN).all()) else None


def _true_maximum(logits: Tensor, first: int | None, exists: Tensor | None) -> Tensor:
    """The largest logit of each row (h, n) among the keys that it sees, 0 where there is none.

    logits (h, n, keys): what a row does not see becomes -inf. Row r sees keys up to ``first`` + r, or all.
    """
    n = logits.shape[1]
    if first is not None:
        later = torch.ones(n, n, dtype=torch.bool, device=logits.device).triu_(1)
        logits[..., first:].masked_fill_(later, -torch.inf)
    if exists is not None:
        logits.masked_fill_(~exists[: logits.shape[2]], -torch.inf)
    m = logits.amax(-1)
    return m.masked_fill(torch.isneginf(m), 0)
