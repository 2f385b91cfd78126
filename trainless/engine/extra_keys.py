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


def scaled(call: AttentionCall, extra: Sequence[ExtraKeys], factor: Any) -> list[ExtraKeys]:
    """``extra`` with its biases checked, in the dtype of statistics, and times ``factor``.

    factor: a number, or a tensor broadcastable to (B, H, Lq, 1). Raises InputError for a bias that does not fit.
    """
    return [more if more.bias is None else _scaled(call, more, more.bias, factor) for more in extra]


def _scaled(call: AttentionCall, more: ExtraKeys, bias: Tensor, factor: Any) -> ExtraKeys:
    first, stop = more.rows or (0, call.query.shape[2])
    wanted = (*call.query.shape[:2], stop - first, more.key.shape[2])
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    fits = len(shape) == 4 and all(n in (1, m) for n, m in zip(shape, wanted, strict=True))
    if not fits or not bias.is_floating_point():
        raise InputError(
            f"extra keys: bias of {bias.dtype} {tuple(bias.shape)}; give floats broadcastable to "
            f"(B, H, rows, E) = {wanted}"
        )
    if isinstance(factor, Tensor) and factor.dim() > 1 and factor.shape[-2] > 1:
        factor = factor[..., first:stop, :]
    whole = bias.reshape(shape).to(call.statistics_dtype).expand(-1, -1, *wanted[2:])
    return replace(more, bias=whole * factor)


def merge_extra(
    call: AttentionCall, out: Tensor, lse: Tensor, extra: Sequence[ExtraKeys]
) -> tuple[Tensor, Tensor]:
    """Attention over more keys is attention over each set, weighted by their log-sum-exp: exact.

    extra: as ``scaled`` gives it.
    """
    total, mixed = lse, out.to(lse.dtype)
    for more in extra:
        first, stop = more.rows or (0, total.shape[2])
        query, held = call.query[:, :, first:stop], total[:, :, first:stop]
        seen = visibility(
            more.visible, causal=False, lq=stop - first, lk=more.key.shape[2], device=query.device
        )
        beside, weight = attention(
            query, more.key, more.value, visibility=seen, scale=call.scaling, position_bias=more.bias,
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
