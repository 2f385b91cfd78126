"""Statistics over chosen rows: which rows the contributions of a call name, and the column mass of those.

A contribution with ``probes`` names query rows; they may differ from one row of the batch to the next. Two
contributions with the same function are answered once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.column_mass import chosen_mass
from ..kernels.common import Terms
from ..kernels.visibility import Visibility
from ..seams import AttentionCall, Entry, Probes


def index_of(method: str, call: AttentionCall, chosen: Tensor | None) -> Tensor | None:
    """What a ``Probes`` function returned as row numbers (B, P), -1 for none; pads are taken out."""
    if chosen is None:
        return None
    b, lq = call.query.shape[0], call.query.shape[2]
    if chosen.dim() not in (1, 2) or (chosen.dim() == 2 and chosen.shape[0] not in (1, b)):
        raise InputError(f"{method}: chosen rows of shape {tuple(chosen.shape)} for a batch of {b}")
    chosen = chosen.to(call.query.device).expand(b, -1)
    if chosen.dtype == torch.bool:
        if chosen.shape[1] != lq:
            raise InputError(f"{method}: chosen rows {tuple(chosen.shape)} for a call of {lq} rows")
        rows = torch.where(chosen, torch.arange(lq, device=chosen.device), -1).sort(1, descending=True).values
        chosen = rows[:, : max(1, int(chosen.sum(1).max()))] if b and lq else rows
    chosen = chosen.long()
    if call.real is not None:
        chosen = chosen.masked_fill(~call.real.gather(1, chosen.clamp_min(0)), -1)
    return chosen


class Probed:
    """The chosen rows of one call, and once they are computed, mass (B, H, Lk) and counts (B, Lk) per function."""

    def __init__(self) -> None:
        self.index: dict[Probes, Tensor] = {}
        self.found: dict[Probes, tuple[Tensor, Tensor]] = {}

    def ask(self, entry: Entry, call: AttentionCall, state: Any) -> bool:
        """Note the rows that this contribution wants; False when it wants none in this call."""
        probes = entry.contribution.probes
        if probes is None:
            raise InputError(f'{entry.method}: "probe_mass" is needed, and no `probes` say of which rows')
        if probes not in self.index:
            index = index_of(entry.method, call, probes(call, state))
            if index is None:
                return False
            self.index[probes] = index
        return True

    def of(self, entry: Entry) -> dict[str, Tensor]:
        """The two statistics of this contribution, by name."""
        probes = entry.contribution.probes
        if probes is None or probes not in self.found:
            return {}
        mass, counts = self.found[probes]
        return {"probe_mass": mass, "probe_rows": counts}

    def compute(self, call: AttentionCall, visible: Visibility, terms: Terms, lse: Tensor | None) -> None:
        """From queries and keys; ``lse`` (B, H, Lq) where it is at hand."""
        with torch.no_grad():
            for probes, index in self.index.items():
                self.found[probes] = chosen_mass(
                    call.query, call.key, index, visibility=visible, terms=terms, lse=lse
                )

    def take(self, probabilities: Tensor, visible: Visibility | None) -> None:
        """From the probabilities (B, H, rows, Lk) of all rows; ``visible`` None: every key is seen."""
        b, _, rows, lk = probabilities.shape
        seen = None if visible is None else visible.rows(0, rows)
        for probes, index in self.index.items():
            times = row_weights(index, rows)
            mass = torch.einsum("br,bhrk->bhk", times.to(probabilities.dtype), probabilities.detach())
            if seen is None:
                counts = times.sum(1, keepdim=True).expand(b, lk)
            else:
                counts = (times[:, :, None] * seen.any(1)).sum(1)
            self.found[probes] = mass, counts


def sampled_mass(times: Tensor, call: AttentionCall, mass_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of what ``mass_of`` gives for the rows of one number in ``times`` (1 or B, Lq), times that number.

    mass_of: from row numbers (B, P), -1 for none, to their column mass.
    """
    none = times.new_full((call.query.shape[0], 1), -1)
    total = mass_of(none) if not bool(times.any()) else None
    for number in times.unique().tolist():
        index = None if number == 0 else index_of("sample", call, times == number)
        if index is not None:
            mass = mass_of(index) * number
            total = mass if total is None else total + mass
    assert total is not None
    return total


def row_weights(index: Tensor, rows: int) -> Tensor:
    """(B, rows) int64: how often each row is named in ``index`` (B, P)."""
    named = index >= 0
    weights = torch.zeros(index.shape[0], rows, dtype=torch.int64, device=index.device)
    return weights.scatter_add_(1, index.clamp_min(0), named.long())
