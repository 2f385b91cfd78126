"""``column_mass`` as one fused attention call with queries and keys exchanged.

The log-sum-exp over *rows* of z_ij - lse_i is the logarithm of the mass of column j. So the flash
operator runs with keys as queries and queries as keys; both are reversed in time, which turns "row i
at or below key j" back into an ordinary causal mask; -lse / scale is carried by extra features
against ones. In half precision three features hold it (high, middle and low part), because one would
lose 16 of its 24 bits. Its output is thrown away: only the returned log-sum-exp is used.

This costs a little more than a forward pass whatever the machine, where ``blocked`` costs a float32
product. It is the better form only where half precision products are much faster than float32 ones,
which has not been measured. The bfloat16 operator's log-sum-exp is good to about 5e-5, not to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms, head_groups, statistics_dtype, take
from ..visibility import Visibility
from .blocked import NEVER

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused_reasons(query: Tensor, key: Tensor, seen: Visibility, terms: Terms) -> tuple[str, ...]:
    """Why this form cannot do the call; empty when it can."""
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"fused: no operator for {query.device.type}")
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16) or key.dtype != query.dtype:
        # float16 has no room for a feature of -lse / scale, nor for the one that excludes a row.
        reasons.append(f"fused: dtype {query.dtype}")
    if not terms.plain:
        reasons.append("fused: soft-cap or position bias")
    if not seen.structured or seen.window is not None or (seen.causal and seen.offset < 0):
        reasons.append(f"fused: {seen.kind}")
    if 0 in query.shape or 0 in key.shape:
        reasons.append("fused: empty input")
    return tuple(reasons)


def column_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    visibility: Visibility,
    terms: Terms,
    rows: Tensor | None = None,
    heads: list[int] | None = None,
    group: str | None = None,
) -> Tensor:
    """See ``api.column_mass``."""
    b, h, lq, d = query.shape
    hkv, lk = key.shape[1], key.shape[2]
    chosen = list(range(h)) if heads is None else heads
    parts = 3 if query.dtype == torch.bfloat16 else 1
    width = -(-(d + parts) // 8) * 8
    feature = -lse.to(statistics_dtype(query)) / terms.scale
    counted = torch.isfinite(feature)
    if rows is not None:
        counted = counted & rows[:, None]
    feature = torch.where(counted, feature, NEVER)
    count = hkv if group == "sum" else len(chosen)
    out = torch.zeros(b, count, lk, dtype=feature.dtype, device=query.device)
    place = {head: n for n, head in enumerate(chosen)}
    for key_heads, members in head_groups(h, hkv, heads):
        share = len(members) // len(key_heads)
        asked = key.new_zeros(b, len(key_heads), share, lk, width)
        asked[..., :d] = take(key, key_heads).flip(2)[:, :, None]
        asked[..., d : d + parts] = 1
        offered = query.new_zeros(b, len(members), lq, width)
        offered[..., :d] = take(query, members).flip(2)
        rest = take(feature, members).flip(2)
        for n in range(parts):
            offered[..., d + n] = rest.to(query.dtype)
            rest = rest - offered[..., d + n].to(rest.dtype)
        _, total = _flash(asked.flatten(1, 2), offered, offered, 0.0, visibility.causal, scale=terms.scale)
        # A column whose rows all were excluded holds about NEVER: its exponential is zero, as it should.
        mass = total.flip(2).exp().view(b, len(key_heads), share, lk)
        if group == "sum":
            out[:, key_heads] = mass.sum(2)
        else:
            out[:, [place[i] for i in members]] = mass.flatten(1, 2)
    if visibility.keys is not None:
        out.masked_fill_(~visibility.keys[:, None], 0)
    return out
