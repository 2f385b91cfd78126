"""A model whose attention is written out densely by a test: the reference for seams that no method uses yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle.core import attention_set
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "contract_dense"
# (module, query (B,H,Lq,D), key and value (B,H,Lk,D), seen bool (B,H,Lq,Lk), scaling, kwargs) -> (B,H,Lq,D)
Attention = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, float, dict[str, Any]], Tensor]
_now: list[Attention] = []


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    lq, lk = query.shape[2], key.shape[2]
    if attention_mask is None:
        seen = torch.ones(1, 1, lq, lk, dtype=torch.bool)
        seen = seen.tril(lk - lq) if getattr(module, "is_causal", False) else seen
    else:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1e30
    seen = seen.expand(query.shape[0], query.shape[1], lq, lk)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _now[-1](module, query, key, value, seen, scaling, kwargs).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _dense)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def attention_of(model: Any, attention: Attention) -> Iterator[None]:
    """Inside, ``model`` (stock) computes its attention by ``attention``."""
    _now.append(attention)
    try:
        with attention_set(model, NAME):
            yield
    finally:
        _now.pop()


def softmax_over(logits: Tensor, seen: Tensor) -> Tensor:
    """Probabilities over the pairs seen; rows that see nothing are zero."""
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return p.nan_to_num(0.0)
