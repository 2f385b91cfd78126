"""The engine: one attention call through the plan of its site, on the cheapest path that is exact.

Order: position, keys → scale → static pattern → statistics → dynamic pattern or form → mass → gain → kv.
The attention matrix is never stored whole: statistics come from the log-sum-exp of each row and a second
pass over blocks, edits from the few columns that they touch. A call that changes nothing runs the stock
kernel and returns its bits. Few query rows (decode, drafts) have their probabilities computed outright.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cache import CompressingLayer, ExpandedLayer, PackedLayer
from ..errors import Unsupported
from ..kernels.visibility import adds_bias, bias_times
from ..seams import AttentionCall, Entry, Formed, Lease
from .autocast import narrowed, under_autocast
from .packed import PackedRun
from .patterns import Pattern, visible_keys
from .run import Delegate
from .runtime import Runtime

EXPANDED = "the module works on what its cache returns: codes become numbers for each call"


def attend(runtime: Runtime, call: AttentionCall, delegate: Delegate) -> Tensor:
    """Run ``call`` through the plan of ``runtime``; returns the output, (B, Lq, H, D).

    ``delegate`` computes plain attention for a call with the implementation that the user had.
    """
    runtime.passed()
    if narrowed(call):
        return under_autocast(call, delegate, functools.partial(_attend, runtime))
    return _attend(runtime, call, delegate)


def _attend(runtime: Runtime, call: AttentionCall, delegate: Delegate) -> Tensor:
    # A layer that has dropped or packed tokens is attended to here as long as a hook of ours stands at the site.
    if runtime.plan.inert and not isinstance(call.layer, CompressingLayer):
        return delegate(call)
    run = _Run(runtime, call, delegate)
    # Families read learned sinks from the module, so a scale has to reach them on the long way.
    if runtime.plan.direct and call.sink_logits is None and not isinstance(call.layer, CompressingLayer):
        return run.direct()
    return run.output()


class _Run(PackedRun):
    """One call on its way through the plan."""

    # ------------------------------------------------------------------ the order of things

    def output(self) -> Tensor:
        call, plan = self.call, self.plan
        layer = call.layer if isinstance(call.layer, CompressingLayer) else None
        if layer is not None:
            # Attending to less than the whole, or to codes, changes a call as dropping and packing do.
            self.acted.update(lease for lease in layer.altered() if lease.active)
            layer.note(call.real)
            self.edited = layer.evicted
            self._refuse_bias(layer)
            self._refuse_hidden_past(layer)
        self._position()
        extra = self._extra_keys()
        # Asked for before the scale, which may depend on how many keys a row is left with.
        patterns = self._static_patterns(extra)
        self._scale()
        call = self.call
        dynamic = [e for e in plan.of["pattern"] if e.contribution.dynamic]
        form = plan.of["form"]
        wanted = self._wanted(layer)
        self._ask_groups()
        moves = plan.of["mass"]
        formed = self._form(form[0]) if form else None
        if formed is not None:
            out = formed
        elif isinstance(layer, PackedLayer) and layer.packed:
            out = self._packed_softmax(layer, extra, wanted, moves)
        elif not (self.edited or extra or patterns or wanted or moves or self.groups or dynamic):
            out = self.delegate(call)
            self._observe()  # what asks for facts of the call, not for statistics
        else:
            out = self._softmax(layer, extra, patterns, wanted, moves)
        out = self._gain(out)
        if isinstance(layer, ExpandedLayer) and layer.store.runs:
            self.reasons = "; ".join(filter(None, (self.reasons, EXPANDED)))
        if layer is not None and plan.evictor is not None and self._chooses(layer):
            layer.choose(self._value(plan.evictor))
        if isinstance(layer, PackedLayer):
            self.acted.update(layer.evict())
            self.acted.update(layer.finish(self._tiers(layer)))
        elif layer is not None:
            self.acted.update(layer.settle())
        self._account(layer)
        return out

    def _refuse_bias(self, layer: CompressingLayer) -> None:
        """A mask that adds to the logits is as wide as the sequence, and the keys are no longer where it says."""
        mask = self.call.mask
        if (layer.evicted or layer.packed) and adds_bias(mask, self.call.query.shape[2]):
            raise Unsupported(
                f"{layer.lease.name}: {self.runtime.site.name} was given a mask that adds a bias to the logits, key by "
                "key, and its cache has dropped or packed keys; use a mask that only hides keys"
            )

    def _refuse_hidden_past(self, layer: CompressingLayer) -> None:
        """Where keys are dropped or packed, a row sees every token held: a mask cannot hide one that was real."""
        call, rows = self.call, self.call.query.shape[2]
        mask, past = call.mask, layer.seen - rows
        if (
            not (layer.evicted or layer.packed)
            or not isinstance(mask, Tensor)
            or mask.shape[-1] != layer.seen
        ):
            return
        last = mask if mask.dim() == 2 else mask[:, 0, -1]
        shown = (
            last if last.dtype == torch.bool or mask.dim() == 2 else last > torch.finfo(last.dtype).min / 2
        )
        counts = shown[:, :past].bool().sum(1).expand(len(layer.ages)).tolist()
        new = [(rows, 1)] * len(counts)
        if call.real is not None:
            new = torch.stack([call.real.sum(1), call.real[:, -1].long()], 1).tolist()
        # A row whose last token is padding says nothing of what it sees.
        if any(n < age - own and ends for n, age, (own, ends) in zip(counts, layer.ages, new, strict=True)):
            raise Unsupported(
                f"{layer.lease.name}: {self.runtime.site.name} was given a mask that hides earlier tokens which were no "
                "padding when they came, and its cache has dropped or packed keys; start a new cache, or give "
                "attention_mask=1 for them (generate() without one takes every pad token in the text for padding)"
            )

    def direct(self) -> Tensor:
        """Scale, the user's own attention, gain: decoding calls this often, so nothing else is looked at."""
        self._scale()
        out = self._gain(self.delegate(self.call))
        self._account(None)
        return out

    # ------------------------------------------------------------------ before the softmax

    def _position(self) -> None:
        for entry in self.plan.of["position"]:
            steps = self._value(entry)
            if steps is None:
                continue
            rotate = self.runtime.rotate
            if rotate is None:
                raise Unsupported(
                    f"{entry.method}: {self.runtime.site.name} has no rotary embedding that can be moved; "
                    'use positions="real"'
                )
            self.call = replace(self.call, key=rotate(self.call.key, steps))
            self.edited = True
            self.acted.add(entry.owner)

    def _extra_keys(self) -> list[Any]:
        found = []
        for entry in self.plan.of["keys"]:
            extra = self._value(entry)
            if extra is not None:
                found.append(extra)
                self.acted.add(entry.owner)
        return found

    def _static_patterns(self, extra: list[Any]) -> list[Pattern]:
        """The static patterns that restrict this call, and for scales the number of keys that each row sees."""
        found = []
        for entry in self.plan.of["pattern"]:
            if entry.contribution.dynamic:
                continue
            pattern = self._value(entry)
            if pattern is not None:
                found.append(pattern)
                self.acted.add(entry.owner)
        if (found or extra) and any(e.contribution.constant is None for e in self.plan.of["scale"]):
            call = self.call
            rows, keys = call.query.shape[2], call.key.shape[2]
            mask = call.mask if isinstance(call.mask, Tensor) and call.mask.dim() == 4 else None
            seen = visible_keys(found, rows, keys, call.query.device, mask)
            for more in extra:
                first, stop = more.rows or (0, rows)
                if more.visible is None:
                    seen[..., first:stop] += more.key.shape[2]
                else:
                    seen[..., first:stop] += more.visible[0, 0].sum(-1)
            call.facts["visible_keys"] = seen[..., None]
        return found

    def _scale(self) -> None:
        factor: Any = 1.0
        for entry in self.plan.of["scale"]:
            value = self._value(entry)
            if value is None:
                continue
            factor = factor * value
            self.acted.add(entry.owner)
        if isinstance(factor, float) and factor == 1.0:
            return
        call = self.call
        bias = None if call.position_bias is None else call.position_bias * factor
        if isinstance(factor, Tensor):
            if call.softcap is not None or call.sink_logits is not None:
                raise Unsupported(
                    f"{self.runtime.site.name}: a scale per head or query cannot be combined with "
                    "soft-capped logits or learned sinks; use one number"
                )
            query = (call.query.to(call.statistics_dtype) * factor).to(call.query.dtype)
            mask = bias_times(call.mask, factor, *call.shape[3:])
            self.call = replace(call, query=query, mask=mask, position_bias=bias)
            return
        if call.sink_logits is not None:
            self.edited = True  # families read their sinks from the module, whatever they are passed
        # c·tanh(s·x/c) times f is (f·c)·tanh((f·s)·x/(f·c)): scaling all three scales the whole logit.
        self.call = replace(
            call,
            mask=bias_times(call.mask, factor, *call.shape[3:]),
            scaling=call.scaling * factor,
            position_bias=bias,
            softcap=None if call.softcap is None else call.softcap * factor,
            sink_logits=None if call.sink_logits is None else call.sink_logits * factor,
        )

    @staticmethod
    def _chooses(layer: CompressingLayer | None) -> bool:
        """Whether the method itself says what this layer keeps after the call."""
        return layer is not None and layer.policy.chosen and layer.lease.active

    def _wanted(self, layer: CompressingLayer | None) -> set[str]:
        """Statistics that this call has to produce."""
        wanted: set[str] = set()
        scored = None if layer is None else layer.scored_by()
        for entry in self.plan.active:
            state = self._state(entry)
            asked = set(entry.contribution.wanted(self.call, state))
            if "probe_mass" in asked:
                told = scored == "probe_mass" or self._chooses(layer)
                cached = entry is not self.plan.evictor or told
                if not (cached and self.probed.ask(entry, self.call, state)):
                    asked.remove("probe_mass")
            if asked:
                self.asking.add(entry)
            wanted.update(asked)
        if scored == "column_mass":
            wanted.add(scored)
        return wanted

    def _ask_groups(self) -> None:
        """The groups of keys whose mass somebody wants to know in this call."""
        for entry in self.plan.active:
            named = entry.contribution.groups
            found = None if named is None else named(self.call, self._state(entry))
            if found is not None:
                self.groups[entry] = found

    # ------------------------------------------------------------------ instead of the softmax

    def _form(self, entry: Entry) -> Tensor | None:
        """The output by another operator; None where the method leaves this call to the ordinary attention."""
        value = self._value(entry)
        if value is None:
            return None
        self.kernel = entry.method
        self.acted.add(entry.owner)
        if isinstance(value, Formed):
            self.kernel, self.reasons = value.kernel, value.reasons
            return value.output
        out: Tensor = value
        return out

    # ------------------------------------------------------------------ after the softmax

    def _gain(self, out: Tensor) -> Tensor:
        for entry in self.plan.of["gain"]:
            factor = self._value(entry)
            if factor is None:
                continue
            heads = entry.contribution.heads
            self.acted.add(entry.owner)
            if heads is None:
                out = out * (factor.to(out.dtype) if isinstance(factor, Tensor) else factor)
                continue
            out = out.clone()
            out[:, :, list(heads)] = out[:, :, list(heads)] * (
                factor.to(out.dtype) if isinstance(factor, Tensor) else factor
            )
        return out

    def _tiers(self, layer: PackedLayer) -> Tensor | None:
        """Which of the waiting tokens the method wants in the high tier; None where it has no say now."""
        entry = self.plan.quantiser
        if entry is None or not layer.rule.chosen or not layer.due:
            return None
        if not isinstance(layer, ExpandedLayer):
            high: Tensor | None = self._value(entry)
            return high
        # The call is about everything that is held; the method is asked about what waits.
        waiting = layer.keys.shape[2]
        call, found = self.call, self.probed.of(entry)
        if found:
            mass, rows = found["probe_mass"], found["probe_rows"][:, None]
            found = {
                "probe_mass": layer.waiting_columns(mass),
                "probe_rows": layer.waiting_columns(rows)[:, 0],
            }
        call = replace(call, key=call.key[:, :, -waiting:], value=call.value[:, :, -waiting:])
        value = entry.contribution.value
        assert value is not None
        tiers: Tensor | None = value(call, replace(self.stats, **found), self._state(entry))
        return tiers

    # ------------------------------------------------------------------ bookkeeping

    def _account(self, layer: CompressingLayer | None) -> None:
        with self.runtime.counting:
            for owner in self.acted:
                tally = self.runtime.tallies.get(owner)
                if tally is not None:
                    tally.acted += 1
            for tally in self.runtime.live:
                tally.kernels[self.kernel] += 1
                if self.reasons:
                    tally.reasons[self.kernel] = self.reasons
        if layer is None:
            return
        self.runtime.settled = None
        for entry in self.plan.of["kv"]:
            assert isinstance(entry.owner, Lease)
            self.runtime.tallies[entry.owner].hold(layer)
