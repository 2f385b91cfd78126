"""Calls of few query rows (decode steps, drafts): their probabilities are computed outright and edited directly."""

from __future__ import annotations

from torch import Tensor

from ..cache import CompressingLayer
from ..kernels.lse import attention as attention_lse
from ..kernels.lse import choose as choose_lse
from ..kernels.lse import row_attention
from ..kernels.visibility import Visibility
from ..seams import RowEdit, Tokens
from .asked import Asked, chosen_patterns, restricted
from .column_sums import note_mass_of_rows, probe
from .row_edits import apply, apply_to, edited_rows, mass_of_groups, move_edit, on_heads
from .run import Run
from .spread import SPREAD, spread_of_rows
from .subset import only, without


def decode_kept(run: Run, layer: CompressingLayer, wanted: set[str]) -> Tensor:
    """A decode step over kept tokens, the call that runs most often: no mask, no copies, one score update."""
    call = run.call
    out, probabilities = row_attention(call.query, call.key, call.value, valid=layer.valid(), **run.options())
    run.kernel = "rows"
    if "column_mass" in wanted:
        rows = probabilities if call.real is None else probabilities * call.real[:, None, :, None]
        layer.score(rows[:, :, 0], rows if layer.rows_apart() else None)
    if "probe_mass" in wanted:
        holes = layer.valid() is not None
        probe(run, layer, run.visibility(layer, []) if holes else None, None, probabilities)
    return out.transpose(1, 2).contiguous()


def few_rows(run: Run, visible: Visibility, asked: Asked) -> Tensor:
    """Decode steps and short turns: every probability is at hand, so edits are made on them directly."""
    call, layer = run.call, asked.layer
    lq = call.query.shape[2]
    probabilities = run.row_probabilities(visible, 0, lq)
    run.kernel = "rows"
    if "column_mass" in asked.wanted:
        note_mass_of_rows(run, layer, visible, probabilities)
    if SPREAD & asked.wanted:
        spread_of_rows(run, probabilities, asked.wanted)
    probe(run, layer, visible, None, probabilities)
    if "lse" in asked.wanted:
        _, run.stats.lse = run.attention(visible)
    changed = False
    for entry, chosen in chosen_patterns(run, asked.dynamic):
        changed = True
        run.acted.add(entry.owner)
        if isinstance(chosen, Tokens):
            visible = only(visible, chosen.keep)
            probabilities = without(run.row_probabilities(visible, 0, lq), chosen.keep)
        else:
            visible = restricted(visible, chosen)
            probabilities = run.row_probabilities(visible, 0, lq)
    for entry, named in run.groups.items():
        run.masses[entry] = mass_of_groups(probabilities, named)
    edits = asked.settled(run)
    # Rows that every edit leaves out have the bits of the user's own kernel, where it could run at all; without
    # such rows it need not run.
    named_rows = None if changed or run.edited else edited_rows(edits, probabilities)
    for entry, move in edits:
        changed = True
        run.acted.add(entry.owner)
        edit = move.edit if isinstance(move, RowEdit) else move_edit(move)
        probabilities = on_heads(probabilities, entry.contribution.heads, edit, 0)
    run.observe()
    if run.runtime.facts.get("attentions") and not (layer is not None and layer.evicted):
        run.runtime.facts["weights"] = probabilities.to(call.query.dtype)
    if named_rows is not None and not bool(named_rows.all()):
        return apply_to(_stock_heads(run, visible, named_rows), probabilities, call.value, named_rows)
    if not (changed or run.edited):
        # Only looked at, or found nothing to edit: the user's own kernel gives the output, bit for bit.
        return run.delegate(call)
    return apply(probabilities, call.value, call.query.dtype).transpose(1, 2).contiguous()


def _stock_heads(run: Run, visible: Visibility, edited: Tensor) -> Tensor:
    """(B, Lq, H, D): the user's own output, but in heads of which every row is ``edited`` (B, H, Lq)."""
    call = run.call
    left = (~edited).any(-1).any(0).nonzero()[:, 0]
    b, h, hkv, lq, _ = call.shape
    shared = visible.structured and call.position_bias is None and call.sink_logits is None
    # Other forms of ours (under gradients, say) do not have the bits of the user's kernel.
    form = choose_lse(call.query, call.key, call.value, visibility=visible, terms=run.terms())
    shared = shared and form.name == "fused"
    if not (run.runtime.facts.get("same_bits") and shared and 4 * len(left) <= h):
        return run.delegate(call)
    of = left // (h // hkv)
    some, _ = attention_lse(
        call.query[:, left], call.key[:, of], call.value[:, of], visibility=visible, scale=call.scaling,
        softcap=call.softcap,
    )  # fmt: skip
    out = call.query.new_zeros(b, lq, h, call.value.shape[3])
    out[:, :, left] = some.transpose(1, 2)
    return out
