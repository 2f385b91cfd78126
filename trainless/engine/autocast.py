"""The dtypes that torch's own attention computes with under ``autocast``."""

from __future__ import annotations

import torch
from torch import Tensor


def as_computed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as torch's own attention computes with them: under ``autocast`` it narrows them first."""
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)
