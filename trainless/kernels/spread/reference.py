"""The meaning of ``spread``: dense, readable, in the dtype of its inputs (use float64)."""

from __future__ import annotations

from torch import Tensor, xlogy

from ..lse.reference import logits, probabilities
from .blocked import Spread


def spread(asked: Spread) -> dict[str, Tensor]:
    """See ``api.spread``."""
    query, key, lse, wanted, visibility, terms, rows, heads = asked
    p = probabilities(logits(query, key, visibility, terms), lse.to(query.dtype))
    if rows is not None:
        p = p * rows[:, None, :, None]
    p = p if heads is None else p[:, heads]
    mass = p.sum(2)
    share = p / mass.masked_fill(mass == 0, 1)[:, :, None]
    found = {
        "row_entropy": -xlogy(p, p).sum(3),
        "row_max": p.amax(3),
        "column_max": p.amax(2),
        "column_entropy": -xlogy(share, share).sum(2),
    }
    return {name: found[name] for name in wanted}
