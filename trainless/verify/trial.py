"""One verification: the probe is run with the patch and without it, and the checks look at what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..engine.runtime import Tally
from ..errors import InputError, TrainlessError, Unsupported
from ..hosts.probes import Probe, default_probes, dense_probes
from ..patch.binding import Binding
from ..patch.handle import Patch
from ..seams import Contribution, Evict, Lease, Quantise
from .outcome import FAILED, UNCHECKED, WHOLE, Answer, Check, Verification
from .probing import Make, Ran, probes_for, run, same_bits, tokens_for, user_probe
from .sole import sole
from .standing import Standing, quietly

UNSTEADY = "the model itself does not give the same bits twice"


def verify(patch: Patch, probe: Any = None) -> Verification:
    """Run the checks of this package on ``patch``. The model, and what reports count, are afterwards as before.

    probe: inputs of the model by name, a tensor of input ids, a function that takes what was patched and
    returns outputs, or None for inputs made from the model's config (random tokens with a prefill and
    cached steps, long enough for evictors to act; random images; random latents at the trained and at
    another size). The model runs about ten times on it, in evaluation mode. The patch is paused by turns, so
    calls of other threads wait until all is over; a probe calls the model in the thread of ``verify``.

    Raises InputError when the patch is off or paused, the model has no weights, or the given probe does not
    run on the unpatched model.
    """
    if not patch.applied or not all(b.lease.active for b in patch.bindings):
        raise InputError(
            f"this patch is {'paused' if patch.applied else 'removed'}, so it cannot be verified; "
            f"{'verify outside `paused()`' if patch.applied else 'patch again'}"
        )
    if any(_weightless(module) for part in patch.parts for module in part.module.modules()):
        raise InputError("the model is on the meta device and has no weights to run; load them, then verify")
    with sole(patch.parts):
        standing = Standing(patch.parts)
        trial = Trial(patch, probe, standing)
        with quietly([part.module for part in patch.parts]):
            try:
                checks = trial.checks()
            finally:
                standing.restore()
    named = "; ".join(p.name for p in trial.probes) or "none"
    return Verification(type(patch.model).__name__, patch.recipe.name, named, tuple(checks))


def _weightless(module: Any) -> bool:
    """Whether a module's own weights are nowhere; an offloaded one has a hook that brings them for each call."""
    if getattr(module, "_hf_hook", None) is not None:
        return False
    return any(p.device.type == "meta" for p in module.parameters(recurse=False))


class Trial:
    """One verification under way. ``off`` and ``on``: the runs with the patch paused and active."""

    def __init__(self, patch: Patch, given: Any, standing: Standing):
        self.patch, self.parts, self.given, self.standing = patch, patch.parts, given, standing
        self.probes: list[Probe] = []
        self.steady: bool | None = None

    def checks(self) -> list[Check]:
        from . import comparing, dense_checks, layout, settled

        try:
            self.probes = self.make_probes()
            self.off = self._paused()
        except Unsupported as error:
            self.probes = []
            return self._unchecked(str(error))
        try:
            self.on = self.run()
        except Exception as error:
            first, *others = self._unchecked("the patched model does not run")
            detail = f"patched, the model raises {told(error)}"
            return [dataclasses.replace(first, status=FAILED, detail=detail), *others]
        found = []
        seen = dense_checks.watched(self)
        steps = settled.tried(self)
        for binding in self.patch.bindings:
            for name, check in (
                ("fired", comparing.fired), ("acted", comparing.acted), ("identity", comparing.identity)
            ):  # fmt: skip
                found.append(Check(binding.name, name, *check(self, binding)))
            found += dense_checks.of_method(self, binding, seen)
            found += settled.of_method(binding, steps)
        found += dense_checks.of_patch(self, seen)
        found += layout.checks(self)
        found.append(Check(WHOLE, "removal", *comparing.removal(self)))
        found.append(Check(WHOLE, "finite", *comparing.finite(self)))
        gone = self.patch.exchanged()
        return [*found, Check(WHOLE, "in use", FAILED, "; ".join(gone))] if gone else found

    def _unchecked(self, reason: str) -> list[Check]:
        names = [
            (b.name, name) for b in self.patch.bindings for name in ("fired", "acted", "identity", "result")
        ]
        names += [(WHOLE, "removal"), (WHOLE, "finite")]
        return [Check(subject, name, UNCHECKED, reason) for subject, name in names]

    # ------------------------------------------------------------------ runs

    def run(self) -> Ran:
        return run(self.standing, self.probes)

    def make_probes(self) -> list[Probe]:
        if self.given is not None:
            return [user_probe(self.patch.model, self.parts, self.given)]
        return self._made_for(default_probes)

    def _made_for(self, make: Make) -> list[Probe]:
        sites = [site for b in self.patch.bindings for site, _ in b.contributions]
        least = max((c.least for b in self.patch.bindings for c in given_by(b)), default=0)
        tokens = tokens_for([r for b in self.patch.bindings for r in rules_of(b)], least)
        return probes_for(self.parts, sites, tokens, make)

    def dense_probes(self) -> list[Probe]:
        """Probes small enough for the whole matrix of each of their calls."""
        return self.probes if self.given is not None else self._made_for(dense_probes)

    def _paused(self) -> Ran:
        """The run without this patch; a probe that does not run at all is the user's error, or unsuited."""
        try:
            with self.patch.paused():
                return self.run()
        except Exception as error:
            if self.given is not None:
                raise InputError(f"the probe does not run on the unpatched model: {told(error)}") from error
            raise Unsupported(f"the default probe does not run here ({told(error)}); give probe=") from error

    def tallies(self, binding: Binding, ran: Ran, probe: int | None = None) -> list[Tally]:
        return [ran.at(site, binding.lease, probe) for site, _ in binding.contributions]

    def alone(self, binding: Binding) -> Ran:
        """A run with ``binding`` alone in place of this patch; other patches stay."""
        with self.patch.paused():
            stand_in = Patch(self.patch.model, self.patch.recipe, self.parts, [binding])
            stand_in._commit()
            try:
                return self.run()
            finally:
                stand_in.remove()

    def unless_unsteady(self, failure: str) -> Answer:
        """A failure, unless the model without this patch does not even repeat its own bits."""
        if self.steady is None:
            with self.patch.paused():
                again = self.run()
            self.steady = same_bits(again.tensors, self.off.tensors)
        return (FAILED, failure) if self.steady else (UNCHECKED, UNSTEADY)


def given_by(binding: Binding) -> list[Contribution]:
    return [c for _, contributions in binding.contributions for c in contributions]


def rules_of(binding: Binding) -> Sequence[Evict | Quantise]:
    return [c.policy for c in given_by(binding) if c.policy is not None]


def uninformed(binding: Binding) -> Binding:
    """The same binding, not known beforehand to change nothing."""
    contributions = [(site, [c.but(inert=False) for c in given]) for site, given in binding.contributions]
    return dataclasses.replace(binding, lease=Lease(binding.name), contributions=contributions)


def told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return (
        lines[0][:200] if isinstance(error, TrainlessError) else f"{type(error).__name__}: {lines[0][:160]}"
    )
