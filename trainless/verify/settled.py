"""The check ``settled steps``: decoding on caches that have settled into buffers of fixed size, on static ones too.

Users decode that way, and ``watch`` sees every call the long way. So a few sequences are read again: the long way, and
then as they are read without anybody looking (``settled_watch``). What cannot settle is said, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..engine.runtime import Runtime, runtime_of
from ..errors import TrainlessError
from ..hosts.probes import SEED, Decoding, decodings
from ..hosts.transformers.static import unsettled
from ..patch.binding import Binding
from ..seams import BESIDE, Quantise
from .heard import Record
from .outcome import FAILED, OK, UNCHECKED, Answer, Check
from .probing import tokens_for
from .settled_watch import FULLY, LONG, Notes, SettledWatching, Way
from .standing import seed
from .trial import Trial, given_by, rules_of, told

NAME = "settled steps"
DYNAMIC, STATIC = Way("a dynamic cache"), Way("a static cache")
GIVEN = Way("the caches of the probe")
TRACED = Way("a static cache, as a compiler traces it", traced=True)
MANY = 3  # things that are said before the rest is counted
FULL = 6  # sites of a kind whose calls are computed in full


@dataclass
class Tried:
    """What was found: a record for each module, errors, and why a way was not gone, by module."""

    records: dict[nn.Module, Record] = field(default_factory=dict)
    reasons: dict[nn.Module, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def reason(self, runtimes: Iterable[Runtime], why: str) -> None:
        for runtime in runtimes:
            known = self.reasons.setdefault(runtime.site.module, [])
            if why not in known:
                known.append(why)


def tried(trial: Trial) -> Tried:
    """Read the sequences of every component; nothing where no site of the patch keeps a cache."""
    found = Tried()
    modules = {site.module: None for b in trial.patch.bindings for site, _ in b.contributions}
    runtimes = [r for m in modules if (r := runtime_of(m)) is not None and _decodes(r)]
    if not runtimes:
        return found
    if trial.given is not None:
        runtimes = [r for r in runtimes if r.plan.needs_layer]
        given = Decoding("the probe given", lambda cache: trial.probes[0].run(), lambda: None)
        _read(trial, found, runtimes, given, [GIVEN] if _ways(found, runtimes) else [])
        return found
    rules = [rule for b in trial.patch.bindings for rule in rules_of(b)]
    packing = next((rule for rule in rules if isinstance(rule, Quantise)), None)
    for part in trial.parts:
        own = [r for r in runtimes if any(m is r.site.module for m in part.module.modules())]
        ways = _ways(found, own)
        read = decodings(part, packing, tokens_for(rules)) if ways else []
        for decoding in read:
            # Each way once with padding or without: the dynamic one, which is common, with both.
            other = TRACED if decoding.padded or not any(d.padded for d in read) else STATIC
            _read(trial, found, own, decoding, [way for way in ways if way in (DYNAMIC, other)])
    return found


def _decodes(runtime: Runtime) -> bool:
    """Whether the site keeps a cache of its sequence, and steps there may go another way than every call."""
    site, plan = runtime.site, runtime.plan
    keeps = site.kind == "attention" and site.host == "transformers" and site.role == "self"
    acts = any(e.contribution.kind not in BESIDE for e in plan.active)
    return bool(
        keeps and site.facts.get("caches") and acts and (plan.of["kv"] or not runtime.prepared.refusal)
    )


def _ways(found: Tried, runtimes: list[Runtime]) -> list[Way]:
    """In which ways steps may settle at one of these sites; the others are noted with the reason."""
    dynamic, static, traced, barred = False, False, False, False
    for runtime in runtimes:
        plan, site, refusal = runtime.plan, runtime.site, runtime.prepared.refusal
        why = refusal or unsettled(plan, site, static=False)
        not_static = unsettled(plan, site, static=True)
        if why is not None:
            found.reason([runtime], f"dynamic caches: {why}")
        if (refusal or not_static) is not None:
            found.reason([runtime], f"static caches: {not_static or refusal}")
        dynamic = dynamic or (why is None and plan.needs_layer)
        static = static or ((refusal or not_static) is None and plan.needs_layer)
        traced = traced or (refusal or not_static) is None
        # What cannot settle goes the long way in a dynamic cache, and is refused in a static one.
        barred = barred or not_static is not None
    if barred:
        static = traced = False
    return [way for way, gone in ((DYNAMIC, dynamic), (STATIC, static), (TRACED, traced)) if gone]


def _read(trial: Trial, found: Tried, runtimes: list[Runtime], decoding: Decoding, ways: list[Way]) -> None:
    """One sequence, the long way and in each of ``ways``."""
    if not ways:
        return
    notes = Notes(records=found.records)
    failure, _ = _run(trial, runtimes, decoding, LONG, notes)
    if failure is not None:
        found.reason(runtimes, f"on {decoding.name} the model raises {failure}")
        return
    for way in ways:
        failure, refused = _run(trial, runtimes, decoding, way, notes)
        if failure is None:
            continue
        said = f"on {decoding.name}, on {way.name}, the model raises {failure}"
        if way in (DYNAMIC, GIVEN) or not (refused or _fails_alone(trial, decoding)):
            found.wrong.append(said)
        else:
            found.reason(runtimes, said)


def _in_full(runtimes: list[Runtime]) -> set[nn.Module]:
    """Of the sites that run the same code, ``FULL`` from the first to the last; all where there are no more."""
    kinds: dict[object, list[nn.Module]] = {}
    for runtime in runtimes:
        site, plan = runtime.site, runtime.plan
        shape = site.heads, site.kv_heads, site.head_dim, site.facts.get("sliding_window")
        given = tuple((e.owner, e.contribution.kind, e.contribution.heads) for e in plan.active)
        kinds.setdefault((type(site.module), shape, given), []).append(site.module)
    chosen: set[nn.Module] = set()
    for modules in kinds.values():
        last = len(modules) - 1
        few = range(len(modules)) if last < FULL else [round(n * last / (FULL - 1)) for n in range(FULL)]
        chosen.update(modules[n] for n in few)
    return chosen


def _run(
    trial: Trial, runtimes: list[Runtime], decoding: Decoding, way: Way, notes: Notes
) -> tuple[str | None, bool]:
    """What the model raises, or None; and whether that is a refusal of ours."""
    tops = [part.module for part in trial.parts]
    watching = SettledWatching(runtimes, tops, way, notes, _in_full(runtimes))
    trial.standing.fresh()
    seed(SEED)
    try:
        with watching.on():
            decoding.run(decoding.static() if way.name.startswith("a static") else None)
    except Exception as error:
        return told(error), isinstance(error, TrainlessError)
    finally:
        for runtime in runtimes:  # of a call that did not come to its end
            runtime.compiled_layer = runtime.call.step = None
    return None, False


def _fails_alone(trial: Trial, decoding: Decoding) -> bool:
    """Whether the model does not run on a static cache without the patch either."""
    try:
        with trial.patch.paused():
            trial.standing.fresh()
            decoding.run(decoding.static())
    except Exception:
        return True
    return False


# ---------------------------------------------------------------- putting together


def of_method(binding: Binding, found: Tried) -> list[Check]:
    """The check of one method; none where it has no site that keeps a cache."""
    modules = [site.module for site, _ in binding.contributions]
    records = [found.records[m] for m in modules if m in found.records]
    reasons = list(dict.fromkeys(why for m in modules for why in found.reasons.get(m, ())))
    if not (records or reasons) or all(c.inert or c.kind in BESIDE for c in given_by(binding)):
        return []
    return [Check(binding.name, NAME, *_answer(records, reasons, found.wrong))]


def _answer(records: list[Record], reasons: list[str], errors: list[str]) -> Answer:
    wrong = list(dict.fromkeys([*errors, *(what for r in records for what in r.wrong.get("settled", ()))]))
    if wrong:
        more = f" (and {len(wrong) - MANY} more)" if len(wrong) > MANY else ""
        return FAILED, "; ".join(wrong[:MANY]) + more
    reasons = [*reasons, *dict.fromkeys(why for r in records for why in r.reasons.get("settled", ()))]
    why = "; ".join(reasons[:MANY])
    held = sum(r.held["settled"] for r in records)
    if not held:
        return UNCHECKED, why or "no step of this probe is on a cache that has settled"
    ways = [w.name for w in (GIVEN, DYNAMIC, STATIC, TRACED) if any(r.held[w.name] for r in records)]
    seams, gap = "/".join(sorted(set[str]().union(*(r.seams for r in records)))), max(r.gap for r in records)
    sites, full = (sum(bool(r.held[name]) for r in records) for name in ("settled", FULLY))
    how = "computed in full and as the long way"
    if full < sites:
        how = f"the long way and, at {full} of them, as computed in full"
    where = f"{held} steps at {sites} sites ({seams}; {', '.join(ways)})"
    said = f"{where} are as {how}, within {gap:.1g} of the largest value"
    return OK, f"{said}; not all: {why}" if why else said
