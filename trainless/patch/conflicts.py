"""Which contributions cannot stand at one site together, computed from what each declares."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.runtime import runtime_of
from ..errors import Conflict
from ..seams import BESIDE, EXCLUSIVE, Contribution, Entry, Evict, Quantise, Site
from .binding import Binding, entries_by_module


def find_conflicts(bindings: Sequence[Binding]) -> list[str]:
    """Clashes among the bindings, and with what is patched already; each named once per pair of methods."""
    found: dict[str, str] = {}
    for module, (site, entries) in entries_by_module(bindings).items():
        runtime = runtime_of(module)
        standing = runtime.entries if runtime is not None else []
        for sentence in conflicts(site, [*standing, *entries]):
            pair, reason = sentence.split(f" at {site.name}: ", 1)
            found.setdefault(pair + reason, sentence)
    return list(found.values())


def check(bindings: Sequence[Binding]) -> None:
    """Raise Conflict when methods clash with each other or with what is patched already."""
    found = find_conflicts(bindings)
    if found:
        raise Conflict("; ".join(found))


def conflicts(site: Site, entries: Sequence[Entry]) -> list[str]:
    """Every clash among ``entries`` at ``site``, one sentence each; computed from what they declare."""
    found = []
    for i, a in enumerate(entries):
        for b in entries[i + 1 :]:
            if a.owner is b.owner and a.method == b.method:
                continue
            reason = _clash(a, b)
            if reason:
                found.append(f"{a.method} and {b.method} at {site.name}: {reason}")
    return list(dict.fromkeys(found))


def _clash(a: Entry, b: Entry) -> str | None:
    x, y = a.contribution, b.contribution
    if a.method == b.method:
        return f"the same method is already there (seam {x.kind}); remove the first patch or narrow one with `where`"
    if x.kind == y.kind and x.kind in EXCLUSIVE:
        return f"seam {x.kind} takes one contribution; use `where` to give them different layers"
    if x.kind == y.kind == "kv" and type(x.policy) is type(y.policy):
        what = "rule of precision" if isinstance(x.policy, Quantise) else "eviction rule"
        return f"seam kv takes one {what}; use `where` to give them different layers"
    if isinstance(x.policy, Evict | Quantise) and isinstance(y.policy, Evict | Quantise):
        if x.policy.chosen and y.policy.chosen:
            return (
                "seam kv: both choose among the tokens of a layer, each by statistics of its own; use `where`"
            )
    if x.kind == y.kind == "mass" and _heads_meet(x, y):
        return "seam mass takes one contribution per head; give them different heads, or layers with `where`"
    if x.kind == y.kind == "weights" and set(x.tensors or ()) & set(y.tensors or ()):
        return "seam weights: both replace the same tensors"
    return _stands_against(x, y) or _stands_against(y, x)


def _stands_against(one: Contribution, other: Contribution) -> str | None:
    """Why ``one`` cannot do what it does where ``other`` does what it does."""
    if one.kind == "form" and other.kind not in one.admits and other.kind not in BESIDE:
        return (
            f"seam form replaces softmax attention, which seam {other.kind} needs; use `where` to part them"
        )
    if one.kind == "form" and other.statistics:
        return f"seam form leaves no softmax whose statistics seam {other.kind} could read; use `where` to part them"
    if one.in_order and other.kind == "kv":
        return f"seam {one.kind} reads the keys in their order, and seam kv drops some; give them different layers"
    if isinstance(other.policy, Quantise):
        # A dynamic pattern is for the calls that it asks about; on a layer that packs, those before it does.
        if one.kind == "position" or (one.kind == "pattern" and not (one.dynamic or one.first)):
            return f"seam {one.kind} needs every key as it is, and seam kv packs them; give them different layers"
        if one.groups is not None:
            return f"seam {one.kind} names groups of keys, and seam kv packs them; give them different layers"
    if one.by_head and _counts_rows(other):
        return (
            f"seam {one.kind} leaves other keys from one head to the next, and seam {other.kind} counts the rows that "
            "see a key for all heads at once; use `where` to give them different layers"
        )
    rule = other.policy
    if (why := _replayed(one, other)) is not None:
        return why
    scored = isinstance(rule, Evict) and rule.score is not None and not rule.of_keys
    if one.kind == "pattern" and one.dynamic and (other.statistics or scored):
        return f"seam pattern is chosen from statistics that seam {other.kind} reads as well"
    return None


def _counts_rows(given: Contribution) -> bool:
    """Whether it goes by statistics that are divided by the number of rows which see a key."""
    if isinstance(given.policy, Evict) and given.value is None:
        return given.policy.normalise
    return bool(given.statistics)


def _replayed(one: Contribution, other: Contribution) -> str | None:
    """Why ``one``, if it has the prompt read a second time, cannot stand beside ``other``."""
    if not (isinstance(one.policy, Evict) and one.policy.replay is not None) or other.kind in BESIDE:
        return None
    if isinstance(other.policy, Quantise):
        if not other.policy.chosen:
            return None
        return (
            "seam kv has a prompt read a second time before any token goes, and the other rule chooses at its first "
            "call; use `where` to part them"
        )
    if getattr(other, "constant", None) is not None:
        return None
    return f"seam kv has a prompt read a second time, in which seam {other.kind} would act once more; use one of them"


def _heads_meet(x: Contribution, y: Contribution) -> bool:
    return x.heads is None or y.heads is None or bool(set(x.heads) & set(y.heads))
