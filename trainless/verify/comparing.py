"""Checks that compare runs of the probe: with the patch and without it, at its identity, after its removal.

Of each method: ``fired`` (every matched site was called), ``acted`` (it changed or measured something),
``identity`` (at its identity values, at the same sites, the unpatched bits come out). Of the whole patch:
``removal`` (taken off, it leaves the bits that pausing it leaves and other patches as they were; put back, it
does the same again) and ``finite`` (no NaN or infinity that was not there before). What cannot be told from the
probe is "not checked", with the reason, and is no failure.
"""

from __future__ import annotations

import dataclasses

from ..engine.runtime import runtime_of
from ..patch.binding import Binding, entries_by_module, same_plan
from ..seams import Evict, Lease, Quantise, Site, tokens_of
from .outcome import FAILED, OK, UNCHECKED, Answer
from .probing import difference, same_bits
from .trial import Trial, given_by, rules_of, told, uninformed

IN_GENERATE = "its logits processor runs in generate, which the probe is not: give a function as probe="


def fired(trial: Trial, binding: Binding) -> Answer:
    calls = trial.tallies(binding, trial.on)
    sites = [site for site, _ in binding.contributions]
    missed = [site for site, call in zip(sites, calls, strict=True) if not call.fired]
    said = f"{len(sites) - len(missed)}/{len(sites)} sites, {sum(c.fired for c in calls)} calls"
    if not missed:
        return OK, said
    unreached = frozenset[str]().union(*(p.misses for p in trial.probes))
    if all(site.parts & unreached for site in missed):
        return UNCHECKED, f"{said}; the default probe does not reach {'/'.join(unreached)}: give probe="
    if _only_in_generate(binding):
        return UNCHECKED, f"{said}; {IN_GENERATE}"
    more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
    return FAILED, f"{said}; never called: {missed[0].name}{more}"


def acted(trial: Trial, binding: Binding) -> Answer:
    calls = trial.tallies(binding, trial.on)
    given = given_by(binding)
    acted = sum(c.acted for c in calls)
    alone = len(trial.patch.bindings) == 1
    changed = not same_bits(trial.on.tensors, trial.off.tensors)
    if acted or (changed and alone):
        said = f"{acted} calls at {sum(bool(c.acted) for c in calls)}/{len(calls)} sites"
        if not alone:
            return OK, said
        return OK, f"{said}; {difference(trial.on.tensors, trial.off.tensors)}"
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
    if trial.given is None and any("images" in c.asks for c in given):
        return (
            UNCHECKED,
            "the default probe has no image; give probe=, what the processor makes of a prompt with one",
        )
    if not changed and (least := max(c.least for c in given)):
        return UNCHECKED, f"calls give it something to do from about {least} tokens on; give a longer probe="
    seen, kept = max(c.tokens_seen for c in calls), max(c.tokens_kept for c in calls)
    reason = IN_GENERATE if _only_in_generate(binding) else _had_room(binding, seen, kept)
    reason = reason or _acts_elsewhere(trial, binding)
    if reason:
        return UNCHECKED, reason
    return FAILED, f"{sum(c.fired for c in calls)} calls passed, and it did nothing in any of them"


def _only_in_generate(binding: Binding) -> bool:
    """Whether all that a method brings is a processor of logits, which no forward asks."""
    return all(c.inert or c.kind == "logits" for c in given_by(binding))


def _had_room(binding: Binding, seen: int, held: int) -> str | None:
    """Why a rule of the cache dropped or packed nothing, or None when there is none or it should have."""
    rules = rules_of(binding)
    if not rules:
        return None
    if not seen:
        return "the probe keeps no cache that could be compressed"
    packing = [rule for rule in rules if isinstance(rule, Quantise)]
    if any(r.packs(held, tokens_of(r.residual, seen), True) and seen >= r.start for r in packing):
        return None
    if packing:
        left = f"{held} that are left" if held < seen else f"{seen} tokens"
        return f"all {left} of the probe are recent enough to stay as they are; give a longer probe="
    if any(isinstance(rule, Evict) and rule.chosen for rule in rules):
        return f"it left all {seen} tokens of the probe as they were; give a longer probe="
    kept = min(rule.total(seen) for rule in rules if isinstance(rule, Evict))
    if kept < seen:
        return None
    return f"its budget of {kept} tokens holds all {seen} of the probe; give a longer probe="


