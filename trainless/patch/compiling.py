"""What of a patch stays outside of the graphs that ``torch.compile`` makes, said before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..engine.prepared import Prepared
from ..seams import AttentionPlan
from .binding import Binding, entries_by_module


def compile_notes(bindings: Sequence[Binding]) -> list[str]:
    """A sentence for each reason why calls at denoisers' sites of these bindings cannot be traced whole."""
    counts: Counter[str] = Counter()
    for site, entries in entries_by_module(list(bindings)).values():
        if site.facts.get("whole"):
            refusal = Prepared(AttentionPlan(entries), whole=True).refusal
            counts.update([refusal] if refusal is not None else [])
    return [
        f"under torch.compile the graph breaks at {count} {'layers' if count > 1 else 'layer'}, and fullgraph=True is "
        f"refused: {reason}"
        for reason, count in counts.items()
    ]
