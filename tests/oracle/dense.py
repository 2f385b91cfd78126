"""Attention written out densely, as a function of transformers' registry: what h2o and streaming are held against.

It computes a whole row of probabilities in plain torch, remembers per module (and per cache layer it serves) which
tokens each kept head still has, and takes nothing from the package under test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "dense_rule"


@dataclass
class Rule:
    """first and recent tokens stay, and ``heavy`` of the rest by the probability they received from every row.

    heads: how many heads the cache holds. tiled: whether query head h reads the kept head h % heads, not h // group.
    """

    recent: int
    first: int = 0
    heavy: int = 0
    heads: int = 1
    tiled: bool = False
    kept: dict[int, Tensor] = field(
        default_factory=dict
    )  # turn of the module within a forward -> bool (heads, L)
    scores: dict[int, Tensor] = field(default_factory=dict)
    turn: int = 0
    length: int = 0


_rules: dict[int, Rule] = {}


def _dense(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    heads, lq, lk = query.shape[1], query.shape[2], key.shape[2]
    group = heads // key.shape[1]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    seen = attention_mask.expand(1, heads, lq, lk)
    logits = (query @ keys.transpose(2, 3)) * scaling
    rule = _rules.get(id(module))
    if rule is not None:
        if rule.length != lk:
            rule.turn, rule.length = 0, lk
        turn, rule.turn = rule.turn, rule.turn + 1
        kept = rule.kept.get(turn, torch.zeros(rule.heads, 0, dtype=torch.bool))
        if lq == lk:
            kept = torch.zeros(rule.heads, 0, dtype=torch.bool)
        kept = torch.cat([kept, torch.ones(rule.heads, lk - kept.shape[1], dtype=torch.bool)], 1)
        of = torch.arange(heads)
        of = of % rule.heads if rule.tiled else of // (heads // rule.heads)
        seen = seen & kept[of][None, :, None]
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    if rule is not None:
        mass = torch.zeros(rule.heads, lk, dtype=p.dtype).index_add_(0, of, p[0].sum(1))
        old = rule.scores.get(turn)
        if old is not None and lq < lk:
            mass[:, : old.shape[1]] += old
        rule.scores[turn] = mass
        rule.kept[turn] = torch.stack([_after(rule, k, m) for k, m in zip(kept, mass, strict=True)])
    return (p @ values).transpose(1, 2).contiguous(), None


def _after(rule: Rule, kept: Tensor, mass: Tensor) -> Tensor:
    """What one head has left after a call."""
    at = torch.arange(len(kept))
    if int(kept.sum()) <= rule.first + rule.recent + rule.heavy:
        return kept
    stays = kept & ((at >= len(kept) - rule.recent) | (at < rule.first))
    free = (kept & ~stays).nonzero()[:, 0].tolist()
    best = sorted(free, key=lambda n: (-float(mass[n]), -n))[: rule.heavy]
    stays[best] = True
    return stays


def _mask(*args: Any, **kwargs: Any) -> Any:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, _dense)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def ruled(model: torch.nn.Module, rules: Mapping[str, Rule]) -> Iterator[None]:
    """Inside, ``model`` attends by this file, under the rules for the modules of these names. One row at a time."""
    parts: Sequence[PreTrainedModel] = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [part.config._attn_implementation for part in parts]
    _rules.update({id(model.get_submodule(name)): rule for name, rule in rules.items()})
    try:
        for part in parts:
            part.set_attn_implementation(NAME)
        yield
    finally:
        for part, name in zip(parts, before, strict=True):
            part.set_attn_implementation(name)
        _rules.clear()
