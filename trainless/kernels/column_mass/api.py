"""``column_mass``: checks, and the choice of a form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InputError
from ..common import Terms, check_heads, check_shapes
from ..dispatch import Choice, fast_half_matmul, triton_reasons
from ..lse.api import triton_shape_reasons
from ..visibility import Visibility
from . import blocked, fused


def choose(query: Tensor, key: Tensor, *, visibility: Visibility, terms: Terms) -> Choice:
    """Which form ``column_mass`` runs for this call."""
    why = triton_reasons((query, key)) + triton_shape_reasons(query, query, visibility)
    if not why:
        return Choice("triton")
    # On CPUs with tiles for half precision a float32 product is many times slower than the fused pass.
    if query.dtype == torch.bfloat16 and fast_half_matmul():
        cannot = fused.fused_reasons(query, key, visibility, terms)
        return Choice("fused", why) if not cannot else Choice("blocked", cannot + why)
    return Choice("blocked", why)


def column_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    visibility: Visibility,
    scale: float,
    rows: Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    group: str | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The probability that each key receives: sum over rows i of exp(z_ij - lse_i).

    query (B, H, Lq, D), key (B, Hkv, Lk, D), lse (B, H, Lq) as ``attention`` returns it (with learned
    sinks it includes them, and columns then add up to less than the number of rows). rows: bool (B, Lq),
    the rows to sum over; None means those that ``visibility.real`` marks, or all. heads: query heads,
    None for all. group="sum" adds up the query heads of each key head.

    Returns (B, len(heads), Lk), or (B, Hkv, Lk) for groups, in float32 (float64 for float64 input), summed
    in float32 whatever the input. Rows that see nothing add nothing. Raises InputError on shapes that do
    not fit.
    """
    terms = Terms(scale, position_bias, softcap)
    check_shapes(query, key, None, visibility, terms)
    b, h, lq, _ = query.shape
    if tuple(lse.shape) != (b, h, lq):
        raise InputError(f"lse {tuple(lse.shape)}: {(b, h, lq)} is needed")
    rows = visibility.real if rows is None else rows
    if rows is not None and (rows.dtype != torch.bool or rows.shape[-1] != lq or rows.dim() != 2):
        raise InputError(f"rows {rows.dtype} {tuple(rows.shape)}: bool {(b, lq)} is needed")
    if group not in (None, "sum"):
        raise InputError(f"group={group!r}: 'sum' or None")
    chosen = check_heads(heads, h)
    name = choose(query, key, visibility=visibility, terms=terms).name
    if name == "triton":
        from .triton import column_mass as form
    else:
        form = fused.column_mass if name == "fused" else blocked.column_mass
    return form(query, key, lse, visibility=visibility, terms=terms, rows=rows, heads=chosen, group=group)
