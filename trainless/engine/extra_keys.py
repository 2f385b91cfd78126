"""Extra keys and values beside a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.lse import attention
from ..kernels.visibility import visibility
from ..seams import AttentionCall, ExtraKeys


def fitting(method: str, call: AttentionCall, extra: ExtraKeys) -> ExtraKeys:
    """``extra`` with its bias in four dimensions; InputError, in the method's name, where that does not fit."""
    bias = extra.bias
    if bias is None:
        return extra
    first, stop = extra.rows or (0, call.query.shape[2])
    shape = (*call.query.shape[:2], stop - first, extra.key.shape[2])
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise InputError(
            f"{method}: the bias of extra keys is a {_kind(bias)}; give a float tensor for {shape}"
        )
    bias = bias[(None,) * (4 - bias.dim())]
    if bias.dim() != 4 or any(n not in (1, m) for n, m in zip(bias.shape, shape, strict=True)):
        raise InputError(
            f"{method}: a bias {tuple(bias.shape)} of extra keys does not broadcast to {shape}: batch, query heads, rows "
            "that see them, extra keys"
        )
    return replace(extra, bias=bias.to(call.query.device))


def _kind(given: Any) -> str:
    return f"tensor of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__


def times(extra: ExtraKeys, factor: Any, lq: int) -> ExtraKeys:
    """``extra`` whose logits are multiplied by ``factor``, a number or broadcastable to (B, H, lq, 1).

    Products of queries and keys get it with those of the sequence; the bias is multiplied here.
    """
    if extra.bias is None:
        return extra
    if isinstance(factor, Tensor):
        factor = factor[(None,) * (4 - factor.dim())]
        if extra.rows is not None and factor.shape[2] == lq > 1:
            factor = factor[:, :, extra.rows[0] : extra.rows[1]]
    # Where both are 0 and -inf the key stays hidden.
    return replace(extra, bias=torch.where(extra.bias.isneginf(), extra.bias, extra.bias * factor))


def merge_extra(
    call: AttentionCall, out: Tensor, lse: Tensor, extra: Sequence[ExtraKeys]
) -> tuple[Tensor, Tensor]:
    """Attention over more keys is attention over each set, weighted by their log-sum-exp: exact."""
    total, mixed = lse, out.to(lse.dtype)
    for more in extra:
        first, stop = more.rows or (0, total.shape[2])
        query, held = call.query[:, :, first:stop], total[:, :, first:stop]
        bias, shown = more.bias, more.visible
        if bias is not None:
            hidden = bias.isneginf()
            bias, shown = (
                bias.masked_fill(hidden, 0).to(held.dtype),
                ~hidden if shown is None else shown & ~hidden,
            )
        seen = visibility(shown, causal=False, lq=stop - first, lk=more.key.shape[2], device=query.device)
        beside, weight = attention(
            query, more.key, more.value, visibility=seen, scale=call.scaling, position_bias=bias,
            softcap=call.softcap,
        )  # fmt: skip
        merged = torch.logaddexp(held, weight)
        keep = torch.exp(held - merged).nan_to_num(0.0)[..., None]
        add = torch.exp(weight - merged).nan_to_num(0.0)[..., None]
        made = mixed[:, :, first:stop] * keep + beside.to(lse.dtype) * add
        mixed, total = (
            torch.cat([t[:, :, :first], new, t[:, :, stop:]], 2) if more.rows else new
            for t, new in ((mixed, made), (total, merged))
        )
    return mixed.to(out.dtype), total
