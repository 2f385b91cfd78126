"""What every host shares: the runtime that stands at a patched site, and the book of who uses it.

Host edits are made once per site, when the first patch arrives, and undone when the last one leaves, so
that patches come off in any order. Between the two, patches only add and remove contributions.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..journal import Journal
from ..seams import AttentionCall, AttentionPlan, Contribution, Entry, Site

ATTRIBUTE = "_trainless"  # where a module keeps its Runtime, a model its Station


class Lease:
    """A patch's token at its sites: whether it is on the model (applied) and not paused (active).

    Cache layers keep leases to know whether their patch still wants them to evict; a copied cache
    shares the lease with the original, so copying does not copy the patch. ``terms`` is the method with all
    its parameters, by which a cache that comes back from disk finds the patch that it belongs to.
    """

    __slots__ = ("_local", "active", "applied", "name", "terms")

    def __init__(self, name: str, terms: str = ""):
        self.name, self.terms = name, terms
        self.applied = False
        self.active = False
        self._local = threading.local()

    @property
    def deferring(self) -> bool:
        """Whether this thread is feeding a prefill in chunks: layers then evict after the last one."""
        return getattr(self._local, "deferring", False)

    @deferring.setter
    def deferring(self, value: bool) -> None:
        self._local.deferring = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self

    def __reduce__(self) -> Any:
        return Lease, (self.name, self.terms)  # on disk a cache has no patch

    def __repr__(self) -> str:
        return f"Lease({self.name!r}, {'active' if self.active else 'inactive'})"


@dataclass
class Tally:
    """What happened at one site on behalf of one patch."""

    fired: int = 0  # calls that passed
    acted: int = 0  # calls that changed something, or were measured or compressed
    kernels: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)  # kernel -> why not a faster one
    tokens_seen: int = 0  # of the sequence served last
    tokens_kept: int = 0
    bytes_kept: int = 0
    bytes_stock: int = 0  # what an unpatched cache would hold for the tokens seen


@dataclass
class Made:
    """An attention call as the model made it, before any patch: tensors are those that it handed over.

    query (B, H, Lq, D), key and value (B, Hkv, Lk, D); mask as it came; scaling None: the root of the width.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float | None
    causal: bool | None = None  # None: the model did not say
    dropout: float = 0.0
    position_bias: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    sliding_window: int | None = None
    others: tuple[str, ...] = ()  # names of further arguments that were given


def as_computed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as torch's own attention computes with them: under ``autocast`` it narrows them first."""
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


class Watch(Protocol):
    """Looks at the calls of one site. Hosts ask it only while it is there."""

    def wants(self) -> bool:
        """Whether the call under way is to be looked at: not those of other threads, nor one within another."""

    def around(self, made: Made, proceed: Callable[[], Tensor], stock: Callable[[], Tensor]) -> Tensor:
        """``proceed()`` gives the output (B, Lq, H, D), ``stock()`` that of the user's own attention for the call as
        it was made; what this returns is what the model gets."""

    def told(self, call: AttentionCall) -> None:
        """The same call, as the host describes it to methods; not where no method is asked about it."""


