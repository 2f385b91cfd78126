"""The buffers of a cache of fixed size whose slots hold kept tokens, and the rule by which they go.

Every tensor keeps its size and its address for as long as the cache lives, and everything that a decode step has to
know stands in tensors, so that a step can be traced whole and replayed from a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ..common import Terms
from ..tickets import TICKETS
from ..turning import Turn

EVERYTHING = 1 << 30  # a limit in tokens that no buffer reaches
SCORES = (None, "sum", "last", "draw")
ADDED = ("sum", "last")  # scores that are made of probabilities, and stand in the buffers
GROUPS = ("sum", "mean", "max", "first")


@dataclass(frozen=True)
class SlotRule:
    """What is compared when a token has to go; the one with the least goes, among equals the oldest.

    score: None compares positions, so that the oldest goes; "sum" adds the probability that each token receives to
    its score at every step; "last" puts the probability of this step in the place of the score; "draw" compares the
    number that ``draws.drawn`` gives each token, by the ``lots`` of its head.
    gqa: how the query heads of a key head share one score. shared: one score for all heads of a row, the mean, so
    that all of them keep the same tokens in the same slots. normalise: scores are divided by the number of tokens that
    could have read the key. Raises InputError for unknown names.
    """

    score: str | None = None
    gqa: str = "sum"
    shared: bool = False
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.score not in SCORES or self.gqa not in GROUPS:
            raise InputError(
                f"score={self.score!r}, gqa={self.gqa!r}: one of {SCORES} and of {GROUPS} is needed"
            )


@dataclass
class FixedSlots:
    """Slots of one layer. B batch rows, Hkv key heads, S slots; a slot holds a token, or nothing.

    keys (B, Hkv, S, D), values (B, Hkv, S, Dv): what an empty slot holds is finite and is never read as a token.
    positions (B, Hkv, S) int32: how many real tokens of the row came before the token; -1 for an empty slot.
    scores (B, Hkv, S) float32 (float64 for a float64 model), or None where the rule compares positions.
    free (B, Hkv) int32: the first empty slot, which the next token is written to. There always is one.
    age (B,) int32: real tokens that the row has seen. count (B,) int32: tokens that it holds, in every key head.
    limit (B,) int32: tokens that a row holds after a step, at most; S - 1 where that is less. recent (B,) int32: the
    newest tokens, which do not go; the newest one never does. never (B, R, 2) int32 or None: runs [start, stop) of
    positions that never go (first tokens, a prompt); an empty run has start = stop. shifts (B, Hkv, S) int32 or None: by
    how many positions the key of a slot is turned when it is read, so that kept tokens look contiguous: the tokens that
    went between it and the newest one. lots (B, Hkv) int64 or None: what ``draws.lots`` gives, for a rule that draws.

    tickets (B, Hkv, TICKETS) int32: zero between calls; what the programs of a kernel count each other by.

    A row whose limit exceeds the tokens that may not go by one at least always finds one that may.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    free: Tensor
    age: Tensor
    count: Tensor
    limit: Tensor
    recent: Tensor
    tickets: Tensor
    scores: Tensor | None = None
    never: Tensor | None = None
    shifts: Tensor | None = None
    lots: Tensor | None = None

    @property
    def size(self) -> int:
        return self.keys.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if t is not None}


class SlotStep(NamedTuple):
    """One step: a token for every row, the buffers, and how they are read and kept; see ``api.slot_decode``.

    turn: given where the buffers have shifts, and only there.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    slots: FixedSlots
    rule: SlotRule
    terms: Terms
    real: Tensor | None = None
    turn: Turn | None = None


def fixed_slots(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    size: int,
    *,
    age: Tensor,
    limit: Tensor | int,
    recent: Tensor | int = 0,
    scores: Tensor | None = None,
    never: Tensor | None = None,
    shifts: Tensor | None = None,
    lots: Tensor | None = None,
) -> FixedSlots:
    """Buffers of ``size`` slots, the first of which hold what is given; for the end of a prefill.

    keys (B, Hkv, W, D), values (B, Hkv, W, Dv), positions (B, Hkv, W) with -1 for empty slots, W < ``size``; scores
    (B, Hkv, W), age (B,), limit and recent (B,) or one number, never (B, R, 2), shifts (B, Hkv, W), lots (Hkv,).
    Everything is copied.
    Raises InputError where that does not fit. Looks at no value, so it may be called while a graph is captured.
    """
    b, hkv, width = positions.shape
    if keys.shape[:3] != (b, hkv, width) or values.shape[:3] != (b, hkv, width) or width >= size:
        raise InputError(
            f"slots: keys {tuple(keys.shape)}, values {tuple(values.shape)} and positions {tuple(positions.shape)} "
            f"do not fit {size} slots, one of which has to stay empty"
        )

    def wide(t: Tensor, fill: float, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.full((*t.shape[:2], size, *t.shape[3:]), fill, dtype=dtype or t.dtype, device=t.device)
        made[:, :, :width] = t
        return made

    def rowwise(number: Tensor | int) -> Tensor:
        if isinstance(number, Tensor):
            return number.to(keys.device, torch.int32, copy=True)
        return torch.full((b,), min(number, EVERYTHING), dtype=torch.int32, device=keys.device)

    placed = wide(positions, -1, torch.int32)
    return FixedSlots(
        wide(keys, 0),
        wide(values, 0),
        placed,
        (placed < 0).int().argmax(2).to(torch.int32),
        rowwise(age),
        (placed[:, 0] >= 0).sum(1).to(torch.int32),
        rowwise(limit),
        rowwise(recent),
        torch.zeros(b, hkv, TICKETS, dtype=torch.int32, device=keys.device),
        None if scores is None else wide(scores, 0),
        None if never is None else never.to(keys.device, torch.int32, copy=True),
        None if shifts is None else wide(shifts, 0, torch.int32),
        None if lots is None else lots.to(keys.device, torch.int64).expand(b, hkv).contiguous(),
    )
