"""What a cache layer keeps, as a value: budgets and the rule made of them; the cache layers carry it out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import InputError

KEY_SCORES = frozenset({"key_norm", "key_difference"})  # of a rule on the keys alone
Budget = int | float  # a float in (0, 1] is a fraction of the row's own prompt; an int is tokens


def tokens_of(budget: Budget, length: int) -> int:
    """A budget in tokens for a prompt of ``length`` real tokens (fractions round down)."""
    if isinstance(budget, float):
        # 0.1 * 30 is 3.0000000000000004 and 0.7 * 10 is 7.000000000000001, but 0.29 * 100 is
        # 28.999999999999996: a value within rounding of an integer is that integer.
        exact = budget * length
        return round(exact) if abs(exact - round(exact)) < 1e-9 * max(1.0, exact) else int(exact)
    return budget


def check_ratio(ratio: float | None) -> None:
    """InputError unless ``ratio`` is None or in (0, 1]."""
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise InputError(f"ratio={ratio!r}: the share of the prompt that stays must lie in (0, 1]")


def check_budget(name: str, budget: Any) -> None:
    """InputError unless ``budget`` is an int >= 0 or a float in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise InputError(f"{name}={budget!r}: give tokens as an int, or a fraction as a float in (0, 1]")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        instead = f"; for tokens write {name}={max(0, int(budget))}" if math.isfinite(budget) else ""
        raise InputError(
            f"{name}={budget!r}: a float is a fraction of the prompt and must lie in (0, 1]{instead}"
        )
    if isinstance(budget, int) and budget < 0:
        raise InputError(f"{name}={budget!r}: a number of tokens cannot be negative")


@dataclass(frozen=True)
class BudgetParts:
    """What a budget comes to for one row, in tokens: in all, first and last ones, and the rows that score."""

    total: int
    sinks: int
    recent: int
    last: int


@dataclass(frozen=True)
class RowSample:
    """Which rows of a prompt or a turn add to column sums, and how often each counts.

    The first ``whole`` rows count once each; of those after them the last one of every ``every`` stands for its run
    and counts ``every`` times, rows after the last full run not at all. Up to ``whole`` tokens the sums are the full
    ones; after that they estimate them from 1 / every of the rows. A prefill in chunks is counted through.
    """

    whole: int = 128
    every: int = 32

    def times(self, number: Tensor) -> Tensor:
        """How often each row counts (int64); number: how many real rows of the turn stand before it."""
        beyond = number - self.whole
        standing = (beyond >= 0) & (beyond % self.every == self.every - 1)
        return (beyond < 0).long() + standing * self.every


@dataclass(frozen=True)
class Budgets:
    """How what a row may keep is spread over its layers and heads; the sum over the heads of a model stays the same.

    among: "head": every head of a layer keeps as much as the others. "layer": the heads of a layer share one budget, so
    that the tokens of highest score stay whatever head they are of, but each head keeps its best ``floor`` of an equal
    share ("Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference"). That is
    decided when something has to go for the first time; after that each head has the budget that it then got.

    pyramid: (layer, layers): budgets fall linearly from the first layer to the last ("PyramidKV: Dynamic KV Cache
    Compression based on Pyramidal Information Funneling"). Of n tokens that a layer would keep beside w that always stay,
    the last layer keeps n / steepness and the first 2n less that; where that is more than the prompt has, it keeps all of
    the prompt, and the last as much less. None: every layer keeps the same.
    """

    among: str = "head"
    floor: float = 0.2
    pyramid: tuple[int, int] | None = None
    steepness: float = 20.0

    def __post_init__(self) -> None:
        if self.among not in ("head", "layer") or not 0.0 <= self.floor <= 1.0:
            raise InputError(
                f"budgets among {self.among!r} with floor={self.floor!r}: head or layer, and 0 to 1"
            )

    def of_layer(self, total: int, always: int, length: int) -> int:
        """What this layer keeps of a prompt of ``length``, where equal layers keep ``total``, ``always`` among them."""
        if self.pyramid is None or self.pyramid[1] < 2 or total >= length or total <= always:
            return total
        layer, layers = self.pyramid
        free = total - always
        least = free / self.steepness
        most = 2 * free - least
        if most > length - always:
            most = float(length - always)
            least = 2 * free - most
        return always + round(most - layer * (most - least) / (layers - 1))


