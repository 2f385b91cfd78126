"""What a method gives: a kind, what it needs to know, and one function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError
from .calls import AttentionCall, Groups, State, Statistics
from .eviction import Evict
from .kinds import FACTS, KINDS
from .precision import Quantise

Value = Callable[[AttentionCall, Statistics, State], Any]
# Which query rows a contribution wants the column mass of: bool (B, Lq) or (Lq,), or row numbers, int64 (B, P)
# or (P,), with -1 for none and a row that is named twice counted twice; None for no rows. Pads never count.
Probes = Callable[[AttentionCall, State], Tensor | None]


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one method does at one site.

    ``needs`` names the statistics that ``value`` reads, either as a set or as a function of
    ``(call, state)`` when that differs between prefill and decode. ``constant`` stands in for ``value``
    where it is one number, known now. ``heads`` limits it to some query heads (None: all). ``inert``
    says that it is known now to change nothing: the engine then runs the stock kernel. ``stateful`` asks
    for a State that outlives the call. ``lookahead`` says that a row's result depends on later rows of
    the same call, so a prefill cut into chunks would differ.
    ``traceable`` says that ``value`` can be traced by a compiler: it looks at no tensor's values, reads the sizes of
    the call as numbers, and changes nothing that outlives the call. Others run outside of compiled graphs.
    ``probes`` chooses the rows of the statistic "probe_mass", at a cost that grows with their number only;
    on a kv contribution it chooses the rows that the cache layer is told about.

    ``tensors``: for weights, parameter name inside the site -> what replaces it, written in place; read
    only when the patch is committed, so a mapping that reads them from a file holds no memory. For input,
    further tensors of the method's own: they stand beside the site, go with it to any device and dtype,
    stay out of its state_dict, and are handed to ``value`` as they are then.
    ``module``: for input, the module inside the site, looked up anew at each call, because adapters come
    and go. It must be called each time the site is: where it is not, the call is refused.
    """

    kind: str
    value: Value | None = None
    constant: float | None = None
    needs: Collection[str] | Callable[[AttentionCall, State], Collection[str]] = ()
    heads: tuple[int, ...] | None = None
    inert: bool = False
    stateful: bool = False
    lookahead: bool = False
    traceable: bool = False
    in_order: bool = False  # reads keys by their place in the sequence, so none may be evicted
    probes: Probes | None = None
    dynamic: bool = False  # pattern only: chosen from statistics, in the calls in which it needs some
    admits: frozenset[str] = frozenset({"gain"})  # form only: kinds it can live with
    # form only: the same operator in plain torch, (B, Lq, H, D) of a call, which verify compares with
    plain: Callable[[AttentionCall], Tensor] | None = None
    policy: Evict | Quantise | None = None  # kv only
    tensors: Mapping[str, Tensor] | None = None  # weights, input
    module: str = ""  # input only: name of a module inside the site
    statistics: frozenset[str] = frozenset()  # every statistic `needs` may ask for, for the conflict table
    asks: frozenset[str] = frozenset()  # facts among FACTS that `value` reads from the call
    # asks for group_mass; None: not in this call
    groups: Callable[[AttentionCall, State], Groups | None] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"contribution kind {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if (self.kind == "input") != bool(self.module):
            raise InputError(
                f"contribution kind {self.kind!r} with module={self.module!r}: only input names one"
            )
        if unknown := self.asks - set(FACTS):
            raise InputError(f"no host knows the fact {sorted(unknown)[0]!r}; known: {', '.join(FACTS)}")
        if not callable(self.needs) and not self.statistics:
            object.__setattr__(self, "statistics", frozenset(self.needs))
        if self.groups is not None:
            object.__setattr__(self, "statistics", self.statistics | {"group_mass"})
        if (self.probes is None) == ("probe_mass" in self.statistics):
            raise InputError(
                'a contribution that needs "probe_mass" says by `probes` of which rows, and only it'
            )

    def wanted(self, call: AttentionCall, state: State) -> Collection[str]:
        return self.needs(call, state) if callable(self.needs) else self.needs
