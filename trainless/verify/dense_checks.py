"""Checks against the dense rule: what ``watch`` saw at the sites of each method, put together and said.

Of each method: ``result`` (each call gave what the seams mean, computed in full), ``kept`` (a cache layer kept what its
rule says), ``precision`` (codes are as near to what was fed as their steps allow). Of the whole patch: ``cache`` (the
layer that methods keep a sequence on is the one that the call updated) and ``padding`` (methods are told which tokens
are padding as the model is).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..engine.runtime import runtime_of
from ..errors import TrainlessError
from ..hosts.probes import SEED
from ..patch.binding import Binding
from ..seams import BESIDE, Evict, Quantise
from .beside import InputsWatch, replaced
from .heard import Record
from .outcome import FAILED, OK, UNCHECKED, WHOLE, Answer, Check
from .standing import seed
from .trial import Trial, given_by, rules_of, told
from .watch import Watching

MANY = 3  # reasons that are given before the rest is counted


@dataclass
class Seen:
    """What was seen while the patch was watched: a record for each site, or why there is none."""

    records: dict[nn.Module, Record] = field(default_factory=dict)
    inputs: InputsWatch | None = None
    failure: str | None = None
    refused: bool = (
        False  # whether that was an error of ours, on calls that the model itself has no trouble with
    )


def watched(trial: Trial) -> Seen:
    """Run the dense probes once, with every call at the patch's sites computed anew."""
    modules = {site.module for b in trial.patch.bindings for site, _ in b.contributions}
    runtimes = [r for m in modules if (r := runtime_of(m)) is not None]
    watching = Watching(runtimes, _tops(trial))
    inputs = InputsWatch(runtimes)
    failure, refused = None, False
    with watching.on(), inputs.on():
        for probe in trial.dense_probes():
            trial.standing.fresh()
            seed(SEED)
            try:
                probe.run()
            except Exception as error:
                failure = f"on {probe.name} the model raises {told(error)}"
                refused = isinstance(error, TrainlessError)
    return Seen({m: w.record for m, w in watching.sites.items()}, inputs, failure, refused)


def _tops(trial: Trial) -> list[nn.Module]:
    """The models whose forward is given a mask of the tokens: the outermost of each component."""
    return [part.module for part in trial.parts]


def of_method(trial: Trial, binding: Binding, seen: Seen) -> list[Check]:
    records = [seen.records[s.module] for s, _ in binding.contributions if s.module in seen.records]
    found = [Check(binding.name, "result", *_result(binding, records, seen))]
    rules = rules_of(binding)
    if any(isinstance(rule, Evict) for rule in rules):
        found.append(Check(binding.name, "kept", *_kept(records, seen)))
    if any(isinstance(rule, Quantise) for rule in rules):
        found.append(Check(binding.name, "precision", *_precision(records, seen)))
    return found


def of_patch(trial: Trial, seen: Seen) -> list[Check]:
    records = list(seen.records.values())
    found = []
    for name, right in (
        ("cache", "the layer that methods keep a sequence on is the one that each call updated"),
        ("padding", "methods are told which tokens are padding as the model is"),
    ):
        answer = _whole(records, name, right)
        if answer is not None:
            found.append(Check(WHOLE, name, *answer))
    return found


# ---------------------------------------------------------------- putting together


def _result(binding: Binding, records: list[Record], seen: Seen) -> Answer:
    attending = [c for c in given_by(binding) if c.kind not in BESIDE and not c.inert]
    parts = [_beside(binding, seen)]
    if attending:
        parts.append(_attended(records, seen))
    elif not any(parts):
        return UNCHECKED, _without_rule(binding)
    answers = [part for part in parts if part is not None]
    worst = next((a for a in answers if a[0] == FAILED), None) or next(
        (a for a in answers if a[0] == UNCHECKED), None
    )
    return worst or (OK, "; ".join(detail for _, detail in answers))


