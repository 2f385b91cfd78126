"""The vocabulary: where a method may act, what it may contribute there, and how contributions meet.

A method never forks a model's forward. It *contributes* to *sites*. A contribution is a kind, what
it needs to know, and one function ``(call, statistics, state) -> value``. The engine
(``attention.py``) merges the contributions of all methods at a site into an ``AttentionPlan`` and
runs it; ``kv.py`` executes the eviction rules. Nothing in here knows a model or a method.

Shapes: B batch, H query heads, Hkv key/value heads, Lq queries and Lk keys of this call, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Conflict, InputError

# What a contribution may be, in the order in which the engine applies them.
KINDS = (
    "position",  # positions that keys carry: value -> rotation steps to add to each key (B, Hkv, Lk)
    "keys",  # extra keys and values: value -> ExtraKeys
    "scale",  # factor on the logits: value -> float or tensor broadcastable to (B, H, Lq, 1)
    "pattern",  # which pairs exist: value -> Pairs, a predicate over (query, key) indices
    "observe",  # look at the statistics; value is ignored
    "form",  # another operator: value -> output (B, Lq, H, D)
    "mass",  # move probability between key groups: value -> MassMove
    "gain",  # factor on a head's output: value -> tensor broadcastable to (B, Lq, H, 1)
    "kv",  # what the cache keeps: policy, an Evict
    "around",  # wrap the call of a module: value(proceed, args, kwargs) -> result
    "weights",  # replace tensors: tensors
)
STATISTICS = ("lse", "column_mass", "group_mass")
# Facts that a host finds out only for those who ask, in ``call.facts``:
#   images: bool (B, 1|Hkv, Lk), the keys that are image tokens, and image_rows: bool (B, Lq), the rows that are;
#     both None while the sequence has none. Sites where they cannot be known say why in ``facts["no_images"]``.
#   residual: (B, Lq, D), the hidden states that enter the layer around the site, before its norm.
FACTS = ("images", "residual")
# Kinds of which one site takes a single contribution (mass: one per head).
EXCLUSIVE = {"position", "form"}


@dataclass(frozen=True, eq=False)
class Site:
    """One place in a model where methods may act; found by a host, never changed afterwards.

    ``parts`` holds every name that ``where: {part}`` may use for it: text, vision, encoder, decoder,
    denoiser, text_encoder. ``layer`` counts from 0 among the sites of the same part and role, and is
    the module's own ``layer_idx`` where it has one. ``heads``/``kv_heads``/``head_dim`` are None when
    the module does not say; live shapes are then checked at the first call.
    """

    name: str
    module: nn.Module
    host: str
    kind: str = "attention"  # or "module": a convolution, a tower, a whole denoiser
    role: str = "self"  # self, cross, joint
    parts: frozenset[str] = frozenset()
    layer: int = 0
    layers: int = 1  # how many layers the part has, for slices such as "2:-1"
    causal: bool = False
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # host-specific: sliding_window, family, level …
    refusal: str | None = None  # why nothing can be patched here, when that is so


@dataclass
class AttentionCall:
    """One attention call, as the model made it, with the facts that the host knows about it.

    Shapes: query (B, H, Lq, D); key, value (B, Hkv, Lk, D), after rotary embedding and after the
    cache. ``mask`` is what the model passed: None, bool (True = visible) or additive float,
    broadcastable to (B, H, Lq, Lk), or a flex ``BlockMask``. ``scaling`` multiplies q·k.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any = None
    scaling: float = 1.0
    causal: bool = False  # meaningful when mask is None: query i sees keys <= i + Lk - Lq
    dropout: float = 0.0
    position_bias: Tensor | None = None  # added to the scaled logits, (1|B, H, Lq, Lk)
    softcap: float | None = None
    sink_logits: Tensor | None = None  # learned sinks (H,): one more logit per row, without a value
    sliding_window: int | None = None
    site: Site | None = None
    layer: Any = None  # the cache layer that belongs to this call, if there is one
    past: int = 0  # tokens this sequence had before the call (0: a fresh sequence)
    real: Tensor | None = None  # (B, Lq) bool, False on padding; None when there is none
    grid: tuple[int, int] | None = None  # image tokens as (rows, columns)
    text: int = 0  # text tokens in a joint sequence
    text_first: bool = True
    facts: dict[str, Any] = field(default_factory=dict)  # sample size, timestep, token maps …

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, H, Hkv, Lq, Lk)."""
        b, h, lq, _ = self.query.shape
        return b, h, self.key.shape[1], lq, self.key.shape[2]

    @property
    def fresh(self) -> bool:
        """True for the first call of a sequence (prefill), False for decode steps and later turns."""
        return self.past == 0

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


@dataclass
class Statistics:
    """Statistics of the attention before mass and gain; only what was asked for is filled in.

    lse (B, H, Lq): log-sum-exp of the logits of each row. column_mass (B, H, Lk): probability that
    each key received, summed over the rows that are not padding. rows (B, Lk): how many of those rows
    can see each key. group_mass (B, H, Lq, G): probability that each row has on each of the groups that the
    contribution named, 0 in rows it did not ask about.
    """

    lse: Tensor | None = None
    column_mass: Tensor | None = None
    rows: Tensor | None = None
    group_mass: Tensor | None = None


@dataclass
class Groups:
    """Disjoint groups of keys whose probability a contribution wants to know.

    of: integers (B, 1|Hkv, Lk), the group (1 to ``count``) that each key belongs to, 0 for none. rows: bool
    (B, Lq), the rows it wants to know about, None for all: the others cost nothing.
    """

    of: Tensor
    count: int
    rows: Tensor | None = None


class State:
    """Tensors of one method that belong to a sequence. They live on the cache layer and move with it.

    Every tensor names its batch axis and, where it has one entry per key, its key axis, so that
    reordering beams, cropping and eviction can carry it along without knowing what it means.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.axes: dict[str, tuple[int, int | None]] = {}
        self.fill: dict[str, float] = {}
        self.cumulative: set[str] = set()

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def set(
        self,
        name: str,
        tensor: Tensor,
        *,
        batch: int = 0,
        keys: int | None = None,
        fill: float = 0,
        cumulative: bool = False,
    ) -> None:
        """Store ``tensor``; keys that arrive later are given ``fill`` along the ``keys`` axis.

        ``cumulative``: it adds up over rows, so rows that are taken back have left their trace in it.
        """
        self.tensors[name], self.axes[name], self.fill[name] = tensor, (batch, keys), fill
        if cumulative:
            self.cumulative.add(name)


