"""Largest probabilities and entropies of rows and keys: who wants which, and where they are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.spread import NAMES, spread, spread_of
from ..kernels.visibility import Visibility
from ..seams import Statistics
from .run import Run

SPREAD = frozenset(NAMES)


def wanted_spread(wanted: set[str]) -> tuple[str, ...]:
    """Those among ``wanted``, in a fixed order."""
    return tuple(name for name in NAMES if name in wanted)


def keep_spread(stats: Statistics, found: dict[str, Tensor]) -> None:
    """Fill in what was found."""
    for name, tensor in found.items():
        setattr(stats, name, tensor)


def note_spread(run: Run, visible: Visibility, lse: Tensor | None, wanted: set[str]) -> None:
    """From queries and keys and the log-sum-exp of the rows; zeros in heads that nobody asks about."""
    names = wanted_spread(wanted)
    if not names:
        return
    assert lse is not None
    call, h = run.call, run.call.query.shape[1]
    heads = _heads(run, set(names))
    with torch.no_grad():  # what is chosen by it is chosen, not differentiated
        found = spread(
            call.query, call.key, lse, names, visibility=visible, rows=call.real, heads=heads,
            scale=call.scaling, position_bias=call.position_bias, softcap=call.softcap,
        )  # fmt: skip
    assert isinstance(found, dict)
    for name, tensor in found.items():
        whole = tensor
        if heads is not None and len(heads) < h:
            whole = tensor.new_zeros(tensor.shape[0], h, tensor.shape[2])
            whole[:, list(heads)] = tensor
        setattr(run.stats, name, whole)


def spread_of_rows(run: Run, probabilities: Tensor, wanted: set[str]) -> None:
    """From the probabilities (B, H, Lq, Lk) of all rows."""
    if names := wanted_spread(wanted):
        keep_spread(run.stats, spread_of(probabilities.detach(), names, run.call.real))


def _heads(run: Run, names: set[str]) -> tuple[int, ...] | None:
    heads: set[int] = set()
    for entry in run.plan.active:
        if names & set(entry.contribution.wanted(run.call, run.state(entry))):
            if entry.contribution.heads is None:
                return None
            heads.update(entry.contribution.heads)
    return tuple(sorted(heads))
