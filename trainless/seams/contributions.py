"""What a method gives: one class for each kind of contribution, with the fields that this kind can use.

A field that a kind has no use for does not exist on its class, so that giving it is a TypeError; values that make no
sense together are an InputError. Both come when the contribution is made, which is when the patch is put on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from ..errors import InputError
from .calls import AttentionCall, Groups, ModuleCall, State, Statistics, StepRow
from .eviction import Evict
from .kinds import FACTS, SCOPES, STATISTICS
from .precision import Quantise

Value = Callable[[AttentionCall, Statistics, State], Any]
# Which query rows a contribution wants the column mass of: bool (B, Lq) or (Lq,), or row numbers, int64 (B, P)
# or (P,), with -1 for none and a row that is named twice counted twice; None for no rows. Pads never count.
Probes = Callable[[AttentionCall, State], Tensor | None]
# Statistics that `value` reads: always these, or by the call; then `statistics` names all that it may ask for.
Needs = Collection[str] | Callable[[AttentionCall, State], Collection[str]]


class Contribution:
    """What one method does at one site: the base of the class of each kind, never made itself.

    The attributes below are how the engine reads any of them; a kind takes those that are fields of its own class.
    What several kinds take means the same everywhere:

    value: what it does, asked at each call; it may return None to decline the call, which then runs as if the
    contribution were not there. inert: it is known now to change nothing; the engine then runs the stock kernel. scope:
    how long its State lasts, one of SCOPES. asks: facts among FACTS that ``value`` reads from the call. needs: the
    statistics that ``value`` reads, as a set, or as a function of ``(call, state)`` where that differs between prefill
    and decode; ``statistics`` then names every one that it may ask for. probes: the rows of the statistic
    "probe_mass", at a cost that grows with their number only. groups: asks for group_mass; None: not in this call.
    heads: limits it to some query heads (None: all). lookahead: a row's result depends on later rows of the same call,
    so a prefill cut into chunks would differ. traceable: ``value`` can be traced by a compiler: it looks at no tensor's
    values, reads the sizes of the call as numbers, and changes nothing that outlives the call; others run outside of
    compiled graphs. least: from about so many tokens on a call gives it something to do, so that verify tries it on as
    many.
    """

    kind: ClassVar[str] = ""

    value: Callable[..., Any] | None = None
    constant: float | None = None
    inert: bool = False
    traceable: bool = False
    scope: str = "call"
    asks: frozenset[str] = frozenset()
    needs: Needs = ()
    statistics: frozenset[str] = frozenset()
    probes: Probes | None = None
    groups: Callable[[AttentionCall, State], Groups | None] | None = None
    heads: tuple[int, ...] | None = None
    lookahead: bool = False
    in_order: bool = False
    least: int = 0
    first: bool = False
    by_head: bool = False
    admits: frozenset[str] = frozenset()
    plain: Callable[[AttentionCall], Tensor] | None = None
    policy: Evict | Quantise | None = None
    tensors: Mapping[str, Tensor] | None = None
    module: str = ""

    def __init__(self, *given: Any, **named: Any) -> None:
        raise TypeError("a contribution is made by the class of its kind: Scale, Pattern, Gain, Cache, …")

    @property
    def dynamic(self) -> bool:
        """Whether it is a pattern that is chosen from statistics."""
        return False

    @property
    def stateful(self) -> bool:
        """Whether it keeps a State with the sequence, and so needs the cache layer of its calls."""
        return self.scope in ("sequence", "layers")

    def wanted(self, call: AttentionCall, state: State) -> Collection[str]:
        """The statistics that ``value`` reads in this call."""
        if not callable(self.needs):
            return self.needs
        asked = self.needs(call, state)
        if more := set(asked) - self.statistics:
            raise InputError(
                f"seam {self.kind} needs {sorted(more)[0]!r}, which its `statistics` do not name"
            )
        return asked

    def but(self, **changes: Any) -> Contribution:
        """The same contribution with other values for some of its fields."""
        made: Contribution = replace(self, **changes)  # type: ignore[type-var]
        return made

    def __post_init__(self) -> None:
        said = f"seam {self.kind}"
        for name in ("value", "probes", "groups", "plain"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise InputError(f"{said}: {name}={getattr(self, name)!r} is no function")
        if self.scope not in SCOPES:
            raise InputError(f"{said}: scope={self.scope!r}: a State lasts for one of {', '.join(SCOPES)}")
        self._put("asks", frozenset(self.asks))
        if unknown := self.asks - set(FACTS):
            raise InputError(
                f"{said}: no host knows the fact {sorted(unknown)[0]!r}; known: {', '.join(FACTS)}"
            )
        self._check_statistics(said)
        if self.heads is not None:
            self._put("heads", tuple(self.heads))
            if not self.heads or len(set(self.heads)) < len(self.heads) or min(self.heads) < 0:
                raise InputError(
                    f"{said}: heads={self.heads}: give distinct query heads from 0, or None for all"
                )
        self._check(said)

    def _check_statistics(self, said: str) -> None:
        """Complete ``statistics``, and hold together what asks for them."""
        named = frozenset(self.statistics)
        if not callable(self.needs):
            if isinstance(self.needs, str):
                raise InputError(f"{said}: needs={self.needs!r}: give a set of names")
            named |= frozenset(self.needs)
        elif not named:
            raise InputError(f"{said}: needs depends on the call, so say by `statistics` what it may ask for")
        if self.groups is not None:
            named |= {"group_mass"}
        if unknown := named - set(STATISTICS):
            raise InputError(
                f"{said}: there is no statistic {sorted(unknown)[0]!r}; known: {', '.join(STATISTICS)}"
            )
        if self.groups is None and "group_mass" in named:
            raise InputError(f'{said}: "group_mass" is asked for by `groups`, which say of which keys')
        if (self.probes is None) == ("probe_mass" in named):
            raise InputError(f'{said}: what needs "probe_mass" says by `probes` of which rows, and only that')
        if named:
            self._put("statistics", named)

    def _check(self, said: str) -> None:
        """What only this kind has to hold together."""

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class _Attending(Contribution):
    """Has a say at attention calls."""

    inert: bool = field(default=False, kw_only=True)
    traceable: bool = field(default=False, kw_only=True)
    scope: str = field(default="call", kw_only=True)
    asks: frozenset[str] = field(default=frozenset(), kw_only=True)
    least: int = field(default=0, kw_only=True)


@dataclass(frozen=True, eq=False)
class _Measuring(_Attending):
    """Is asked when the statistics of the call are there."""

    needs: Needs = field(default=(), kw_only=True)
    statistics: frozenset[str] = field(default=frozenset(), kw_only=True)
    probes: Probes | None = field(default=None, kw_only=True)
    lookahead: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, eq=False)
class _OnHeads(_Measuring):
    """Acts on heads, and may ask for the mass of groups of keys."""

    groups: Callable[[AttentionCall, State], Groups | None] | None = field(default=None, kw_only=True)
    heads: tuple[int, ...] | None = field(default=None, kw_only=True)


def _one_of(said: str, given: Contribution) -> None:
    """InputError unless either a function or a number was given."""
    if (given.value is None) == (given.constant is None):
        both = "both are given" if given.value is not None else "neither is given"
        raise InputError(f"{said}: it is either a value, asked at each call, or a constant, and {both}")
    if given.constant is not None and not math.isfinite(given.constant):
        raise InputError(f"{said}: constant={given.constant!r} is not finite")


# ---------------------------------------------------------------- before the softmax


@dataclass(frozen=True, eq=False)
class Position(_Attending):
    """Positions that keys carry. value: rotation steps to add to each key, int64 (B, Hkv, Lk)."""

    kind: ClassVar[str] = "position"
    value: Value = field()


@dataclass(frozen=True, eq=False)
class Keys(_Attending):
    """Keys and values beside the sequence. value: ``ExtraKeys``."""

    kind: ClassVar[str] = "keys"
    value: Value = field()


@dataclass(frozen=True, eq=False)
class Scale(_Attending):
    """Factor on the logits. value: a number, or a tensor broadcastable to (B, H, Lq, 1).

    constant: stands in for ``value`` where it is one number, known now.
    """

    kind: ClassVar[str] = "scale"
    value: Value | None = None
    constant: float | None = field(default=None, kw_only=True)

    def _check(self, said: str) -> None:
        _one_of(said, self)


@dataclass(frozen=True, eq=False)
class Pattern(_Measuring):
    """Which pairs exist. value: a ``Pairs``, a ``Window2d``, ``Blocks`` or ``Spans`` (those of ``trainless.kernels``).

    Blocks and spans go to the kernel that computes nothing else, unless another pattern, extra keys, statistics or edits
    need the pairs one by one; so do calls of few rows. They are made for one call: rows and keys are counted in it.

    One that needs statistics is *dynamic*: it is asked after them, in the calls in which it needs some, and may also
    return ``Tokens``. One that needs none is static and asked at every call, before the statistics, which are then
    those of what it leaves; it may read queries and keys (``lookahead``, where rows then depend on later ones).

    first: it is asked in the first call of a sequence alone. by_head: it leaves other pairs from one head to the next,
    where statistics count the rows that see a key for all heads at once.
    """

    kind: ClassVar[str] = "pattern"
    value: Value = field()
    first: bool = field(default=False, kw_only=True)
    by_head: bool = field(default=False, kw_only=True)

    @property
    def dynamic(self) -> bool:
        return bool(self.statistics)


# ---------------------------------------------------------------- the softmax


@dataclass(frozen=True, eq=False)
class Observe(_OnHeads):
    """Looks at the statistics. value: what it returns is ignored. heads: of which column mass is wanted."""

    kind: ClassVar[str] = "observe"
    value: Value = field()


@dataclass(frozen=True, eq=False)
class Form(_Attending):
    """Another operator instead of softmax attention. value: output (B, Lq, H, D), or ``Formed``.

    admits: kinds that it can live with. plain: the same operator in plain torch, (B, Lq, H, D) of a call, which
    verify compares with.
    """

    kind: ClassVar[str] = "form"
    value: Value = field()
    admits: frozenset[str] = field(default=frozenset({"gain"}), kw_only=True)
    plain: Callable[[AttentionCall], Tensor] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Mass(_OnHeads):
    """Moves probability between groups of keys. value: ``MassMove`` or ``RowEdit``.

    in_order: it reads keys by their place in the sequence, so none may be evicted. step: what ``value`` comes to in
    calls of one token that is text, from the State and the row's place: probabilities (B, heads, 1, Lk) to edited ones.
    A compiler can trace it: it looks at no tensor's values, and of the State it may change those that are kept as
    cumulative, in place. None: such calls need ``value``.
    """

    kind: ClassVar[str] = "mass"
    value: Value = field()
    in_order: bool = field(default=False, kw_only=True)
    step: Callable[[Tensor, State, StepRow], Tensor] | None = field(default=None, kw_only=True)

    def _check(self, said: str) -> None:
        if self.step is not None and self.scope != "sequence":
            raise InputError(f'{said}: a step reads what is kept of a sequence: scope="sequence"')


@dataclass(frozen=True, eq=False)
class Gain(_OnHeads):
    """Factor on the output of heads. value: a number, or a tensor broadcastable to (B, Lq, heads, D).

    constant: stands in for ``value`` where it is one number, known now.
    """

    kind: ClassVar[str] = "gain"
    value: Value | None = None
    constant: float | None = field(default=None, kw_only=True)

    def _check(self, said: str) -> None:
        _one_of(said, self)
        if self.constant is not None and (self.statistics or self.asks):
            raise InputError(f"{said}: a constant reads neither statistics nor facts")


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True, eq=False)
class Cache(Contribution):
    """What the cache keeps (policy: an ``Evict``), or how precisely (a ``Quantise``); the same for all query heads.

    value: what a policy with ``chosen`` leaves to the method; see there. probes: the rows that it or the policy
    scores by. Its State lies on the cache layer that it rules, for as long as there is a sequence on it.
    """

    kind: ClassVar[str] = "kv"
    policy: Evict | Quantise = field()
    value: Value | None = field(default=None, kw_only=True)
    inert: bool = field(default=False, kw_only=True)
    asks: frozenset[str] = field(default=frozenset(), kw_only=True)
    needs: Needs = field(default=(), kw_only=True)
    statistics: frozenset[str] = field(default=frozenset(), kw_only=True)
    probes: Probes | None = field(default=None, kw_only=True)
    lookahead: bool = field(default=False, kw_only=True)

    def _check(self, said: str) -> None:
        if not isinstance(self.policy, Evict | Quantise):
            raise InputError(f"{said}: policy={self.policy!r} is neither an Evict nor a Quantise")
        if self.policy.chosen != (self.value is not None):
            raise InputError(
                f"{said}: a policy with chosen=True takes a value that chooses, and no other does"
            )
        scored = isinstance(self.policy, Evict) and self.policy.score == "probe_mass"
        if scored and self.probes is None:
            raise InputError(f'{said}: score="probe_mass" needs `probes`, the rows to score by')
        if self.statistics and self.value is None and not (scored and self.statistics == {"probe_mass"}):
            raise InputError(f"{said}: nobody reads {sorted(self.statistics)}: there is no value")


# ---------------------------------------------------------------- beside the attention


@dataclass(frozen=True, eq=False)
class Around(Contribution):
    """Wraps the call of any module. value: ``(proceed, call, state)`` -> what the module is to return.

    call: a ``ModuleCall``; ``proceed(*call.args, **call.kwargs)`` runs the module, which is also how a call is
    declined. state: takes tensors where ``scope`` is more than "call"; a sequence's begins with the first forward that
    the patch sees of it.
    """

    kind: ClassVar[str] = "around"
    value: Callable[[Callable[..., Any], ModuleCall, State], Any] = field()
    inert: bool = field(default=False, kw_only=True)
    scope: str = field(default="call", kw_only=True)
    asks: frozenset[str] = field(default=frozenset(), kw_only=True)

    @property
    def stateful(self) -> bool:
        return False  # it needs no cache layer of its own

    def _check(self, said: str) -> None:
        if self.asks - {"step"}:
            raise InputError(
                f"{said}: asks={sorted(self.asks)}: of a module's call only the step is found out"
            )


@dataclass(frozen=True, eq=False)
class Input(Contribution):
    """Changes what a module inside the site is given. value: ``(args, kwargs, tensors)`` -> (args, kwargs), or None.

    module: its name inside the site, looked up anew at each call, because adapters come and go. It must be called each
    time the site is: where it is not, the call is refused. tensors: the method's own: they stand beside the site, go
    with it to any device and dtype, stay out of its state_dict, and are handed to ``value`` as they are then.
    """

    kind: ClassVar[str] = "input"
    value: Callable[..., Any] = field()
    module: str = field(kw_only=True)
    tensors: Mapping[str, Tensor] | None = field(default=None, kw_only=True)
    inert: bool = field(default=False, kw_only=True)
    traceable: bool = field(default=False, kw_only=True)

    def _check(self, said: str) -> None:
        if not self.module or not isinstance(self.module, str):
            raise InputError(f"{said}: module={self.module!r}: name a module inside the site")


@dataclass(frozen=True, eq=False)
class Weights(Contribution):
    """Replaces tensors, in place. tensors: parameter name inside the site -> what replaces it.

    Read only when the patch is committed, so a mapping that reads them from a file holds no memory.
    """

    kind: ClassVar[str] = "weights"
    tensors: Mapping[str, Tensor] = field()
    inert: bool = field(default=False, kw_only=True)

    def _check(self, said: str) -> None:
        if not isinstance(self.tensors, Mapping) or not self.tensors:
            raise InputError(f"{said}: tensors: give at least one name and what is to stand there")


@dataclass(frozen=True, eq=False)
class Logits(Contribution):
    """Changes the scores of the next token while ``generate`` of the patched model runs.

    value: ``(input_ids (B, L), scores (B, V))`` -> scores (B, V) of the same shape, or None to leave them. It comes after
    the user's own processors, in the order of the patches, and before what samples (temperature, top-k, …); B counts
    beams. What it goes by must be in its arguments: beams are reordered between two calls. Nothing else than generate
    asks it: not a forward of one's own. A method gives one to a model: at one site, or the same object at several.
    """

    kind: ClassVar[str] = "logits"
    value: Callable[[Tensor, Tensor], Tensor | None] = field()
    inert: bool = field(default=False, kw_only=True)