class CallInThread(threading.local):
    """What the host's hooks note for the call that is under way in this thread."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.residual: Tensor | None = None  # what entered the layer around the site, where asked for
        self.passed = 0  # calls of the site so far


class Runtime:
    """Stands at one patched site: the contributions there, their plan, and the tallies.

    Any number of threads may call the model at once, each with a cache of its own: what belongs to a call is
    kept per thread, what belongs to a sequence lies on its cache layers, and the tallies are counted under a lock.
    """

    def __init__(self, site: Site):
        self.site = site
        self.entries: list[Entry] = []
        self.tallies: dict[Lease, Tally] = {}
        self.journal = Journal()
        self.plan = AttentionPlan([])
        self.call = CallInThread()
        self.counting = threading.Lock()
        self.rotate: Callable[[Tensor, Tensor], Tensor] | None = None  # turns keys by so many positions
        self.hooked = False  # the host's own use: whether its hook is in place
        self.holders: dict[Contribution, nn.Module] = {}  # what holds the tensors of input contributions
        self.asked: dict[
            str, Any
        ] = {}  # the host's own use: facts that somebody here asks for, and who knows
        self.watch: Watch | None = None  # who looks at the calls here, while a patch is verified

    @property
    def facts(self) -> dict[str, Any]:
        """What the host's hooks have noted for the call under way in this thread."""
        return self.call.facts

    def add(self, entries: Sequence[Entry]) -> None:
        self.entries.extend(entries)
        for entry in entries:
            assert isinstance(entry.owner, Lease)
            self.tallies.setdefault(entry.owner, Tally())
        self.refresh()

    def drop(self, owner: Lease) -> None:
        """Forget the contributions of one patch; its tally stays readable through the patch."""
        self.entries = [e for e in self.entries if e.owner is not owner]
        self.tallies.pop(owner, None)
        self.refresh()

    def refresh(self) -> None:
        """Merge anew what is active; called when a patch arrives, leaves, pauses or resumes."""
        self.plan = AttentionPlan([e for e in self.entries if e.owner.active])  # type: ignore[attr-defined]
        self.live = self._tallies(self.plan.entries)
        self.acting = self._tallies(self.plan.active)

    def _tallies(self, entries: Sequence[Entry]) -> list[Tally]:
        return [self.tallies[o] for o in dict.fromkeys(e.owner for e in entries)]  # type: ignore[index]

    def own_tensors(self, contribution: Contribution) -> dict[str, Tensor]:
        """The tensors that stand beside the site for ``contribution``, where and as they are now."""
        holder = self.holders.get(contribution)
        if holder is None:
            return {}
        return {name: getattr(holder, name.replace(".", "_")) for name in contribution.tensors or ()}

    def mark(self) -> tuple[int, bool, dict[str, Any]]:
        """How the host has equipped this site so far; ``back_to`` takes back what came since."""
        return len(self.journal.edits), self.hooked, dict(self.asked)

    def back_to(self, mark: tuple[int, bool, dict[str, Any]]) -> None:
        count, self.hooked, self.asked = mark
        self.journal.undo(count)

    def passed(self) -> None:
        """Count a call for every active patch here."""
        self.call.passed += 1
        with self.counting:
            for tally in self.live:
                tally.fired += 1

    def acted(self, kernel: str) -> None:
        """Count that every patch with a part in the plan changed the call under way, and the kernel it ran on."""
        with self.counting:
            for tally in self.acting:
                tally.acted += 1
            for tally in self.live:
                tally.kernels[kernel] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        raise Unsupported(
            f"{self.site.name} is patched, and a patched model cannot be copied: "
            "remove the patch (or copy first), then patch each copy"
        )

    def __reduce__(self) -> Any:
        raise Unsupported(
            f"{self.site.name} is patched, and a patched model cannot be pickled: "
            "remove the patch first, or use save_pretrained, which writes the stock model"
        )


class Host(Protocol):
    """A library whose models we know how to patch."""

    name: str

    def accepts(self, model: nn.Module) -> bool:
        """Whether ``model`` belongs to this host."""

    def sites(self, model: nn.Module, prefix: str = "", parts: frozenset[str] = frozenset()) -> list[Site]:
        """Every attention site of ``model``, the refused ones too; ``parts`` are added to each."""

    def install(self, runtime: Runtime) -> None:
        """Make the edits that route the site through ``runtime``, into ``runtime.journal``."""

    def install_model(self, model: nn.Module, journal: Journal, runtimes: Sequence[Runtime]) -> None:
        """Make the edits that a patched model needs once, into ``journal``."""

    def family(self, model: nn.Module) -> str:
        """What the model calls itself: model_type or class name."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile(module)`` stands: its edits belong to what is compiled.

    The wrapper hands every attribute that is read or set on to the module inside, so nothing can be put on it.
    """
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        module = module._orig_mod
    return module


def runtime_of(module: nn.Module) -> Runtime | None:
    """The runtime that stands at ``module``, if it is patched."""
    return vars(module).get(ATTRIBUTE)
