"""``attention``: output and log-sum-exp of one attention call, on the cheapest form that can do it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import Terms, check_shapes
from ..dispatch import Choice, triton_reasons
from ..visibility import Visibility
from . import blocked

ONE_BY_ONE = 1 << 20  # elements from which on a half-precision operand is widened matrix by matrix


def choose(query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, terms: Terms) -> Choice:
    """Which form ``attention`` runs for this call."""
    why = triton_reasons((query, key, value)) + triton_shape_reasons(query, value, visibility)
    if not why:
        return Choice("triton")
    fused = blocked.fused_reasons(query, key, value, terms)
    return Choice("fused", ()) if not fused else Choice("blocked", fused + why)


def triton_shape_reasons(query: Tensor, value: Tensor, visibility: Visibility) -> tuple[str, ...]:
    """Shapes and masks that the Triton forms do not take."""
    reasons = []
    if query.shape[-1] > 256 or value.shape[-1] != query.shape[-1]:
        reasons.append(f"triton: head width {query.shape[-1]} (value {value.shape[-1]})")
    if visibility.dense is not None and not isinstance(visibility.dense, Tensor):
        reasons.append("triton: a BlockMask or pattern without a simple structure")
    if 0 in query.shape or visibility.lk == 0:
        reasons.append("triton: empty input")
    return tuple(reasons)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visibility: Visibility,
    scale: float,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its logits.

    query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv); query head i reads key head
    i // (H / Hkv). position_bias (1|B, 1|H, Lq, Lk) is added after the soft-cap; sink_logits (H,) is one
    more logit per row, without a value, and counts in the log-sum-exp.

    Returns out (B, H, Lq, Dv) in the dtype of ``query`` and lse (B, H, Lq) in float32 (float64 for
    float64 input). A row that sees no key gives zeros and -inf. On the CPU, without a soft-cap, ``out``
    has the bits of ``F.scaled_dot_product_attention``. Raises InputError when shapes do not fit.
    """
    terms = Terms(scale, position_bias, softcap, sink_logits)
    check_shapes(query, key, value, visibility, terms)
    name = choose(query, key, value, visibility=visibility, terms=terms).name
    if name == "triton":
        from .triton import attention as on_triton

        return on_triton(query, key, value, visibility=visibility, terms=terms)
    form = blocked.fused if name == "fused" else blocked.blocked
    return form(query, key, value, visibility=visibility, terms=terms)


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, *, valid: Tensor | None = None, **terms: Any
) -> tuple[Tensor, Tensor]:
    """Attention of one row or a few, with its probabilities; for decoding.

    Arguments as for ``row_probabilities``, and value (B, Hkv, Lk, Dv). Returns out (B, H, Lq, Dv) in the dtype of
    ``query`` and probabilities (B, H, Lq, Lk); a row without a valid key gives zeros in both.
    """
    b, h, lq, _ = query.shape
    hkv, lk, width = value.shape[1:]
    weights = row_probabilities(query, key, valid=valid, **terms)
    rows = weights.reshape(b * hkv, (h // hkv) * lq, lk)
    out = widened_product(rows, value.reshape(b * hkv, lk, width)).to(query.dtype)
    return out.view(b, h, lq, width), weights


def row_probabilities(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    valid: Tensor | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Probabilities (B, H, Lq, Lk) of one row or a few, in float32 (float64 for float64 input).

    query (B, H, Lq, D), key (B, Hkv, Lk, D). valid: bool (B, Hkv, Lk), (B|1, Hkv|1, Lq, Lk) or
    (B|1, H, Lq, Lk), True for keys that exist. Keys are never repeated over a group. A row without a valid key
    gives zeros.
    """
    b, h, lq, d = query.shape
    hkv, lk = key.shape[1:3]
    n, wide = b * hkv, torch.float64 if query.dtype == torch.float64 else torch.float32
    # (group, row) pairs of one key head are the rows of one small product.
    q = query.reshape(n, (h // hkv) * lq, d)
    z = widened_product(q.to(wide), key.reshape(n, lk, d).transpose(1, 2)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if position_bias is not None:
        z = (z.view(b, h, lq, lk) + position_bias.to(wide)).view(z.shape)
    if valid is not None:
        if valid.dim() == 4 and valid.shape[1] == h != hkv:
            mask = valid.view(valid.shape[0], hkv, h // hkv, *valid.shape[2:])
        else:
            mask = valid[:, :, None, None] if valid.dim() == 3 else valid[:, :, None]
        z = z.view(b, hkv, -1, lq, lk).masked_fill(~mask, -torch.inf).view(z.shape)
    if sink_logits is not None:
        sink = sink_logits.to(wide).view(1, h, 1, 1).expand(b, h, lq, 1).reshape(n, -1, 1)
        return torch.softmax(torch.cat([z, sink], -1), -1)[..., :-1].reshape(b, h, lq, lk)
    weights = torch.softmax(z, -1)
    if valid is not None:
        weights = weights.nan_to_num(0.0)  # rows without a valid key
    return weights.view(b, h, lq, lk)


def widened_product(left: Tensor, right: Tensor) -> Tensor:
    """``left`` (n, rows, k) times ``right`` (n, k, m) in the dtype of ``left``.

    Logits rounded to half precision would be off by several per cent; and on the CPU small products in half
    precision take several times as long as widening the operand first. A large one is widened one matrix at a
    time into the same memory: asking for as much as all of it takes would cost more than the product.
    """
    if right.dtype == left.dtype:
        return torch.bmm(left, right)
    graph = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if graph or right.device.type != "cpu" or right.numel() < ONE_BY_ONE:
        return torch.bmm(left, right.to(left.dtype))
    wide = torch.empty_like(right[0], dtype=left.dtype)
    return torch.stack([torch.mm(a, wide.copy_(b)) for a, b in zip(left, right, strict=True)])
