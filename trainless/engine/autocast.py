"""The dtypes that torch's own attention computes with under ``autocast``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..seams import AttentionCall

Delegate = Callable[[AttentionCall], Tensor]  # plain attention of a call, (B, Lq, H, D)


def narrowed(call: AttentionCall) -> bool:
    """Whether torch's own attention would compute this call in the dtype of ``autocast``."""
    return torch.is_autocast_enabled(call.query.device.type) and call.query.dtype != torch.float64


def as_computed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as torch's own attention computes with them: under ``autocast`` it narrows them first."""
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def under_autocast(
    call: AttentionCall, delegate: Delegate, run: Callable[[AttentionCall, Delegate], Tensor]
) -> Tensor:
    """``run`` for what torch's own attention would be given, with our own sums as precise as without ``autocast``.

    It would narrow every product in here, statistics and shares of probability among them.
    """
    device = call.query.device.type
    dtype = torch.get_autocast_dtype(device)
    query, key, value = as_computed(call.query, call.key, call.value)

    def own(plain: AttentionCall) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return delegate(plain)

    with torch.autocast(device, enabled=False):
        return run(replace(call, query=query, key=key, value=value), own)