Value = Callable[[AttentionCall, Statistics, State], Any]


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one method does at one site.

    ``needs`` names the statistics that ``value`` reads, either as a set or as a function of
    ``(call, state)`` when that differs between prefill and decode. ``constant`` stands in for ``value``
    where it is one number, known now. ``heads`` limits it to some query heads (None: all). ``inert``
    says that it is known now to change nothing: the engine then runs the stock kernel. ``stateful`` asks
    for a State that outlives the call. ``lookahead`` says that a row's result depends on later rows of
    the same call, so a prefill cut into chunks would differ.
    """

    kind: str
    value: Value | None = None
    constant: float | None = None
    needs: Collection[str] | Callable[[AttentionCall, State], Collection[str]] = ()
    heads: tuple[int, ...] | None = None
    inert: bool = False
    stateful: bool = False
    lookahead: bool = False
    in_order: bool = False  # reads keys by their place in the sequence, so none may be evicted
    dynamic: bool = False  # pattern only: chosen from statistics
    admits: frozenset[str] = frozenset({"gain"})  # form only: kinds it can live with
    policy: Evict | None = None  # kv only
    tensors: Mapping[str, Tensor] | None = None  # weights only: parameter name inside the site -> tensor
    statistics: frozenset[str] = frozenset()  # every statistic `needs` may ask for, for the conflict table
    asks: frozenset[str] = frozenset()  # facts among FACTS that `value` reads from the call
    groups: Callable[[AttentionCall, State], Groups | None] | None = (
        None  # asks for group_mass; None: not now
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"contribution kind {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if unknown := self.asks - set(FACTS):
            raise InputError(f"no host knows the fact {sorted(unknown)[0]!r}; known: {', '.join(FACTS)}")
        if not callable(self.needs) and not self.statistics:
            object.__setattr__(self, "statistics", frozenset(self.needs))
        if self.groups is not None:
            object.__setattr__(self, "statistics", self.statistics | {"group_mass"})

    def wanted(self, call: AttentionCall, state: State) -> Collection[str]:
        return self.needs(call, state) if callable(self.needs) else self.needs


@dataclass
class MassMove:
    """Keep ``keep`` of the probability on ``source``; the rest goes to ``target``, in proportion.

    source, target: bool (B, H, Lk); target None means every visible key outside the source. keep: a
    number, or a tensor broadcastable to (B, H, Lq). rows: bool (B, H|1, Lq), the rows to edit, head by head;
    None means all of them. Rows keep their sum; proportions inside source and inside target are kept. Rows that
    are named out keep the bits of the user's own kernel where nothing else changes the call.
    """

    source: Tensor
    keep: float | Tensor
    target: Tensor | None = None
    rows: Tensor | None = None


# A mass contribution that edits probabilities row block by row block, for rules whose groups differ
# from row to row: ``edit(probabilities (B, h, rows, Lk), first_row) -> probabilities``.
@dataclass
class RowEdit:
    edit: Callable[[Tensor, int], Tensor]


@dataclass
class ExtraKeys:
    """Keys and values beside the sequence: (B, Hkv, E, D) each; visible bool (1|B, 1|H, Lq, E) or None."""

    key: Tensor
    value: Tensor
    visible: Tensor | None = None


@dataclass
class Pairs:
    """A pattern as a predicate: ``visible(q, k)`` for index tensors q (rows, 1) and k (1, columns)."""

    visible: Callable[[Tensor, Tensor], Tensor]


# ---------------------------------------------------------------- eviction rules, as values


Budget = int | float  # a float in (0, 1] is a fraction of the row's own prompt; an int is tokens


def tokens_of(budget: Budget, length: int) -> int:
    """A budget in tokens for a prompt of ``length`` real tokens (fractions round down)."""
    if isinstance(budget, float):
        # 0.1 * 30 is 3.0000000000000004 and 0.7 * 10 is 7.000000000000001, but 0.29 * 100 is
        # 28.999999999999996: a value within rounding of an integer is that integer.
        exact = budget * length
        return round(exact) if abs(exact - round(exact)) < 1e-9 * max(1.0, exact) else int(exact)
    return budget


def check_budget(name: str, budget: Any) -> None:
    """InputError unless ``budget`` is an int >= 0 or a float in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise InputError(f"{name}={budget!r}: give tokens as an int, or a fraction as a float in (0, 1]")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise InputError(
            f"{name}={budget!r}: a float is a fraction of the prompt and must lie in (0, 1]; "
            f"for tokens write {name}={max(0, int(budget))}"
        )
    if isinstance(budget, int) and budget < 0:
        raise InputError(f"{name}={budget!r}: a number of tokens cannot be negative")


