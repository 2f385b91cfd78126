"""Calls in which only some of the tokens take part, chosen anew for each row of the batch."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..errors import InputError
from ..kernels.block_sparse import Subset, block_sparse, choose
from ..kernels.common import Terms
from ..kernels.visibility import Visibility
from ..seams import AttentionCall


def only(visible: Visibility, keep: Tensor) -> Visibility:
    """``visible`` with the keys of ``keep``, bool (B, Lk), alone."""
    if keep.shape[-1] != visible.lk:
        raise InputError(
            f"tokens {tuple(keep.shape)}: bool (B, {visible.lk}) is needed, one per key of the call"
        )
    return replace(visible, keys=keep if visible.keys is None else visible.keys & keep, mask=None)


def over(call: AttentionCall, visible: Visibility, keep: Tensor, terms: Terms) -> tuple[str, str, Tensor]:
    """Attention among the tokens of ``keep``: kernel, why not a faster one, output (B, H, Lq, D)."""
    given = call.query, call.key, call.value
    pattern = Subset(keep[:, keep.shape[1] - call.query.shape[2] :], keep)
    choice = choose(*given, pattern, visibility=visible, terms=terms)
    out = block_sparse(
        *given, pattern, visibility=visible, scale=terms.scale, position_bias=terms.position_bias,
        softcap=terms.softcap, sink_logits=terms.sink_logits,
    )  # fmt: skip
    return f"block_sparse/{choice.name}", "; ".join(choice.reasons), out


def without(out: Tensor, keep: Tensor) -> Tensor:
    """(B, H, Lq, …) with zeros in the rows of tokens that take no part."""
    rows = keep[:, keep.shape[1] - out.shape[2] :]
    return out.masked_fill(~rows[:, None, :, None], 0)
