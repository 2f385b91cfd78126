"""``attention`` without a queries x keys tensor: the fused CPU operator, or torch a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import BLOCK, Terms, bias_block, powers, shared_logits, statistics_dtype
from ..dispatch import FUSED_CPU_DTYPES
from ..visibility import Visibility

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# The operator's own tiles are 256 rows (from 768 rows up) by 512 keys. Pieces cut on those borders give
# the bits of one call over everything.
_ROWS, _KEYS = 768, 512


def fused_reasons(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[str, ...]:
    """Why the fused CPU operator cannot do this call; empty when it can."""
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"fused: no operator for {query.device.type}")
    if query.dtype not in FUSED_CPU_DTYPES or not query.dtype == key.dtype == value.dtype:
        reasons.append(f"fused: dtypes {query.dtype}, {key.dtype}, {value.dtype}")
    if terms.softcap is not None:
        reasons.append("fused: no soft-cap")
    if value.shape[-1] != query.shape[-1]:
        reasons.append(f"fused: value width {value.shape[-1]} differs from key width {key.shape[-1]}")
    if 0 in query.shape or 0 in key.shape:
        reasons.append("fused: empty input")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        reasons.append("fused: gradients are asked for")
    return tuple(reasons)


def fused(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, terms: Terms
) -> tuple[Tensor, Tensor]:
    """The CPU flash operator. Bits are those of ``F.scaled_dot_product_attention`` on the same input."""
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    seen, lq, lk = visibility, query.shape[2], key.shape[2]
    bare = seen.structured and seen.keys is None and seen.window is None and terms.position_bias is None
    if bare and (not seen.causal or lq == lk or lq == 1):
        causal = seen.causal and lq > 1
        out, lse = _flash(query, key, value, 0.0, causal, scale=terms.scale)
    else:
        out, lse = _fused_rows(query, key, value, seen, terms)
    empty = seen.empty()
    if empty is not None:
        out.masked_fill_(empty[..., None], 0)
        lse = lse.masked_fill(empty, -torch.inf)
    if terms.sink_logits is not None:
        # A further logit without a value scales the row: softmax over one more entry.
        sink = terms.sink_logits.to(lse.dtype).view(1, -1, 1)
        whole = torch.logaddexp(lse, sink)
        out = (out * torch.exp(lse - whole)[..., None]).to(out.dtype)
        lse = torch.where(torch.isneginf(lse), lse, whole)
    return out, lse


def _fused_rows(
    query: Tensor, key: Tensor, value: Tensor, seen: Visibility, terms: Terms
) -> tuple[Tensor, Tensor]:
    b, h, lq, d = query.shape
    lk = key.shape[2]
    out = query.new_empty(b, lq, h, d).transpose(1, 2)
    lse = torch.empty(b, h, lq, dtype=statistics_dtype(query), device=query.device)
    step = _ROWS if lq >= 2 * _ROWS else lq
    i0 = 0
    while i0 < lq:
        i1 = i0 + step if lq - i0 >= 2 * step else lq
        lo, hi = seen.span(i0, i1)
        lo, hi = lo // _KEYS * _KEYS, min(lk, -(-max(hi, 1) // _KEYS) * _KEYS)
        mask = _additive_mask(query, seen, terms, torch.arange(i0, i1, device=query.device), lo, hi)
        out[:, :, i0:i1], lse[:, :, i0:i1] = _flash(
            query[:, :, i0:i1],
            key[:, :, lo:hi],
            value[:, :, lo:hi],
            0.0,
            False,
            attn_mask=mask,
            scale=terms.scale,
        )
        i0 = i1
    return out, lse


def _additive_mask(
    query: Tensor, seen: Visibility, terms: Terms, rows: Tensor, lo: int, hi: int
) -> Tensor | None:
    visible = seen.at(rows, lo, hi)
    added = seen.bias_at(rows, lo, hi)
    if terms.position_bias is not None:
        bias = bias_block(terms.position_bias, None, rows, lo, hi)
        added = bias if added is None else added.to(statistics_dtype(query)) + bias
    if added is None:
        if visible is None:
            return None
        added = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
    # The operator adds masks in float32, or in the dtype of the query; float32 values are not cut to half.
    if query.dtype == torch.float64 or added.dtype != torch.float32:
        added = added.to(query.dtype)
    if visible is not None:
        added = added.masked_fill(~visible, -torch.inf)
    return added.expand(*added.shape[:2], rows.shape[0], hi - lo)


def blocked(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Torch, a few rows at a time, on any device; scores in float32 (float64 for float64 input)."""
    b, h, lq, d = query.shape
    hkv, lk, dv = key.shape[1], key.shape[2], value.shape[3]
    wide = statistics_dtype(query)
    out = query.new_empty(b, h, lq, dv)
    lse = torch.empty(b, h, lq, dtype=wide, device=query.device)
    if 0 in (b, h, lq) or lk == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    keys, values = key.to(wide).transpose(-1, -2), value.to(wide)
    step = max(1, min(lq, BLOCK // (b * h * lk)))
    for i0 in range(0, lq, step):
        i1 = min(lq, i0 + step)
        lo, hi = visibility.span(i0, i1)
        q = query[:, :, i0:i1].to(wide).reshape(b, hkv, -1, d)
        z = (q @ keys[..., lo:hi]).mul_(terms.scale).view(b, h, i1 - i0, hi - lo)
        rows = torch.arange(i0, i1, device=query.device)
        z = shared_logits(z, terms, visibility, None, rows, lo, hi)
        total = torch.logsumexp(z, -1) if hi > lo else z.new_full(z.shape[:3], -torch.inf)
        blind = torch.isneginf(total)
        if terms.sink_logits is not None:
            total = torch.logaddexp(total, terms.sink_logits.to(wide).view(1, -1, 1))
        if z.requires_grad:
            z = z.clone()  # the sum above needs these logits again when gradients are computed
        weights = powers(z.sub_(total.masked_fill(blind, 0)[..., None])).view(b, hkv, -1, hi - lo)
        out[:, :, i0:i1] = (weights @ values[:, :, lo:hi]).view(b, h, i1 - i0, dv)
        lse[:, :, i0:i1] = total.masked_fill(blind, -torch.inf)
    return out, lse
