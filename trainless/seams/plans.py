"""How contributions meet: the merged plan of a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .contributions import Contribution
from .eviction import Evict
from .kinds import KINDS
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
        acting = [e for e in entries if not e.contribution.inert]
        # No call of the site has to do with the scores of the next token.
        self.active = tuple(e for e in acting if e.contribution.kind != "logits")
        self.of: dict[str, tuple[Entry, ...]] = {
            kind: tuple(e for e in acting if e.contribution.kind == kind) for kind in KINDS
        }
        self.inert = not self.active
        self.asks = frozenset().union(*(e.contribution.asks for e in self.active))
        # Which keys are image tokens is remembered with the sequence.
        self.stateful = any(e.contribution.stateful for e in self.active) or "images" in self.asks
        # Whose State lies on the cache layer of the call; what rules the layer remembers there in any case.
        self.keeping = frozenset(
            e.owner for e in self.active if e.contribution.stateful or e.contribution.kind == "kv"
        )
        self.layered = any(e.contribution.scope == "layers" for e in self.active)
        self.running = frozenset(e.owner for e in self.active if e.contribution.scope == "run")
        # At most one of each: two would be a conflict.
        self.evictor = next((e for e in self.of["kv"] if isinstance(e.contribution.policy, Evict)), None)
        self.quantiser = next((e for e in self.of["kv"] if isinstance(e.contribution.policy, Quantise)), None)
        self.lookahead = tuple(e for e in self.active if e.contribution.lookahead)
        # Only scalings and gains: the user's own attention function can still do the work.
        editing = {"position", "keys", "pattern", "observe", "form", "mass", "kv"}
        self.delegable = not any(self.of[kind] for kind in editing)
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
