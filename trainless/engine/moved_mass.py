"""Edits of an output that is there already: probability moved between keys, and rules that rewrite whole rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.mass_move import mass_move
from ..kernels.visibility import Visibility
from ..seams import Contribution, Entry, MassMove, RowEdit
from .asked import Edits
from .column_sums import note_group_mass
from .row_edits import apply, on_heads
from .run import Run

ROW_BLOCK = 128  # rows at a time where an edit needs whole rows of probabilities


def carry_out(
    run: Run, out: Tensor | None, lse: Tensor | None, visible: Visibility, edits: Edits
) -> Tensor | None:
    """The output with every edit made on it."""
    options = run.options()
    for entry, move in edits:
        assert out is not None and lse is not None
        run.acted.add(entry.owner)
        if isinstance(move, RowEdit):
            out = edit_rows(run, out, lse, visible, move, entry.contribution)
        else:
            out = move_mass(run, out, lse, visible, move, entry.contribution, options)
    return out


def move_mass(
    run: Run,
    out: Tensor,
    lse: Tensor,
    visible: Visibility,
    move: MassMove,
    contribution: Contribution,
    options: dict[str, Any],
) -> Tensor:
    call = run.call
    return mass_move(
        call.query, call.key, call.value, out, lse,
        source=move.source, keep=move.keep, target=move.target, rows=move.rows,
        heads=contribution.heads, visibility=visible, **options,
    )  # fmt: skip


def edit_rows(
    run: Run, out: Tensor, lse: Tensor, visible: Visibility, move: RowEdit, contribution: Contribution
) -> Tensor:
    """Apply a rule whose groups differ from row to row, a block of rows at a time."""
    call = run.call
    lq = call.query.shape[2]
    parts = []
    for start in range(0, lq, ROW_BLOCK):
        stop = min(lq, start + ROW_BLOCK)
        probabilities = run.row_probabilities(visible, start, stop)
        edited = on_heads(probabilities, contribution.heads, move.edit, start)
        parts.append(apply(edited, call.value, call.query.dtype))
    whole = torch.cat(parts, 2)
    if contribution.heads is None:
        return whole
    out = out.clone()
    out[:, list(contribution.heads)] = whole[:, list(contribution.heads)]
    return out


def edit_named_rows(run: Run, visible: Visibility, moves: tuple[Entry, ...]) -> Tensor | None:
    """Edits that wait for group masses alone and name their rows: the user's own kernel, then those rows anew.

    None when an edit turns out to be of another kind, or to reach rows that nobody asked about.
    """
    call = run.call
    lse = note_group_mass(run, visible, None)
    edits = [(entry, move) for entry in moves if (move := run.value(entry)) is not None]
    asked = [named.rows for named in run.groups.values()]
    for _, move in edits:
        if isinstance(move, RowEdit) or move.rows is None:
            return None
        if len(asked) > 1 or (asked[0] is not None and bool((move.rows & ~asked[0][:, None]).any())):
            return None
    run.observe()
    out = run.delegate(call)
    if not edits:
        return out
    run.kernel = "rows of groups"
    out = out.transpose(1, 2)
    for entry, move in edits:
        assert isinstance(move, MassMove) and lse is not None
        run.acted.add(entry.owner)
        out = move_mass(run, out, lse, visible, move, entry.contribution, run.options())
    return out.transpose(1, 2).contiguous()
