"""What each method can do on a model, as ``explain`` knows it: the raw material of a table of families.

Nothing is run: the model may be without weights. A method is bound with its defaults (and its identity values where
a parameter has none), so that what is told is about the model and not about parameters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..errors import TrainlessError
from ..hosts import components, find_sites
from ..patch.binding import bind_one
from ..patchers import known
from ..recipes import Use, Where
from .listing import with_least


@dataclass(frozen=True)
class Support:
    """One method on one model.

    verdict: "works" at every site that fits, "passes over" some of them, "refused". sites of ``of`` candidates;
    reasons: why sites are passed over, or why all are refused → how many.
    """

    method: str
    verdict: str
    sites: int = 0
    of: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        why = "; ".join(f"{count} ×: {reason}" for reason, count in self.reasons.items())
        counted = f" {self.sites}/{self.of}" if self.of else ""
        return f"{self.method}: {self.verdict}{counted}" + (f" ({why})" if why else "")


def support(model: Any) -> list[Support]:
    """What every method can do on ``model``, in the order of their names. Raises InputError for what is no model."""
    parts = components(model)
    try:
        sites = find_sites(parts)
    except TrainlessError as error:
        return [Support(name, "refused", reasons={str(error): 1}) for name in known()]
    found = []
    for name, cls in known().items():
        method, _ = with_least(cls)
        try:
            binding = bind_one(model, parts, sites, Use(name, method, Where()))
        except TrainlessError as error:
            found.append(Support(name, "refused", reasons={str(error).removeprefix(f"{name}: "): 1}))
            continue
        reasons = dict(Counter(binding.skipped.values()))
        verdict = "passes over" if reasons else "works"
        found.append(Support(name, verdict, len(binding.contributions), binding.candidates, reasons))
    return found