def _without_rule(binding: Binding) -> str:
    given = given_by(binding)
    if all(c.inert for c in given):
        return "it is at its identity value"
    kinds = "/".join(sorted({c.kind for c in given}))
    return f"there is no dense rule for what wraps a module (seam {kinds})"


def _attended(records: list[Record], seen: Seen) -> Answer:
    wrong = _wrong(records, "result")
    if wrong:
        return FAILED, wrong
    calls, held = sum(r.calls for r in records), sum(r.held["result"] for r in records)
    over = sum(r.passed_over for r in records)
    why = "; ".join(reason for reason in (_why(records, "result"), seen.failure) if reason)
    if not held:
        return UNCHECKED, why or "none of its sites was called"
    seams = "/".join(sorted(set[str]().union(*(r.seams for r in records))))
    gap = max(r.gap for r in records)
    said = f"{held} of {calls} calls are as computed in full ({seams}), within {gap:.1g} of the largest value"
    said += f"; {over} over other keys left alone" if over else ""
    return UNCHECKED if seen.refused else OK, f"{said}; not all: {why}" if why else said


def _kept(records: list[Record], seen: Seen) -> Answer:
    wrong = _wrong(records, "kept")
    if wrong:
        return FAILED, wrong
    held, dropped = sum(r.held["kept"] for r in records), sum(r.held["dropped"] for r in records)
    why = "; ".join(reason for reason in (_why(records, "kept"), seen.failure) if reason)
    if not held:
        return UNCHECKED, why or "the probe keeps no cache that could be compressed"
    said = f"{held} kept sets are those of the rule; tokens were dropped after {dropped} calls"
    return UNCHECKED if seen.refused else OK, f"{said}; not all: {why}" if why else said


def _precision(records: list[Record], seen: Seen) -> Answer:
    wrong = _wrong(records, "precision")
    if wrong:
        return FAILED, wrong
    held = sum(r.held["precision"] for r in records)
    if not held:
        why = _why(records, "result")
        return UNCHECKED, why or seen.failure or "nothing was packed on this probe"
    worst = max(r.codes for r in records)
    return OK, f"after {held} calls all codes are within {worst:.0%} of what their steps allow"


def _whole(records: list[Record], name: str, right: str) -> Answer | None:
    wrong = _wrong(records, name)
    if wrong:
        return FAILED, wrong
    held = sum(r.held[name] for r in records)
    return (OK, f"{right} ({held} calls)") if held else None


def _wrong(records: Iterable[Record], name: str) -> str:
    """Everything that is wrong, each thing once, the first few of them."""
    found = list(dict.fromkeys(what for r in records for what in r.wrong.get(name, ())))
    more = f" (and {len(found) - MANY} more)" if len(found) > MANY else ""
    return "; ".join(found[:MANY]) + more


def _why(records: Iterable[Record], name: str) -> str:
    reasons = sum((r.reasons.get(name, Counter()) for r in records), Counter[str]())
    return "; ".join(f"{why} ({count}×)" for why, count in reasons.most_common(MANY))


def _beside(binding: Binding, seen: Seen) -> Answer | None:
    """Tensors that were to be replaced, and inputs that were to be changed; None where the method does neither."""
    given = given_by(binding)
    weights = [(site, c) for site, cs in binding.contributions for c in cs if c.kind == "weights"]
    inputs = [c for c in given if c.kind == "input"]
    said = []
    if weights:
        with torch.no_grad():
            wrong, count = replaced(weights)
        if wrong:
            return FAILED, "; ".join(wrong[:MANY])
        said.append(f"{count} tensors replaced")
    if inputs and seen.inputs is not None:
        wrong = seen.inputs.wrong
        if wrong:
            return FAILED, "; ".join(wrong[:MANY])
        if not seen.inputs.held:
            return UNCHECKED, "no module whose input is to be changed was called"
        said.append(f"{seen.inputs.held} inputs changed as the method says")
    return (OK, "; ".join(said)) if said else None
