"""Edits that wait for the column mass: output, log-sum-exp and mass in one sweep, then the edits on the output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import CompressingLayer
from ..kernels.column_mass import RowScale, attention_and_mass, together_reasons
from ..kernels.lse import attention as attention_lse
from ..kernels.visibility import Visibility
from ..seams import Entry, RowEdit
from .column_sums import heads_watched, keep_column_mass, probe
from .moved_mass import edit_rows, move_mass
from .run import Run
from .spread import SPREAD


def sweepable(run: Run, visible: Visibility, wanted: set[str], moves: tuple[Entry, ...]) -> bool:
    """Whether an edit that waits for the column mass is about to be asked for, and one sweep can prepare it."""
    # The sweep leaves out heads that nobody watches; a log-sum-exp is asked for whole.
    if "column_mass" not in wanted or "lse" in wanted or SPREAD & wanted:
        return False
    waits = any("column_mass" in e.contribution.wanted(run.call, run.state(e)) for e in moves)
    return waits and not together_reasons(run.call.query, run.call.key, run.call.value, visible, run.terms())


def edit_swept(
    run: Run, layer: CompressingLayer | None, visible: Visibility, moves: tuple[Entry, ...]
) -> Tensor:
    """Statistics and output of the heads that are watched in one sweep; the others have their stock bits."""
    call = run.call
    b, h, hkv, lq, _ = call.shape
    found = heads_watched(run, layer)
    watched = list(range(h) if found is None else found)
    with torch.no_grad():
        swept, swept_lse, mass, swept_scale = attention_and_mass(
            call.query, call.key, call.value, visibility=visible, terms=run.terms(), rows=call.real,
            heads=watched,
        )  # fmt: skip
    keep_column_mass(run, layer, visible, mass, watched)
    probe(run, layer, visible, None)
    lse = swept_lse.new_zeros(b, h, lq)
    lse[:, watched] = swept_lse
    run.stats.lse = lse
    edits = [(entry, move) for entry in moves if (move := run.value(entry)) is not None]
    # What is not edited after all keeps the bits of the fused operator.
    touched = torch.zeros(h, dtype=torch.bool)
    for entry, move in edits:
        named = list(range(h) if entry.contribution.heads is None else entry.contribution.heads)
        has = [True] * len(named) if isinstance(move, RowEdit) else move.source.any(-1).any(0).tolist()
        touched[[head for head, any_ in zip(named, has, strict=True) if any_]] = True
    left = [head for head in range(h) if not (touched[head] and head in watched)]
    out = swept.new_empty(b, h, lq, call.value.shape[3])
    out[:, watched] = swept
    if left and edits:
        of = torch.as_tensor(left, device=call.query.device) // (h // hkv)
        sinks = None if call.sink_logits is None else call.sink_logits[left]
        some, lse[:, left] = attention_lse(
            call.query[:, left], call.key[:, of], call.value[:, of], visibility=visible,
            scale=call.scaling, sink_logits=sinks,
        )  # fmt: skip
        out[:, left] = some.to(out.dtype)
    scale = RowScale(torch.zeros_like(lse), torch.zeros_like(lse))
    scale.m[:, watched], scale.inverse[:, watched] = swept_scale.m, swept_scale.inverse
    run.kernel, run.reasons = "together", ""
    for entry, move in edits:
        run.acted.add(entry.owner)
        if isinstance(move, RowEdit):
            out = edit_rows(run, out, lse, visible, move, entry.contribution)
        else:
            mine = entry.contribution.heads
            own = None if set(range(h) if mine is None else mine) - set(watched) else scale
            options = {**run.options(), "row_scale": own}
            out = move_mass(run, out, lse, visible, move, entry.contribution, options)
    run.observe()
    if not edits:
        return run.delegate(call)
    return out.to(call.query.dtype).transpose(1, 2).contiguous()