def _acts_elsewhere(trial: Trial, binding: Binding) -> str | None:
    """That the default probe gives the method something to do, when the one given does not."""
    if trial.given is None:
        return None
    own, given = trial.probes, trial.given
    try:
        trial.given = None
        trial.probes = trial.make_probes()
        ran = trial.run()
        names = "; ".join(p.name for p in trial.probes)
    except Exception:
        return None
    finally:
        trial.probes, trial.given = own, given
    if not any(c.acted for c in trial.tallies(binding, ran)):
        return None
    return f"this probe gives it nothing to do; it acts on {names}"


def identity(trial: Trial, binding: Binding) -> Answer:
    values = binding.method.identity
    if values is None:
        return _idle(trial, binding)
    said = "at " + ", ".join(f"{k}={v!r}" for k, v in values.items())
    try:
        method = dataclasses.replace(binding.method, **values)
        method.check()
        tried = [same_plan(binding, method)]
        if any(c.inert and c.kind == "kv" for c in given_by(tried[0])) and not _beside_another(trial):
            # A budget that holds everything must change no bit when that is found out late, either. (Beside another
            # patch's rule it may: both have the layer attend in the order of its slots, so that sums round otherwise.)
            tried.append(uninformed(tried[0]))
        for one in tried:
            found = trial.alone(one)
            if not same_bits(found.tensors, trial.off.tensors):
                return trial.unless_unsteady(f"{said} {difference(found.tensors, trial.off.tensors)}")
    except Exception as error:
        return FAILED, f"{said} it raises {told(error)}"
    return OK, f"{said} the unpatched bits"


def _beside_another(trial: Trial) -> bool:
    """Whether another patch keeps the same caches."""
    mine = {b.lease for b in trial.patch.bindings}
    runtimes = [runtime_of(module) for module in entries_by_module(trial.patch.bindings)]
    entries = [entry for runtime in runtimes if runtime is not None for entry in runtime.entries]
    return any(e.contribution.kind == "kv" and e.owner not in mine for e in entries)


def _idle(trial: Trial, binding: Binding) -> Answer:
    """A method without identity parameters: a probe that gives it nothing to do must keep its bits."""
    names = []
    for i, probe in enumerate(trial.probes):
        if len(trial.patch.bindings) > 1 or any(c.acted for c in trial.tallies(binding, trial.on, i)):
            continue
        if not same_bits(trial.on.outputs[i], trial.off.outputs[i]):
            gap = difference(trial.on.outputs[i], trial.off.outputs[i])
            return trial.unless_unsteady(f"it says that it did nothing on {probe.name}, but {gap}")
        names.append(probe.name)
    if names:
        return OK, f"the unpatched bits on {', '.join(names)}, where it has nothing to do"
    return UNCHECKED, "no parameter values make it the identity"


# ---------------------------------------------------------------- the whole patch


def removal(trial: Trial) -> Answer:
    foreign = _foreign(trial)
    if foreign:
        return FAILED, f"changed by somebody else since and would be left so: {', '.join(foreign)}"
    patch = trial.patch
    places = [(station, list(station.patches)) for station in patch._stations()]
    try:
        patch.remove()
        left = [site.name for site, _ in entries_by_module(patch.bindings).values() if _idle_runtime(site)]
        gone = trial.run()
    finally:
        if not patch.applied:
            patch._commit()
        for station, order in places:
            if patch in station.patches:
                station.patches[:] = order
        trial.standing.restore_order()
    again = trial.run()
    mine: set[Lease] = {b.lease for b in patch.bindings}
    if left:
        return FAILED, f"taken off, it leaves its hooks at {', '.join(left)}"
    if not same_bits(gone.tensors, trial.off.tensors):
        gap = difference(gone.tensors, trial.off.tensors)
        return trial.unless_unsteady(f"between taken off and paused {gap}")
    if gone.calls_of_others(mine) != trial.off.calls_of_others(mine):
        return FAILED, "without it, other patches are called or act at other places"
    if not same_bits(again.tensors, trial.on.tensors):
        gap = difference(again.tensors, trial.on.tensors)
        return trial.unless_unsteady(f"between before and after it was off {gap}")
    return OK, "off, the bits of the pause; on again, the bits of before"


def _foreign(trial: Trial) -> list[str]:
    """Where removal would meet an edit of somebody else's."""
    patch = trial.patch
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


def finite(trial: Trial) -> Answer:
    bad = 0
    for on, off in zip(trial.on.tensors, trial.off.tensors, strict=False):
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
