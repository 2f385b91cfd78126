"""``spread``: checks. There is one form, in torch, for every device."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ...errors import InputError
from ..common import Terms, check_heads, check_shapes
from ..visibility import Visibility
from .blocked import NAMES, Parts, Spread, spread_parts


def spread(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    wanted: Collection[str],
    *,
    visibility: Visibility,
    scale: float,
    rows: Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    finish: bool = True,
) -> dict[str, Tensor] | Parts:
    """How probability p_ij = exp(z_ij - lse_i) is spread over rows i and keys j; entropies in nats.

    row_entropy (B, h, Lq): sum over keys of -p·log p. row_max (B, h, Lq): the largest p of each row. column_max
    (B, h, Lk): the largest p that each key receives. column_entropy (B, h, Lk): entropy over rows of each key's share,
    p_ij / sum_i p_ij; 0 where the key receives nothing. Each query head has its own: nothing is reduced over the heads
    that share a key head. Whatever takes probability without being a key here (a learned sink, extra keys, both inside
    ``lse``) lowers p and adds no term.

    query (B, H, Lq, D), key (B, Hkv, Lk, D), lse (B, H, Lq) as ``attention`` returns it. wanted: some of the four
    names. rows: bool (B, Lq), the rows that count; None means those that ``visibility.real`` marks, or all. Rows that do
    not count, or see nothing, hold 0 and enter no column. heads: query heads, None for all. finish=False: sums that can
    be joined with those of further keys of the same rows.

    Returns the statistics by name, in float32 (float64 for float64 input). Raises InputError on shapes and names that
    do not fit.
    """
    terms = Terms(scale, position_bias, softcap)
    check_shapes(query, key, None, visibility, terms)
    b, h, lq, _ = query.shape
    if unknown := set(wanted) - set(NAMES):
        raise InputError(f"spread of {sorted(unknown)[0]!r}: one of {', '.join(NAMES)} is needed")
    if tuple(lse.shape) != (b, h, lq):
        raise InputError(f"lse {tuple(lse.shape)}: {(b, h, lq)} is needed")
    rows = visibility.real if rows is None else rows
    if rows is not None and (rows.dtype != torch.bool or rows.shape[-1] != lq or rows.dim() != 2):
        raise InputError(f"rows {rows.dtype} {tuple(rows.shape)}: bool {(b, lq)} is needed")
    parts = spread_parts(Spread(query, key, lse, wanted, visibility, terms, rows, check_heads(heads, h)))
    return parts.finished() if finish else parts


def spread_of(
    probabilities: Tensor, wanted: Collection[str], rows: Tensor | None = None
) -> dict[str, Tensor]:
    """The same of probabilities (B, H, Lq, Lk) that are at hand; rows: bool (B, Lq), those that count."""
    p = probabilities if rows is None else probabilities * rows[:, None, :, None]
    b, h, lq, lk = p.shape
    parts = Parts.zeros(wanted, b, h, lq, lk, p)
    if lq and lk:
        parts.add(p, p.log(), slice(0, lq), slice(0, lk))
    return parts.finished()