@dataclass(frozen=True)
class Replay:
    """Score what a prompt has cached by reading it a second time, and choose among all layers together.

    When the call over an empty cache is over (of a prefill in chunks, the last), its own inputs are given to the model
    again, ``chunk`` tokens of each row at a time, at the positions that follow the prompt's. A pair, the key and value of
    one token in one key/value head, has as score the largest probability that a row of its own chunk, in any query head
    of the group, has for it; the softmax is over the ``sinks`` of the rule, the cached keys of the chunk and the chunk's
    own keys up to the row. Nothing of the second reading stays.

    among: of a row's pairs the best of the whole "model" stay, of each "layer", or of each "head". floor: the share of
    what a head would have of an equal split that its best tokens get in any case.
    """

    chunk: int = 2048
    among: str = "model"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.among not in ("model", "layer", "head") or not 0.0 <= self.floor <= 1.0 or self.chunk < 1:
            raise InputError(
                f"a replay among {self.among!r} with floor={self.floor!r} and chunk={self.chunk!r}: model, layer or "
                "head, 0 to 1, and at least 1 token"
            )


@dataclass(frozen=True)
class Evict:
    """A rule for what a cache layer keeps after each call: first + recent + the best of the rest.

    sinks: the first visible tokens. recent: the last ones. heavy: those among the rest with the
    highest score. The newest token is always kept; ties go to the newer one.

    capacity: how many tokens stay in all, whatever ``heavy`` says. Where it is a fraction, the sinks, the recent
    tokens and the rows that score have at most half of it each.

    protect: tokens that were given, in a prompt or in a later turn of several tokens, never go; the budgets without
    the sinks are then for what was generated.

    score: "column_mass" adds up the probability that each key received from every row so far, or of each turn from
    the rows of ``sample`` alone;
    "probe_mass" is what it received from the ``last`` real rows of this call alone, and earlier calls have no
    say. "key_norm" and "key_difference" need no attention: the layer computes them from the keys that it holds when it
    chooses. The first is minus a key's Euclidean norm, the second minus its cosine with the mean of the row's keys of
    that head, each divided by its norm; only with ``once``, since every later choice would compare anew.
    None scores nothing (heavy must then be 0). seed: not attention says what stays but a draw,
    ``kernels.draws.draws(seed, …)``. gqa: how the query heads of a group share a key/value head's score: sum, first,
    max, mean; shared: one score for the whole layer, the mean over its heads, so that all key/value heads keep the same
    tokens. normalise: divide each score by the rows that could see the key. pool: the scores of the tokens that
    are free to go are pooled over so many neighbours first (odd; stride 1, zeros beyond both ends), pooling:
    avg or max.

    chosen: the method itself says after a call what stays, by the contribution's value: bool (B, Lk) over the
    columns of ``call.key``, the same for all heads, or None to keep everything; no budget applies, and ``capacity``
    only tells how many it will choose of a prompt, where that is known. Tokens cannot be taken back, so assisted
    decoding is refused.

    once: choose at the end of the first prefill, and keep everything that comes after it.
    rolled: keys are presented as if the kept tokens were contiguous.
    budgets: how they are spread over layers and heads; None: evenly.
    replay: the prompt is read a second time, which says what of it stays; ``capacity`` is then the share of the pairs.
    """

    sinks: Budget = 0
    recent: Budget = 0
    heavy: Budget = 0
    capacity: Budget | None = None
    score: str | None = None
    sample: RowSample | None = None
    last: int = 0
    gqa: str = "sum"
    shared: bool = False
    normalise: bool = False
    pool: int = 1
    pooling: str = "avg"
    once: bool = False
    chosen: bool = False
    rolled: bool = False
    protect: bool = False
    seed: int | None = None
    budgets: Budgets | None = None
    replay: Replay | None = None

    def __post_init__(self) -> None:
        if self.replay is not None and not (
            self.once
            and isinstance(self.capacity, float)
            and isinstance(self.sinks, int)
            and self.score is None
            and not (self.recent or self.heavy or self.rolled)
        ):
            raise InputError(
                "replay chooses once, by scores of its own, a share (capacity) of what is cached, beside sinks in tokens"
            )
        if (self.score == "probe_mass") != (self.last > 0):
            raise InputError(
                'score="probe_mass" needs last=, the number of rows to score by, and only it does'
            )
        if self.sample is not None and self.score != "column_mass":
            raise InputError('sample= names rows for score="column_mass" alone')
        if self.protect and (self.once or self.chosen):
            raise InputError("protect needs a rule with a budget that goes on after the prompt")
        if self.of_keys and (not self.once or self.shared or self.normalise or self.pool > 1):
            raise InputError(
                f'score="{self.score}" compares the keys of a prompt, head by head: with once=True, and without shared=, '
                "normalise= and pool="
            )
        if self.budgets is not None:
            self._check_budgets(self.budgets)
        if self.pool % 2 == 0 or (self.pool > 1 and not self.once):
            raise InputError(f"pool={self.pool}: an odd number of neighbours, with once=True")

    def _check_budgets(self, budgets: Budgets) -> None:
        if self.chosen or self.protect or self.rolled:
            raise InputError(
                "budgets that differ need a rule of this layer's own, without protect= and rolled="
            )
        if budgets.among == "layer" and (self.shared or self.score is None):
            raise InputError(
                "heads that share one budget need a score of each head's own: shared=False and score="
            )

    @property
    def parts_heads(self) -> bool:
        """Whether heads may hold different numbers of tokens, by budgets that they share or by a choice made once."""
        return self.by_head or self.replay is not None or (self.chosen and self.once)

    @property
    def by_head(self) -> bool:
        """Whether the heads of a row may end up with different numbers of tokens."""
        return self.budgets is not None and self.budgets.among == "layer"

    @property
    def floor(self) -> float:
        """The share of an equal budget that each head keeps where heads share one."""
        return 0.0 if self.budgets is None else self.budgets.floor

    def total(self, length: int) -> int:
        """Tokens that a row with a prompt of ``length`` tokens keeps: at least 1, the newest."""
        if self.chosen and self.capacity is None:
            return length
        return self.parts(length).total + (length if self.protect else 0)

    def parts(self, length: int) -> BudgetParts:
        """The budget of a row with a prompt of ``length`` tokens; the given ones come on top of it under ``protect``."""
        even = self._even(length)
        if self.budgets is None:
            return even
        total = self.budgets.of_layer(even.total, max(even.sinks + even.recent, 1), length)
        return replace(even, total=total)

    def _even(self, length: int) -> BudgetParts:
        """The same where all layers keep as much."""
        sinks, recent, heavy = (tokens_of(b, length) for b in (self.sinks, self.recent, self.heavy))
        if self.protect:
            sinks = 0  # they are among those that never go
        if self.capacity is None:
            return BudgetParts(max(1, sinks + recent + heavy), sinks, recent, self.last)
        total = max(1, tokens_of(self.capacity, length))
        if isinstance(self.capacity, float):
            half = total // 2
            return BudgetParts(total, min(sinks, half), min(recent, half), min(self.last, max(1, half)))
        return BudgetParts(max(total, min(length, sinks + recent)), sinks, recent, self.last)

    @property
    def of_keys(self) -> bool:
        """Whether what stays is chosen by the keys alone."""
        return self.score in KEY_SCORES

    @property
    def fixed(self) -> int:
        """Tokens that every row keeps, whatever the length of its prompt."""
        budgets = (self.sinks, self.recent, self.heavy) if self.capacity is None else (self.capacity,)
        return sum(b for b in budgets if isinstance(b, int))
