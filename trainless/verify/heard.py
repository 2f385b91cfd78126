"""What one attention call says while it is watched, and what is found out about a site from all of its calls."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from torch import Tensor

from ..engine.watching import Made
from ..seams import AttentionCall, Entry, Groups, MassMove, Statistics
from .caches import History, Update


@dataclasses.dataclass
class Value:
    """What one contribution returned in a call, and what it was shown."""

    entry: Entry
    call: AttentionCall
    stats: Statistics
    given: Any
    positions: Tensor | None  # of the slots of the cache, at that moment
    blocks: list[tuple[int, Tensor, Tensor]] = dataclasses.field(default_factory=list)  # of a RowEdit


@dataclasses.dataclass
class Heard:
    """One call: as the model made it, as methods were told of it, and what they returned."""

    made: Made
    updates: list[Update]  # of caches, by the module around the call, since its last one
    last: Update | None = None  # of the same forward, also before its last call
    call: AttentionCall | None = None
    values: list[Value] = dataclasses.field(default_factory=list)
    groups: dict[int, Groups] = dataclasses.field(
        default_factory=dict
    )  # by the id of the entry that named them


@dataclasses.dataclass
class Record:
    """What was found at one site: per check, how often it held, what is wrong, and why it could not be made."""

    calls: int = 0
    passed_over: int = 0
    held: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    reasons: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    worst: float = 0.0  # of the results: as a share of what rounding may do
    gap: float = 0.0  # of the results: as a share of the largest value
    codes: float = 0.0
    seams: set[str] = dataclasses.field(default_factory=set)

    def fail(self, check: str, what: str) -> None:
        self.wrong.setdefault(check, []).append(what)

    def skip(self, check: str, why: str) -> None:
        self.reasons.setdefault(check, Counter())[why] += 1


# ---------------------------------------------------------------- slots of a cache as columns of the sequence


def in_columns_of(move: MassMove, value: Value, history: History | None, lk: int) -> MassMove:
    heads = value.entry.contribution.heads
    source = in_columns(move.source, value, history, heads, lk)
    target = None if move.target is None else in_columns(move.target, value, history, heads, lk)
    return dataclasses.replace(move, source=source, target=target)


def in_columns(
    tensor: Tensor, value: Value, history: History | None, heads: tuple[int, ...] | None, lk: int
) -> Tensor:
    """(B, h, …, slots) to (B, h, …, T): what stands in a slot, in the column of the token that it holds."""
    if value.positions is None or history is None or history.of_head is None:
        return tensor
    b, h = tensor.shape[:2]
    mine = history.of_head if heads is None else history.of_head[list(heads)]
    positions = value.positions[:, mine] if h > 1 or len(mine) == 1 else value.positions[:, :1]
    columns = history._columns(positions).masked_fill(positions < 0, lk)
    shape = (*tensor.shape[:-1], tensor.shape[-1])
    index = columns.reshape(b, h, *[1] * (tensor.dim() - 3), columns.shape[-1]).expand(shape)
    wider = tensor.new_zeros(*tensor.shape[:-1], lk + 1)
    return wider.scatter(-1, index, tensor)[..., :lk]