@dataclass(frozen=True)
class Evict:
    """A rule for what a cache layer keeps after each call: first + recent + the best of the rest.

    sinks: the first visible tokens. recent: the last ones. heavy: those among the rest with the
    highest score. The newest token is always kept; ties go to the newer one.

    score: "column_mass" adds up the probability that each key received from every row so far;
    None scores nothing (heavy must then be 0). gqa: how the query heads of a group share a key/value
    head's score: sum, first, max, mean. normalise: divide each score by the rows that could see the key.
    rolled: keys are presented as if the kept tokens were contiguous.
    """

    sinks: Budget = 0
    recent: Budget = 0
    heavy: Budget = 0
    score: str | None = None
    gqa: str = "sum"
    normalise: bool = False
    rolled: bool = False

    def total(self, length: int) -> int:
        """Tokens that a row with a prompt of ``length`` tokens keeps: at least 1, the newest."""
        return max(1, sum(tokens_of(b, length) for b in (self.sinks, self.recent, self.heavy)))


# ---------------------------------------------------------------- plans and conflicts


@dataclass(frozen=True, eq=False)
class Entry:
    """A contribution with its owner: the method's name and the patch's token."""

    method: str
    owner: object
    contribution: Contribution


class AttentionPlan:
    """The merged contributions of one site, grouped by kind, in the engine's order."""

    def __init__(self, entries: Sequence[Entry]):
        self.entries = tuple(entries)
        self.active = tuple(e for e in entries if not e.contribution.inert)
        self.of: dict[str, tuple[Entry, ...]] = {
            kind: tuple(e for e in self.active if e.contribution.kind == kind) for kind in KINDS
        }
        self.inert = not self.active
        self.asks = frozenset().union(*(e.contribution.asks for e in self.active))
        # Which keys are image tokens is remembered with the sequence.
        self.stateful = any(e.contribution.stateful for e in self.active) or "images" in self.asks
        self.evict: Evict | None = next((e.contribution.policy for e in self.of["kv"]), None)
        self.lookahead = tuple(e for e in self.active if e.contribution.lookahead)
        # Only scalings and gains: the user's own attention function can still do the work.
        editing = {"position", "keys", "pattern", "observe", "form", "mass", "kv"}
        self.delegable = not any(self.of[kind] for kind in editing)
        # One number on the logits of every call: hosts may pass it to the user's own attention themselves.
        scales = [e.contribution.constant for e in self.active if e.contribution.kind == "scale"]
        known = [c for c in scales if c is not None]
        self.constant: float | None = prod(known) if known and len(known) == len(self.active) else None
        # Nothing to ask for and nothing to remember either: such a call takes the short way.
        self.direct = self.delegable and not any(
            e.contribution.needs or e.contribution.statistics for e in self.active
        )

    @property
    def needs_layer(self) -> bool:
        """Whether this plan keeps something on the sequence's cache layer."""
        return self.stateful or self.evict is not None


