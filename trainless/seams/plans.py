"""How contributions meet: the merged plan of a site, and the conflicts, computed from what they declare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import Conflict
from .calls import Site
from .contributions import Contribution
from .eviction import Evict
from .kinds import BESIDE, EXCLUSIVE, KINDS
from .precision import Quantise


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
        # At most one of each: two would be a conflict.
        self.evictor = next((e for e in self.of["kv"] if isinstance(e.contribution.policy, Evict)), None)
        self.quantiser = next((e for e in self.of["kv"] if isinstance(e.contribution.policy, Quantise)), None)
        self.lookahead = tuple(e for e in self.active if e.contribution.lookahead)
        # Only scalings and gains: the user's own attention function can still do the work.
        editing = {"position", "keys", "pattern", "observe", "form", "mass", "kv"}
        self.delegable = not any(self.of[kind] for kind in editing)
        # One number on the logits of every call: hosts may pass it to the user's own attention themselves.
        scales = [e.contribution.constant for e in self.active if e.contribution.kind == "scale"]
        known = [c for c in scales if c is not None]
        self.constant: float | None = math.prod(known) if known and len(known) == len(self.active) else None
        # Nothing to ask for and nothing to remember either: such a call takes the short way.
        self.direct = self.delegable and not any(
            e.contribution.needs or e.contribution.statistics for e in self.active
        )

    @property
    def needs_layer(self) -> bool:
        """Whether this plan keeps something on the sequence's cache layer."""
        return self.stateful or bool(self.of["kv"])

    @property
    def evict(self) -> Evict | None:
        """The rule for what the cache keeps."""
        policy = self.evictor.contribution.policy if self.evictor else None
        return policy if isinstance(policy, Evict) else None

    @property
    def quantise(self) -> Quantise | None:
        """The rule for how precisely the cache keeps it."""
        policy = self.quantiser.contribution.policy if self.quantiser else None
        return policy if isinstance(policy, Quantise) else None


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
    if x.kind == y.kind == "kv" and type(x.policy) is type(y.policy):
        what = "rule of precision" if isinstance(x.policy, Quantise) else "eviction rule"
        return f"seam kv takes one {what}; use `where` to give them different layers"
    if isinstance(x.policy, Evict | Quantise) and isinstance(y.policy, Evict | Quantise):
        if x.policy.chosen and y.policy.chosen:
            return (
                "seam kv: both choose among the tokens of a layer, each by statistics of its own; use `where`"
            )
    if x.kind == y.kind == "mass" and _heads_meet(x, y):
        return "seam mass takes one contribution per head; give them different heads, or layers with `where`"
    if x.kind == y.kind == "weights" and set(x.tensors or ()) & set(y.tensors or ()):
        return "seam weights: both replace the same tensors"
    for one, other in ((x, y), (y, x)):
        if one.kind == "form" and other.kind not in one.admits and other.kind not in BESIDE:
            return f"seam form replaces softmax attention, which seam {other.kind} needs; use `where` to part them"
        if one.in_order and other.kind == "kv":
            return f"seam {one.kind} reads the keys in their order, and seam kv drops some; give them different layers"
        # A dynamic pattern is for the calls that it asks about; on a layer that packs, those before it does.
        every = one.kind == "position" or (one.kind == "pattern" and not one.dynamic)
        if isinstance(other.policy, Quantise) and every:
            return f"seam {one.kind} needs every key as it is, and seam kv packs them; give them different layers"
        if isinstance(other.policy, Quantise) and one.groups is not None:
            return f"seam {one.kind} names groups of keys, and seam kv packs them; give them different layers"
        scored = isinstance(other.policy, Evict) and other.policy.score is not None
        if one.kind == "pattern" and one.dynamic and (other.statistics or scored):
            return f"seam pattern is chosen from statistics that seam {other.kind} reads as well"
    return None


def _heads_meet(x: Contribution, y: Contribution) -> bool:
    return x.heads is None or y.heads is None or bool(set(x.heads) & set(y.heads))
