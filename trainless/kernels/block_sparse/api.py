"""``block_sparse``: checks, and the choice of a form."""

from __future__ import annotations

from torch import Tensor

from ..common import Terms, check_shapes
from ..dispatch import Choice, triton_reasons
from ..lse.api import triton_shape_reasons
from ..visibility import Visibility
from . import blocked
from .patterns import Pattern


def choose(query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, terms: Terms) -> Choice:
    """Which form ``block_sparse`` runs for this call."""
    why = triton_reasons((query, key, value)) + triton_shape_reasons(query, value, visibility)
    return Choice("triton") if not why else Choice("blocked", why)


def block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    visibility: Visibility,
    scale: float,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the pairs that both the mask and ``pattern`` allow.

    query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv); query head i reads key head
    i // (H / Hkv). pattern: a ``Subset`` of the tokens, listed ``Blocks`` or ``Spans`` per head; what it leaves
    out is not computed. The other arguments are those of ``attention``.

    Returns (B, H, Lq, Dv) in the dtype of ``query``; a row that sees no key, or is not among the chosen queries,
    is zero. Raises InputError when shapes do not fit.
    """
    terms = Terms(scale, position_bias, softcap, sink_logits)
    check_shapes(query, key, value, visibility, terms)
    b, h, lq, _ = query.shape
    pattern.check(b, h, lq, key.shape[2], visibility.causal)
    if choose(query, key, value, visibility=visibility, terms=terms).name == "triton":
        from .triton import block_sparse as on_triton

        return on_triton(query, key, value, pattern, visibility=visibility, terms=terms)
    out: Tensor = blocked.block_sparse(query, key, value, pattern, visibility=visibility, terms=terms)
    return out
