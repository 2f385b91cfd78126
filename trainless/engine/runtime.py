"""What stands at a patched site: the contributions there, their plan, and what is counted of its calls.

Host edits are made once per site, when the first patch arrives, and undone when the last one leaves, so
that patches come off in any order. Between the two, patches only add and remove contributions.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..edits.journal import Journal
from ..errors import Unsupported
from ..kernels.turning import Rotates
from ..seams import AttentionPlan, Contribution, Entry, Lease, Site
from .prepared import Prepared
from .watching import Watch

COMPILED = "compiled with the model"
ATTRIBUTE = "_trainless"  # where a module keeps its Runtime, a model its Station


@dataclass
class Tally:
    """What happened at one site on behalf of one patch."""

    fired: int = 0  # calls that passed
    # Calls that changed something, also by what their cache has lost, or were measured or compressed.
    acted: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)  # kernel -> why not a faster one
    blocks_read: int = 0  # blocks of keys that lists of blocks left, over all calls that had some
    blocks_whole: int = 0  # of as many as these calls had
    tokens_seen: int = 0  # of the sequence served last
    tokens_kept: int = 0
    bytes_kept: int = 0
    bytes_stock: int = 0  # what an unpatched cache would hold for the tokens seen

    def hold(self, layer: Any) -> None:
        """Note what a cache layer that evicts or packs, or the counters of one, has seen and holds."""
        self.tokens_seen, self.tokens_kept = layer.seen, layer.width
        self.bytes_kept, self.bytes_stock = layer.nbytes, layer.stock_nbytes


class ActiveInput(NamedTuple):
    """An input contribution that is active: whose input it changes, how, and the method's own tensors.

    holder: the module beside the site that has them. names: what the method calls each -> what it is called there.
    """

    module: str
    value: Any
    holder: nn.Module | None
    names: dict[str, str]
    entry: Entry

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, where and as they are now."""
        return {name: getattr(self.holder, own) for name, own in self.names.items()}


class CallInThread(threading.local):
    """What the host's hooks note for the call that is under way in this thread."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.residual: Tensor | None = None  # what entered the layer around the site, where asked for
        self.passed = 0  # calls of the site so far
        self.step: Any = None  # the frozen cache layer on which the call is a step


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
        self.prepared = Prepared(self.plan)
        self.asks: frozenset[str] = frozenset()
        self.call = CallInThread()
        self.compiled_layer: Any = (
            None  # while a call is traced by a compiler: its cache layer, from hook to attention
        )
        self.counting = threading.Lock()
        self.settled: Any = None  # the counters of the frozen cache layer that was served last
        self.rotate: Rotates | None = None  # turns keys by so many positions
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
        self.fold()
        self.settled = None
        self.entries = [e for e in self.entries if e.owner is not owner]
        self._merge()
        self.tallies.pop(owner, None)

    def refresh(self) -> None:
        """Merge anew what is active; called when a patch arrives, leaves, pauses or resumes."""
        self.fold()
        self.settled = None
        self._merge()

    def _merge(self) -> None:
        self.plan = AttentionPlan([e for e in self.entries if e.owner.active])  # type: ignore[attr-defined]
        self.prepared = Prepared(self.plan, self._device(), self.site.facts.get("whole", False))
        # Those of paused patches as well: their steps go by all the same.
        self.asks = frozenset().union(*(e.contribution.asks for e in self.entries))
        self.inputs = tuple(self._input(e) for e in self.plan.of["input"])
        self.live = self._tallies(self.plan.entries)
        self.acting = self._tallies(self.plan.active)

    def _device(self) -> torch.device:
        """Where the module computes, as far as its parameters say."""
        own = next(self.site.module.parameters(), None)
        return torch.device("cpu") if own is None or own.device.type == "meta" else own.device

    def fold(self) -> None:
        """Bring the tallies up to date with what stands on the device only; waits for it."""
        if self.settled is not None:
            with self.counting:
                for entry in self.plan.of["kv"]:
                    if (tally := self.tallies.get(entry.owner)) is not None:  # type: ignore[call-overload]
                        tally.hold(self.settled)
        owners = self.prepared.owners
        for calls, outcome in self.prepared.counted():
            why = "; ".join(filter(None, (COMPILED, outcome.reasons)))
            with self.counting:
                for tally in self.live:
                    tally.fired += calls
                    tally.kernels[outcome.kernel] += calls
                    tally.reasons[outcome.kernel] = why
                for number in outcome.acted:
                    self.tallies[owners[number]].acted += calls  # type: ignore[index]
        if idle := self.prepared.unmoved():
            with self.counting:
                for tally in self.acting:
                    tally.acted -= idle

    def _tallies(self, entries: Sequence[Entry]) -> list[Tally]:
        return [self.tallies[o] for o in dict.fromkeys(e.owner for e in entries)]  # type: ignore[index]

    def own_tensors(self, contribution: Contribution) -> dict[str, Tensor]:
        """The tensors that stand beside the site for ``contribution``, where and as they are now."""
        holder, names = self.holders.get(contribution), self._names(contribution)
        return {name: getattr(holder, own) for name, own in names.items()}

    def _names(self, contribution: Contribution) -> dict[str, str]:
        """What the method calls each of its tensors -> what the module that holds them calls it."""
        if contribution not in self.holders:
            return {}
        return {name: name.replace(".", "_") for name in contribution.tensors or ()}

    def _input(self, entry: Entry) -> ActiveInput:
        contribution = entry.contribution
        holder = self.holders.get(contribution)
        return ActiveInput(contribution.module, contribution.value, holder, self._names(contribution), entry)

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


def runtime_of(module: nn.Module) -> Runtime | None:
    """The runtime that stands at ``module``, if it is patched."""
    return vars(module).get(ATTRIBUTE)
