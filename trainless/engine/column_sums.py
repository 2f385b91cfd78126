"""Column mass, mass of groups and statistics over chosen rows: filled in for a call, and told to its cache layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import CompressingLayer
from ..kernels.column_mass import chosen_mass, column_mass
from ..kernels.group_mass import group_mass
from ..kernels.visibility import Visibility
from .chosen_rows import sampled_mass
from .run import Run


def note_group_mass(run: Run, visible: Visibility, lse: Tensor | None) -> Tensor | None:
    """Fill in the masses that are asked for; returns the log-sum-exp of the rows asked about."""
    total = None
    for entry, named in run.groups.items():
        with torch.no_grad():  # gates are chosen by it, not differentiated
            run.masses[entry], found = group_mass(
                run.call.query, run.call.key, groups=named.of, count=named.count, rows=named.rows,
                lse=lse, visibility=visible, **run.options(),
            )  # fmt: skip
        total = found if total is None else torch.maximum(total, found)
    return total


def note_column_mass(
    run: Run, layer: CompressingLayer | None, visible: Visibility, lse: Tensor | None, options: dict[str, Any]
) -> None:
    """Fill in column_mass (B, H, Lk), zero for heads nobody asked about, and the row counts."""
    call = run.call
    assert lse is not None
    heads = heads_watched(run, layer)
    options = {k: v for k, v in options.items() if k != "sink_logits"}  # they are inside lse already
    with torch.no_grad():  # what is chosen by it is chosen, not differentiated
        mass = column_mass(
            call.query, call.key, lse, visibility=visible, rows=call.real, heads=heads, **options
        )
    keep_column_mass(run, layer, visible, mass, heads)


def keep_column_mass(
    run: Run,
    layer: CompressingLayer | None,
    visible: Visibility,
    mass: Tensor,
    heads: Sequence[int] | None,
) -> None:
    """Keep column mass (B, h, Lk) of ``heads`` as a statistic, and tell it to a layer that scores by it."""
    call = run.call
    if heads is not None and len(heads) < call.query.shape[1]:
        whole = mass.new_zeros(mass.shape[0], call.query.shape[1], mass.shape[2])
        whole[:, list(heads)] = mass
        mass = whole
    run.stats.column_mass = mass
    run.stats.rows = visible.counts(call.query.shape[0])
    if layer is not None and run.adds_up(layer):
        layer.score(mass, _tail(run, layer, visible) if layer.rows_apart() else None)


def note_mass_of_rows(
    run: Run, layer: CompressingLayer | None, visible: Visibility, probabilities: Tensor
) -> None:
    """Keep column mass of probabilities (B, H, Lq, Lk) as a statistic, and tell it to a layer that scores by it."""
    call = run.call
    rows = probabilities if call.real is None else probabilities * call.real[:, None, :, None]
    run.stats.column_mass = rows.sum(2)
    dropped = layer is not None and layer.evicted
    run.stats.rows = None if dropped else visible.counts(call.query.shape[0])
    if layer is not None and run.adds_up(layer):
        layer.score(run.stats.column_mass, rows if layer.rows_apart() else None)


def _tail(run: Run, layer: CompressingLayer, visible: Visibility) -> Tensor:
    """The last rows of probabilities, where the layer wants them one by one."""
    lq = run.call.query.shape[2]
    return run.row_probabilities(visible, max(0, lq - layer.rows_apart()), lq)


def probe(
    run: Run,
    layer: CompressingLayer | None,
    visible: Visibility | None,
    lse: Tensor | None,
    probabilities: Tensor | None = None,
) -> None:
    """Fill in the statistics over chosen rows, and tell a layer that scores by them, or by a sample of rows."""
    if layer is not None and run.times is not None:
        _sampled(run, layer, visible, lse, probabilities)
    if not run.probed.index:
        return
    if probabilities is None:
        assert visible is not None
        run.probed.compute(run.call, visible, run.terms(), lse)
    else:
        run.probed.take(probabilities, visible)
    if layer is None or layer.scored_by() != "probe_mass":
        return
    found = run.probed.of(run.plan.evictor) if run.plan.evictor is not None else None
    if not found:
        return
    tail = None
    if layer.rows_apart():
        # Which of the rows are the last ones is known when the drafts, or the chunks, are.
        tail = probabilities
        if tail is None and visible is not None:
            tail = _tail(run, layer, visible)
        if tail is not None and run.call.real is not None:
            tail = tail * run.call.real[:, None, -tail.shape[2] :, None]
    layer.score(found["probe_mass"], tail)


def _sampled(
    run: Run,
    layer: CompressingLayer,
    visible: Visibility | None,
    lse: Tensor | None,
    probabilities: Tensor | None,
) -> None:
    """Tell a layer that samples rows the column mass of those, each counted as often as it stands for."""
    assert run.times is not None
    times = run.times
    if probabilities is not None:
        rows = probabilities * times[:, None, :, None]
        layer.score(rows.sum(2), rows if layer.rows_apart() else None)
        return
    assert visible is not None
    call, terms = run.call, run.terms()
    tail = None
    if layer.rows_apart():
        tail = _tail(run, layer, visible)
        tail = tail * times[:, None, -tail.shape[2] :, None]
    with torch.no_grad():
        mass = sampled_mass(
            times,
            call,
            lambda index: chosen_mass(
                call.query, call.key, index, visibility=visible, terms=terms, lse=lse, counted=False
            )[0],
        )
    layer.score(mass, tail)


def heads_watched(run: Run, layer: CompressingLayer | None) -> tuple[int, ...] | None:
    if run.adds_up(layer):
        return None
    heads: set[int] = set()
    for entry in run.plan.active:
        if "column_mass" in entry.contribution.wanted(run.call, run.state(entry)):
            if entry.contribution.heads is None:
                return None
            heads.update(entry.contribution.heads)
    return tuple(sorted(heads))
