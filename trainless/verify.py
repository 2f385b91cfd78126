"""``Patch.verify``: does a patch do what it says, and does it come off? Tried on a probe; nothing is left behind.

Checks of each method: ``fired`` (every matched site was called), ``acted`` (it changed or measured
something), ``identity`` (at its identity values, at the same sites, the unpatched bits come out).
Checks of the whole patch: ``removal`` (taken off, it leaves the bits that pausing it leaves and other
patches as they were; put back, it does the same again) and ``finite`` (no NaN or infinity that was not there
before). What cannot be told from the probe is "not checked", with the reason, and is no failure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .binding import Binding, entries_by_module, same_plan
from .errors import InputError, TrainlessError, Unsupported
from .hosts.base import Lease, Tally, runtime_of
from .hosts.probes import Probe
from .patching import Patch
from .probing import (
    Ran,
    Standing,
    difference,
    probes_for,
    quietly,
    run,
    same_bits,
    tokens_for,
    user_probe,
)
from .seams import Contribution, Evict, Quantise, Site, tokens_of
from .verification import FAILED, OK, UNCHECKED, Check, Verification

WHOLE = "whole patch"
UNSTEADY = "the model itself does not give the same bits twice"
Answer = tuple[str, str]  # status, detail


def verify(patch: Patch, probe: Any = None) -> Verification:
    """Run the checks of this module on ``patch``. The model, and what reports count, are afterwards as before.

    probe: inputs of the model by name, a tensor of input ids, a function that takes what was patched and
    returns outputs, or None for inputs made from the model's config (random tokens with a prefill and
    cached steps, long enough for evictors to act; random images; random latents at the trained and at
    another size). The model runs about six times on it, in evaluation mode.

    Raises InputError when the patch is off or paused, the model has no weights, or the given probe does not
    run on the unpatched model.
    """
    if not patch.applied or not all(b.lease.active for b in patch.bindings):
        raise InputError(
            f"this patch is {'paused' if patch.applied else 'removed'}, so it cannot be verified; "
            f"{'verify outside `paused()`' if patch.applied else 'patch again'}"
        )
    if any(p.device.type == "meta" for part in patch.parts for p in part.module.parameters()):
        raise InputError("the model is on the meta device and has no weights to run; load them, then verify")
    trial = _Trial(patch, probe)
    standing = Standing(patch.parts)
    with quietly([part.module for part in patch.parts]):
        try:
            checks = trial.checks(standing)
        finally:
            standing.restore_counters()
    named = "; ".join(p.name for p in trial.probes) or "none"
    return Verification(type(patch.model).__name__, patch.recipe.name, named, tuple(checks))


class _Trial:
    """One verification under way. ``off`` and ``on``: the runs with the patch paused and active."""

    def __init__(self, patch: Patch, given: Any):
        self.patch, self.parts, self.given = patch, patch.parts, given
        self.probes: list[Probe] = []
        self.steady: bool | None = None

    def checks(self, standing: Standing) -> list[Check]:
        try:
            self.probes = self._probes()
            self.off = self._paused()
        except Unsupported as error:
            self.probes = []
            return self._unchecked(str(error))
        try:
            self.on = run(self.parts, self.probes)
        except Exception as error:
            first, *others = self._unchecked("the patched model does not run")
            said = f"patched, the model raises {_said(error)}"
            return [dataclasses.replace(first, status=FAILED, detail=said), *others]
        found = []
        for binding in self.patch.bindings:
            for name, check in (("fired", self._fired), ("acted", self._acted), ("identity", self._identity)):
                found.append(Check(binding.name, name, *check(binding)))
        found.append(Check(WHOLE, "removal", *self._removal(standing)))
        found.append(Check(WHOLE, "finite", *self._finite()))
        return found

    def _unchecked(self, reason: str) -> list[Check]:
        names = [(b.name, name) for b in self.patch.bindings for name in ("fired", "acted", "identity")]
        names += [(WHOLE, "removal"), (WHOLE, "finite")]
        return [Check(subject, name, UNCHECKED, reason) for subject, name in names]

    def _probes(self) -> list[Probe]:
        if self.given is not None:
            return [user_probe(self.patch.model, self.parts, self.given)]
        sites = [site for b in self.patch.bindings for site, _ in b.contributions]
        return probes_for(self.parts, sites, tokens_for([r for b in self.patch.bindings for r in _rules(b)]))

    def _paused(self) -> Ran:
        """The run without this patch; a probe that does not run at all is the user's error, or unsuited."""
        try:
            with self.patch.paused():
                return run(self.parts, self.probes)
        except Exception as error:
            if self.given is not None:
                raise InputError(f"the probe does not run on the unpatched model: {_said(error)}") from error
            raise Unsupported(f"the default probe does not run here ({_said(error)}); give probe=") from error

    def _tallies(self, binding: Binding, ran: Ran, probe: int | None = None) -> list[Tally]:
        return [ran.at(site, binding.lease, probe) for site, _ in binding.contributions]

    # ------------------------------------------------------------------ each method

    def _fired(self, binding: Binding) -> Answer:
        calls = self._tallies(binding, self.on)
        sites = [site for site, _ in binding.contributions]
        missed = [site for site, call in zip(sites, calls, strict=True) if not call.fired]
        said = f"{len(sites) - len(missed)}/{len(sites)} sites, {sum(c.fired for c in calls)} calls"
        if not missed:
            return OK, said
        unreached = frozenset[str]().union(*(p.misses for p in self.probes))
        if all(site.parts & unreached for site in missed):
            return UNCHECKED, f"{said}; the default probe does not reach {'/'.join(unreached)}: give probe="
        more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        return FAILED, f"{said}; never called: {missed[0].name}{more}"

    def _acted(self, binding: Binding) -> Answer:
        calls = self._tallies(binding, self.on)
        given = _given(binding)
        acted = sum(c.acted for c in calls)
        alone = len(self.patch.bindings) == 1
        changed = not same_bits(self.on.tensors, self.off.tensors)
        if acted or (changed and alone):
            said = f"{acted} calls at {sum(bool(c.acted) for c in calls)}/{len(calls)} sites"
            if not alone:
                return OK, said
            return OK, f"{said}; {difference(self.on.tensors, self.off.tensors)}"
        if all(c.inert for c in given):
            return UNCHECKED, "it is at its identity value"
        if not any(c.fired for c in calls):
            return UNCHECKED, "none of its sites was called"
        if any(c.statistics for c in given) and any(k != "stock" for c in calls for k in c.kernels):
            return OK, "it measured, and found nothing to change on this probe"
        if not changed and any("step" in c.asks for c in given):
            return (
                UNCHECKED,
                "it goes by the step of a run, and the probe makes one; give a function as probe=",
            )
        reason = self._had_room(binding, max(c.tokens_seen for c in calls)) or self._acts_elsewhere(binding)
        if reason:
            return UNCHECKED, reason
        return FAILED, f"{sum(c.fired for c in calls)} calls passed, and it did nothing in any of them"

    def _had_room(self, binding: Binding, seen: int) -> str | None:
        """Why a rule of the cache dropped or packed nothing, or None when there is none or it should have."""
        rules = _rules(binding)
        if not rules:
            return None
        if not seen:
            return "the probe keeps no cache that could be compressed"
        packing = [rule for rule in rules if isinstance(rule, Quantise)]
        if any(r.packs(seen, tokens_of(r.residual, seen), True) and seen >= r.start for r in packing):
            return None
        if packing:
            return (
                f"all {seen} tokens of the probe are recent enough to stay as they are; give a longer probe="
            )
        if any(isinstance(rule, Evict) and rule.chosen for rule in rules):
            return f"it left all {seen} tokens of the probe as they were; give a longer probe="
        kept = min(rule.total(seen) for rule in rules if isinstance(rule, Evict))
        if kept < seen:
            return None
        return f"its budget of {kept} tokens holds all {seen} of the probe; give a longer probe="

    def _acts_elsewhere(self, binding: Binding) -> str | None:
        """That the default probe gives the method something to do, when the one given does not."""
        if self.given is None:
            return None
        own, given = self.probes, self.given
        try:
            self.given = None
            self.probes = self._probes()
            ran = run(self.parts, self.probes)
            names = "; ".join(p.name for p in self.probes)
        except Exception:
            return None
        finally:
            self.probes, self.given = own, given
        if not any(c.acted for c in self._tallies(binding, ran)):
            return None
        return f"this probe gives it nothing to do; it acts on {names}"

    def _identity(self, binding: Binding) -> Answer:
        values = binding.method.identity
        if values is None:
            return self._idle(binding)
        said = "at " + ", ".join(f"{k}={v!r}" for k, v in values.items())
        try:
            method = dataclasses.replace(binding.method, **values)
            method.check()
            trials = [same_plan(binding, method)]
            if any(c.inert and c.kind == "kv" for c in _given(trials[0])):
                # A budget that holds everything must change no bit when that is found out late, either.
                trials.append(_uninformed(trials[0]))
            for trial in trials:
                found = self._alone(trial)
                if not same_bits(found.tensors, self.off.tensors):
                    return self._unless_unsteady(f"{said} {difference(found.tensors, self.off.tensors)}")
        except Exception as error:
            return FAILED, f"{said} it raises {_said(error)}"
        return OK, f"{said} the unpatched bits"

    def _idle(self, binding: Binding) -> Answer:
        """A method without identity parameters: a probe that gives it nothing to do must keep its bits."""
        names = []
        for i, probe in enumerate(self.probes):
            if len(self.patch.bindings) > 1 or any(c.acted for c in self._tallies(binding, self.on, i)):
                continue
            if not same_bits(self.on.outputs[i], self.off.outputs[i]):
                gap = difference(self.on.outputs[i], self.off.outputs[i])
                return self._unless_unsteady(f"it says that it did nothing on {probe.name}, but {gap}")
            names.append(probe.name)
        if names:
            return OK, f"the unpatched bits on {', '.join(names)}, where it has nothing to do"
        return UNCHECKED, "no parameter values make it the identity"

    def _alone(self, binding: Binding) -> Ran:
        """A run with ``binding`` alone in place of this patch; other patches stay."""
        with self.patch.paused():
            stand_in = Patch(self.patch.model, self.patch.recipe, self.parts, [binding])
            stand_in._commit()
            try:
                return run(self.parts, self.probes)
            finally:
                stand_in.remove()

    def _unless_unsteady(self, failure: str) -> Answer:
        """A failure, unless the model without this patch does not even repeat its own bits."""
        if self.steady is None:
            with self.patch.paused():
                again = run(self.parts, self.probes)
            self.steady = same_bits(again.tensors, self.off.tensors)
        return (FAILED, failure) if self.steady else (UNCHECKED, UNSTEADY)

    # ------------------------------------------------------------------ the whole patch

    def _removal(self, standing: Standing) -> Answer:
        foreign = self._foreign()
        if foreign:
            return FAILED, f"changed by somebody else since and would be left so: {', '.join(foreign)}"
        patch = self.patch
        places = [(station, list(station.patches)) for station in patch._stations()]
        try:
            patch.remove()
            left = [
                site.name for site, _ in entries_by_module(patch.bindings).values() if _idle_runtime(site)
            ]
            gone = run(self.parts, self.probes)
        finally:
            if not patch.applied:
                patch._commit()
            for station, order in places:
                if patch in station.patches:
                    station.patches[:] = order
            standing.restore_order()
        again = run(self.parts, self.probes)
        mine: set[Lease] = {b.lease for b in patch.bindings}
        if left:
            return FAILED, f"taken off, it leaves its hooks at {', '.join(left)}"
        if not same_bits(gone.tensors, self.off.tensors):
            gap = difference(gone.tensors, self.off.tensors)
            return self._unless_unsteady(f"between taken off and paused {gap}")
        if gone.calls_of_others(mine) != self.off.calls_of_others(mine):
            return FAILED, "without it, other patches are called or act at other places"
        if not same_bits(again.tensors, self.on.tensors):
            gap = difference(again.tensors, self.on.tensors)
            return self._unless_unsteady(f"between before and after it was off {gap}")
        return OK, "off, the bits of the pause; on again, the bits of before"

    def _foreign(self) -> list[str]:
        """Where removal would meet an edit of somebody else's."""
        patch = self.patch
        mine = {b.lease for b in patch.bindings}
        edits = list(patch.journal.edits)
        for module in entries_by_module(patch.bindings):
            runtime = runtime_of(module)
            if runtime is not None and all(entry.owner in mine for entry in runtime.entries):
                edits += runtime.journal.edits
        for station in patch._stations():
            if station.patches == [patch]:
                edits += station.journal.edits
        return [edit.where for edit in edits if not edit.is_ours()]

    def _finite(self) -> Answer:
        bad = 0
        for on, off in zip(self.on.tensors, self.off.tensors, strict=False):
            if on.is_floating_point() and on.shape == off.shape:
                bad += int((~on.isfinite() & off.isfinite()).sum())
            elif on.is_floating_point():
                bad += int((~on.isfinite()).sum())
        if bad:
            return FAILED, f"{bad} outputs are NaN or infinite that are not without the patch"
        return OK, "no NaN or infinity that is not there without the patch"


def _idle_runtime(site: Site) -> bool:
    """Whether something of ours stands at a site where no patch is."""
    runtime = runtime_of(site.module)
    return runtime is not None and not runtime.entries


def _given(binding: Binding) -> list[Contribution]:
    return [c for _, contributions in binding.contributions for c in contributions]


def _rules(binding: Binding) -> Sequence[Evict | Quantise]:
    return [c.policy for c in _given(binding) if c.policy is not None]


def _uninformed(binding: Binding) -> Binding:
    """The same binding, not known beforehand to change nothing."""
    contributions = [
        (site, [dataclasses.replace(c, inert=False) for c in given]) for site, given in binding.contributions
    ]
    return dataclasses.replace(binding, lease=Lease(binding.name), contributions=contributions)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return (
        lines[0][:200] if isinstance(error, TrainlessError) else f"{type(error).__name__}: {lines[0][:160]}"
    )
