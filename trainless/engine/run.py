"""One attention call under way: what every step of its plan shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cache import CompressingLayer
from ..errors import InputError
from ..kernels.common import Terms
from ..kernels.lse import attention as attention_lse
from ..kernels.lse import choose, row_probabilities
from ..kernels.visibility import Visibility, visibility
from ..seams import AttentionCall, AttentionPlan, Entry, Groups, State, Statistics
from .autocast import Delegate
from .chosen_rows import Probed
from .extra_keys import merge_extra
from .patterns import Pattern
from .runtime import Runtime
from .scopes import of_layers, of_run

SAMPLED = "column mass of sampled rows"  # asked for by a cache layer, in the place of "column_mass"
FEW_ROWS = 16  # up to this many query rows the probabilities are computed outright


class Run:
    """A call, its plan, the statistics that are known so far, and who has changed something."""

    def __init__(self, runtime: Runtime, call: AttentionCall, delegate: Delegate):
        self.runtime, self.call, self.delegate = runtime, call, delegate
        self.plan: AttentionPlan = runtime.plan
        self.states: dict[str, State] = {}
        self.acted: set[Any] = set()
        self.edited = False  # the output can no longer come from the delegate
        self.stats = Statistics()
        self.probed = Probed()
        self.asking: set[Entry] = set()  # those that need a statistic of this call
        self.groups: dict[Entry, Groups] = {}  # who wants to know the mass of which groups, and …
        self.masses: dict[Entry, Tensor] = {}  # … what it is
        self.times: Tensor | None = None  # (1 or B, Lq): how often rows count for a layer that samples them
        self.read: list[
            tuple[Any, int, int]
        ] = []  # owner, blocks of keys that its lists left, and of the whole call
        self.kernel, self.reasons = "stock", ""
        self.why_not: tuple[str, ...] = ()  # why a pattern's own kernel does not run

    def state(self, entry: Entry) -> State:
        shared = entry.contribution.scope == "layers"
        name = f"{entry.method}, all layers" if shared else entry.method
        if name not in self.states:
            self.states[name] = self._shared(entry) if shared else self._kept(entry)
        return self.states[name]

    def _shared(self, entry: Entry) -> State:
        """The State of all layers of the method; the layer itself remembers that the patch was there."""
        self._kept(entry)
        return of_layers(self.call.facts.get("layers"), entry, self.runtime.site)

    def _kept(self, entry: Entry) -> State:
        """The State of a method at this site, as it was left or a new one."""
        if entry.owner in self.plan.running:
            return of_run(self.call.facts.get("run"), entry, self.runtime.site)
        kept = getattr(self.call.layer, "states", None) if entry.owner in self.plan.keeping else None
        # Without a cache there is no sequence to remember: the state lives for this call.
        state = State(entry.owner)
        found: State = state if kept is None else kept.setdefault(entry.method, state)
        return found

    def adds_up(self, layer: CompressingLayer | None) -> bool:
        """Whether ``layer`` is told the column mass of all rows of this call."""
        return layer is not None and self.times is None and layer.scored_by() == "column_mass"

    def value(self, entry: Entry) -> Any:
        if entry.contribution.constant is not None:
            return entry.contribution.constant
        value = entry.contribution.value
        if value is None:
            raise InputError(
                f"{entry.method}: a {entry.contribution.kind} contribution needs a value function"
            )
        heads = entry.contribution.heads
        if heads and max(heads) >= self.call.query.shape[1]:
            raise InputError(
                f"{entry.method}: head {max(heads)} does not exist at {self.runtime.site.name}, "
                f"which has {self.call.query.shape[1]} heads"
            )
        stats = replace(self.stats, **self.probed.of(entry)) if self.probed.found else self.stats
        if entry in self.masses:
            stats = replace(stats, group_mass=self.masses[entry])
        return value(self.call, stats, self.state(entry))

    def observe(self) -> None:
        for entry in self.plan.of["observe"]:
            self.value(entry)
            self.acted.add(entry.owner)

    def visibility(self, layer: CompressingLayer | None, patterns: list[Pattern]) -> Visibility:
        call = self.call
        mask, causal = call.mask, call.causal
        if layer is not None and layer.evicted:
            mask, causal = layer.mask(mask, call.query.shape[2], causal)
        _, h, hkv, lq, lk = call.shape
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] not in (1, h):
            mask = mask.repeat_interleave(h // hkv, 1)  # slots differ from one key/value head to the next
        # Flash-style padding (B, Lk) comes beside the causal flag, not instead of it.
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        visible = visibility(
            mask if padding is None else None,
            causal=causal,
            lq=lq,
            lk=lk,
            real=call.real,
            window=call.sliding_window,
            device=call.query.device,
        )
        if padding is not None:
            visible = replace(visible, keys=padding[:, -lk:].bool())
        for pattern in patterns:
            visible = visible.restrict(
                pattern.visible, getattr(pattern, "batch", 1), getattr(pattern, "heads", 1)
            )
            self.edited = True
        return visible

    def options(self) -> dict[str, Any]:
        call = self.call
        return {
            "scale": call.scaling,
            "position_bias": call.position_bias,
            "softcap": call.softcap,
            "sink_logits": call.sink_logits,
        }

    def terms(self) -> Terms:
        call = self.call
        return Terms(call.scaling, call.position_bias, call.softcap, call.sink_logits)

    def attention(self, visible: Visibility, extra: Sequence[Any] = ()) -> tuple[Tensor, Tensor]:
        call = self.call
        options = self.options()
        choice = choose(call.query, call.key, call.value, visibility=visible, terms=self.terms())
        self.kernel, self.reasons = f"lse/{choice.name}", "; ".join((*self.why_not, *choice.reasons))
        out, lse = attention_lse(call.query, call.key, call.value, visibility=visible, **options)
        return merge_extra(call, out, lse, extra) if extra else (out, lse)

    def row_probabilities(self, visible: Visibility, start: int, stop: int) -> Tensor:
        """Probabilities (B, H, rows, Lk) of the rows start..stop."""
        call = self.call
        bias = call.position_bias
        if bias is not None:
            bias = bias[:, :, start:stop] if bias.shape[2] > 1 else bias
        added = visible.bias_at(torch.arange(start, stop, device=visible.device))
        if added is not None:
            bias = added if bias is None else bias + added
        return row_probabilities(
            call.query[:, :, start:stop], call.key, valid=visible.rows(start, stop), scale=call.scaling,
            position_bias=bias, softcap=call.softcap, sink_logits=call.sink_logits,
        )  # fmt: skip
