"""The vocabulary: where a method may act, what it may contribute there, and how contributions meet.

A method never forks a model's forward. It *contributes* to *sites*. A contribution is an object of the class of its
kind: what it needs to know, and one function ``(call, statistics, state) -> value``. The engine
(``trainless.engine``) merges the contributions of all methods at a site into an ``AttentionPlan`` and
runs it; the cache layers (``trainless.cache``) carry out the rules of eviction and precision. Nothing in here knows a
model or a method.

Shapes: B batch, H query heads, Hkv key/value heads, Lq queries and Lk keys of this call, D head width.
"""

from __future__ import annotations

from .calls import AttentionCall, Groups, ImageTokens, ModuleCall, Site, State, Statistics, StepRow
from .contributions import (
    Around,
    Cache,
    Contribution,
    Form,
    Gain,
    Input,
    Keys,
    Logits,
    Mass,
    Observe,
    Pattern,
    Position,
    Probes,
    Scale,
    Value,
    Weights,
)
from .eviction import Budget, Budgets, Evict, Replay, RowSample, check_budget, check_ratio, tokens_of
from .kinds import BESIDE, EXCLUSIVE, FACTS, KINDS, SCOPES, STATISTICS
from .lease import Lease
from .parameters import layer_of, parameter_of, unwrapped, why_not_plain
from .plans import AttentionPlan, Entry
from .precision import BITS, Quantise, check_bits
from .values import ExtraKeys, Formed, MassMove, Pairs, RowEdit, Tokens

__all__ = [
    "BESIDE",
    "BITS",
    "EXCLUSIVE",
    "FACTS",
    "KINDS",
    "SCOPES",
    "STATISTICS",
    "Around",
    "AttentionCall",
    "AttentionPlan",
    "Budget",
    "Budgets",
    "Cache",
    "Contribution",
    "Entry",
    "Evict",
    "ExtraKeys",
    "Form",
    "Formed",
    "Gain",
    "Groups",
    "ImageTokens",
    "Input",
    "Keys",
    "Lease",
    "Logits",
    "Mass",
    "MassMove",
    "ModuleCall",
    "Observe",
    "Pairs",
    "Pattern",
    "Position",
    "Probes",
    "Quantise",
    "Replay",
    "RowEdit",
    "RowSample",
    "Scale",
    "Site",
    "State",
    "Statistics",
    "StepRow",
    "Tokens",
    "Value",
    "Weights",
    "check_bits",
    "check_budget",
    "check_ratio",
    "layer_of",
    "parameter_of",
    "tokens_of",
    "unwrapped",
    "why_not_plain",
]
