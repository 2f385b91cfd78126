"""``block_sparse``: checks, and the choice of a form."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...errors import InputError
from ..common import Terms, check_shapes
from ..dispatch import Choice, triton_reasons
from ..lse.api import triton_shape_reasons
from ..visibility import Visibility
from . import blocked
from .patterns import Blocks, Pattern


def choose(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, *, visibility: Visibility, terms: Terms
) -> Choice:
    """Which form ``block_sparse`` runs for this call."""
    why = triton_reasons((query, key, value)) + triton_shape_reasons(query, value, visibility)
    if isinstance(pattern, Blocks) and pattern.size < 16:
        why += (f"triton: blocks of {pattern.size}",)
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
    if isinstance(pattern, Blocks) and pattern.start is not None:
        return _row_by_row(query, key, value, pattern, visibility, terms)
    if choose(query, key, value, pattern, visibility=visibility, terms=terms).name == "triton":
        from .triton import block_sparse as on_triton

        return on_triton(query, key, value, pattern, visibility=visibility, terms=terms)
    out: Tensor = blocked.block_sparse(query, key, value, pattern, visibility=visibility, terms=terms)
    return out


def sliceable(visibility: Visibility, terms: Terms) -> bool:
    """Whether a call can be cut to the tokens of a row of its batch, for blocks that begin at each row's own."""
    return visibility.structured and visibility.offset == 0 and terms.position_bias is None


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, pattern: Blocks, visibility: Visibility, terms: Terms
) -> Tensor:
    """Each row of the batch by itself, from where its blocks begin."""
    if not sliceable(visibility, terms):
        raise InputError(
            "blocks with a start of their own need a plain mask over as many keys as queries, and no bias"
        )
    assert pattern.start is not None
    lq = query.shape[2]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for batch, start in enumerate(pattern.start.tolist()):
        if start >= lq:
            continue
        one, tokens = slice(batch, batch + 1), lq - start
        seen = visibility.row_of_batch(batch)
        keys = None if seen.keys is None or bool(seen.keys[:, start:].all()) else seen.keys[:, start:]
        out[one, :, start:] = block_sparse(
            query[one, :, start:], key[one, :, start:], value[one, :, start:], pattern.of_row(batch, tokens),
            visibility=replace(seen, lq=tokens, lk=tokens, keys=keys), scale=terms.scale, softcap=terms.softcap,
            sink_logits=terms.sink_logits,
        )  # fmt: skip
    return out
