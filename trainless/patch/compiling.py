"""What calls of a patch will refuse, or keep out of the graphs that ``torch.compile`` makes, said before any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..engine.prepared import Prepared
from ..hosts import Component
from ..seams import AttentionPlan
from .binding import Binding, entries_by_module

# Kinds that look over a prompt before its attention is done; what keeps tokens looks behind it.
LOOKING = frozenset({"mass", "pattern"})


def _of_prompts(prompts: dict[str, tuple[str, bool]]) -> list[str]:
    later = {
        True: "later tokens, one at a time on a static cache that the method can use, are compiled",
        False: "so do later tokens",
    }
    return [
        f"{method}: prompts stay eager under torch.compile, since {why}; {later[traced]}"
        for method, (why, traced) in prompts.items()
    ]


def compile_notes(bindings: Sequence[Binding]) -> list[str]:
    """Why calls at denoisers' sites of these bindings cannot be traced whole, and which prompts are not."""
    counts: Counter[str] = Counter()
    # Methods whose prompts cannot be traced: why, and whether what comes after them can be.
    prompts: dict[str, tuple[str, bool]] = {}
    for site, entries in entries_by_module(list(bindings)).values():
        plan = AttentionPlan(entries)
        if site.facts.get("whole"):
            refusal = Prepared(plan, whole=True).refusal
            counts.update([refusal] if refusal is not None else [])
        else:
            ready = Prepared(plan)
            traced = ready.refusal is None
            prompts.update(
                {step.method: ("their rows are edited one by one", traced) for step in ready.edits}
            )
            whole = (e for e in plan.lookahead if e.contribution.kind in LOOKING)
            prompts.update({e.method: ("they are looked over whole", traced) for e in whole})
    return _of_prompts(prompts) + [
        f"under torch.compile the graph breaks at {count} {'layers' if count > 1 else 'layer'}, and fullgraph=True is "
        f"refused: {reason}"
        for reason, count in counts.items()
    ]


def cache_notes(parts: Sequence[Component], bindings: Sequence[Binding]) -> list[str]:
    """What calls will refuse about the caches that a user may ask for, as far as hosts know."""
    planned = [(site, AttentionPlan(entries)) for site, entries in entries_by_module(list(bindings)).values()]
    notes: list[str] = []
    for part in parts:
        say = getattr(part.host, "cache_notes", None)
        mine = [(site, plan) for site, plan in planned if site.name.startswith(part.prefix)]
        notes += say(part.module, mine) if say is not None and mine else []
    return notes
