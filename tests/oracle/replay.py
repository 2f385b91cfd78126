"""Feed a causal model call by call, by hand, so that every cut into prefill, steps and turns can be tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .core import Rule, install


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, 0 on padding; (B, L)."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)


def real_rows(attention_mask: Tensor | None, calls: Sequence[int], batch: int) -> list[Tensor]:
    """For each call, bool (B, m): the positions that are no padding, the only ones worth comparing."""
    if attention_mask is None:
        return [torch.ones(batch, m, dtype=torch.bool) for m in calls]
    return list(attention_mask[:, : sum(calls)].bool().split(list(calls), dim=1))


@torch.no_grad()
def replay(
    model: nn.Module,
    rule: Rule | Sequence[Rule] | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    calls: Sequence[int] | None = None,
    cache: Any = None,
) -> list[Tensor]:
    """Logits (B, m, V) of every call of m tokens; ``calls`` are the sizes, one call by default.

    With a rule the model must be stock; it runs through the oracle. ``rule=None`` runs the model as it
    is, patched or not, through the same driver; ``()`` is the oracle without a rule. ``cache`` defaults
    to ``DynamicCache()``, whose layers keep everything.
    """
    if rule is not None:
        with install(model, rule):
            return replay(model, None, input_ids, attention_mask, calls, cache)
    calls = [input_ids.shape[1]] if calls is None else list(calls)
    if sum(calls) > input_ids.shape[1]:
        raise ValueError(f"calls {calls} need {sum(calls)} tokens, input has {input_ids.shape[1]}")
    cache = DynamicCache() if cache is None else cache
    every = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = position_ids(every)
    logits, start = [], 0
    for size in calls:
        stop = start + size
        out = model(
            input_ids=input_ids[:, start:stop],
            attention_mask=None if attention_mask is None else attention_mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
        start = stop
    return logits
