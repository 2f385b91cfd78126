"""The meaning of ``column_mass``: dense, readable, in the dtype of its inputs (use float64)."""

from __future__ import annotations

from torch import Tensor

from ..common import Terms
from ..lse.reference import logits, probabilities
from ..visibility import Visibility


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
    """sum over rows i of exp(z_ij - lse_i): (B, h, Lk), or (B, Hkv, Lk) when groups are summed."""
    a = probabilities(logits(query, key, visibility, terms), lse.to(query.dtype))
    if rows is not None:
        a = a * rows[:, None, :, None]
    mass = a.sum(2)
    if group == "sum":
        b, h, lk = mass.shape
        if heads is not None:
            keep = mass.new_zeros(h)
            keep[heads] = 1
            mass = mass * keep[:, None]
        return mass.view(b, key.shape[1], -1, lk).sum(2)
    return mass if heads is None else mass[:, heads]