def conflicts(site: Site, entries: Sequence[Entry]) -> list[str]:
    """Every clash among ``entries`` at ``site``, one sentence each; computed from what they declare."""
    found = []
    for i, a in enumerate(entries):
        for b in entries[i + 1 :]:
            if a.owner is b.owner and a.method == b.method:
                continue
            reason = _clash(a, b)
            if reason:
                found.append(f"{a.method} and {b.method} at {site.name}: {reason}")
    return list(dict.fromkeys(found))


def check_conflicts(site: Site, entries: Sequence[Entry]) -> None:
    """Raise Conflict on the first clash."""
    found = conflicts(site, entries)
    if found:
        raise Conflict(found[0])


def _clash(a: Entry, b: Entry) -> str | None:
    x, y = a.contribution, b.contribution
    if a.method == b.method:
        return f"the same method is already there (seam {x.kind}); remove the first patch or narrow one with `where`"
    if x.kind == y.kind and x.kind in EXCLUSIVE:
        return f"seam {x.kind} takes one contribution; use `where` to give them different layers"
    if x.kind == y.kind == "kv":
        return "seam kv takes one eviction rule; use `where` to give them different layers"
    if x.kind == y.kind == "mass" and _heads_meet(x, y):
        return "seam mass takes one contribution per head; give them different heads, or layers with `where`"
    if x.kind == y.kind == "weights" and set(x.tensors or ()) & set(y.tensors or ()):
        return "seam weights: both replace the same tensors"
    for one, other in ((x, y), (y, x)):
        if one.kind == "form" and other.kind not in one.admits and other.kind not in {"around", "weights"}:
            return f"seam form replaces softmax attention, which seam {other.kind} needs"
        if one.in_order and other.kind == "kv":
            return f"seam {one.kind} reads the keys in their order, and seam kv drops some; give them different layers"
        if one.kind == "pattern" and one.dynamic and other.statistics:
            return f"seam pattern is chosen from statistics that seam {other.kind} reads as well"
    return None


def _heads_meet(x: Contribution, y: Contribution) -> bool:
    return x.heads is None or y.heads is None or bool(set(x.heads) & set(y.heads))
