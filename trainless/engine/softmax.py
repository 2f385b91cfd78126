"""Softmax attention observed and edited: the middle of a call's way through its plan.

``attention.py`` says what happens before and after. Here the output comes with the log-sum-exp of its rows,
statistics are taken, dynamic patterns and edits asked for and carried out. Which form computes what:

- up to FEW_ROWS query rows (decode, drafts): their probabilities are computed outright and edited;
- statistics that may lead to an edit: output, log-sum-exp and column mass in one sweep, and for heads that then
  are not edited the output of the user's own kernel;
- statistics over chosen rows alone: those rows meet the keys, and the output is the user's own;
- anything else: the fused operator, then one pass per statistic, then an edit of few columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import CompressingLayer
from ..errors import Unsupported
from ..kernels.block_sparse import Blocks, Spans
from ..kernels.column_mass import (
    RowScale,
    attention_and_mass,
    chosen_mass,
    column_mass,
    together_reasons,
)
from ..kernels.group_mass import group_mass
from ..kernels.lse import attention as attention_lse
from ..kernels.lse import choose as choose_lse
from ..kernels.lse import row_attention
from ..kernels.mass_move import mass_move
from ..kernels.visibility import Visibility
from ..kernels.window2d import Window2d, window2d
from ..kernels.window2d import choose as choose_window
from ..seams import Contribution, Entry, MassMove, RowEdit, Statistics, Tokens
from .chosen_rows import sampled_mass
from .extra_keys import merge_extra
from .patterns import Listed, Pattern, extra_of_image, fitted, through_lists, window_of
from .row_edits import apply, apply_to, edited_rows, mass_of_groups, move_edit, on_heads
from .run import FEW_ROWS, SAMPLED, Run
from .spread import SPREAD, note_spread, spread_of_rows
from .subset import only, over, without

# Statistics that the shortest way of a decode step over kept tokens gives.
KEPT = {"column_mass", "probe_mass"}
ROW_BLOCK = 128  # rows at a time where an edit needs whole rows of probabilities


Edits = list[tuple[Entry, Any]]  # who edits, and the MassMove or RowEdit


@dataclass
class Asked:
    """What the contributions ask of one softmax. dynamic: patterns that are chosen from statistics of this call.

    edits: what is edited, once that is known; until then ``moves`` are those to ask.
    """

    layer: CompressingLayer | None
    extra: list[Any]
    patterns: list[Pattern]
    wanted: set[str]
    moves: tuple[Entry, ...]
    dynamic: list[Entry]
    edits: Edits | None = None

    def settled(self, run: Run) -> Edits:
        """The edits, asked for now where they have waited for statistics."""
        if self.edits is None:
            self.edits = [(entry, move) for entry in self.moves if (move := run.value(entry)) is not None]
        return self.edits


def softmax(
    run: Run,
    layer: CompressingLayer | None,
    extra: list[Any],
    patterns: list[Pattern],
    wanted: set[str],
    moves: tuple[Entry, ...],
) -> Tensor:
    """The output (B, Lq, H, D) of a call that something observes, restricts or edits."""
    call, attentions = run.call, run.runtime.facts.get("attentions")
    if call.dropout:
        raise Unsupported(
            f"{run.runtime.site.name}: attention dropout is on (training mode) and a patch edits this "
            "attention; call model.eval() or remove the patch"
        )
    if patterns and layer is not None and layer.evicted:
        raise Unsupported(
            f"{layer.lease.name}: {run.runtime.site.name} has a static pattern, which knows keys by their place in the "
            "sequence, and its cache has dropped keys; give the two different layers"
        )
    dynamic = [e for e in run.plan.of["pattern"] if e.contribution.dynamic and e in run.asking]
    asked = Asked(layer, extra, patterns, wanted, moves, dynamic)
    out = _without_statistics(run, asked)
    if out is not None:
        return out
    visible = run.visibility(layer, patterns)
    # Whoever asks for the probabilities themselves is given all of them, as they are after the edits.
    if (call.query.shape[2] <= FEW_ROWS or attentions) and not extra:
        return _few_rows(run, visible, asked)
    if not (run.edited or extra or dynamic):
        out = _prepared_edits(run, visible, asked)
        if out is not None:
            return out
    return _measured(run, visible, asked)


def _without_statistics(run: Run, asked: Asked) -> Tensor | None:
    """The output where nothing has to be measured for it; None where something has."""
    call, layer = run.call, asked.layer
    alone = call.query.shape[2] == 1 and run.times is None
    if layer is not None and layer.evicted and alone and not (asked.extra or asked.moves):
        if not (asked.patterns or asked.dynamic or run.plan.of["observe"] or asked.wanted - KEPT):
            return _decode_kept(run, layer, asked.wanted)
    if not (asked.wanted or asked.dynamic or run.groups):
        # Frozen rules need no statistics: ask them first, they may have nothing to edit in this call.
        edits = asked.settled(run)
        if not (edits or asked.patterns or asked.extra or run.edited or run.plan.of["observe"]):
            return run.delegate(call)
    window, run.why_not = window_of(call, asked.patterns)
    if window is not None and not run.runtime.facts.get("attentions"):
        run.why_not = _why_no_window(run, layer, asked.wanted, asked.dynamic, asked.edits)
        if not run.why_not:
            return _windowed(run, window, asked.extra)
    return _listed(run, asked) if asked.patterns else None


def _listed(run: Run, asked: Asked) -> Tensor | None:
    """The output over blocks or spans by the kernel that computes nothing else; None where it cannot be used."""
    call, lists = run.call, [p for p in asked.patterns if isinstance(p, Listed)]
    few = call.query.shape[2] <= FEW_ROWS  # whole rows of probabilities are the shorter way
    if not lists or few or run.runtime.facts.get("attentions"):
        return None
    visible = run.visibility(asked.layer, [])
    why = {
        "another pattern": len(asked.patterns) > 1,
        "extra keys": bool(asked.extra),
        "statistics or an edit": bool(asked.wanted or asked.dynamic or asked.edits or run.groups),
        "an observer": bool(run.plan.of["observe"]),
        "a mask that is not causal": isinstance(lists[0].pattern, Spans) and not visible.causal,
    }
    run.why_not = (
        *run.why_not,
        *(f"block_sparse: the call has {what}" for what, there in why.items() if there),
    )
    if any(why.values()):
        return None
    run.kernel, run.reasons, out = through_lists(call, lists[0], visible, run.terms())
    return out.transpose(1, 2).contiguous()


def _lists_alone(run: Run, asked: Asked, visible: Visibility, chosen: Any) -> bool:
    """Whether a pattern that was chosen from statistics is all that happens to this call from here on."""
    alone = isinstance(chosen, Listed) and len(asked.dynamic) == 1 and not (asked.extra or asked.patterns)
    alone = alone and not (asked.moves or run.groups or run.plan.of["observe"])
    return alone and (isinstance(chosen.pattern, Blocks) or visible.causal)


def _prepared_edits(run: Run, visible: Visibility, asked: Asked) -> Tensor | None:
    """The output of edits that one sweep, or the mass of some groups, can prepare; None for others."""
    if run.groups and not asked.wanted:
        edited = _edit_named_rows(run, visible, asked.moves)
        if edited is not None:
            return edited
    if not run.groups and _together(run, visible, asked.wanted, asked.moves):
        return _edit_swept(run, asked.layer, visible, asked.moves)
    return None


def _measured(run: Run, visible: Visibility, asked: Asked) -> Tensor:
    """Output and log-sum-exp by the fused operator, then one pass per statistic, dynamic patterns, and edits."""
    call, extra, options = run.call, asked.extra, run.options()
    plain = not (run.edited or extra)
    out, lse = None, None
    if not plain or asked.wanted - {"probe_mass", SAMPLED}:
        out, lse = run.attention(visible, extra)
        run.edited = run.edited or bool(extra)
        run.stats.lse = lse
    if "column_mass" in asked.wanted:
        _column_mass(run, asked.layer, visible, lse, options)
    if SPREAD & asked.wanted:
        note_spread(run, visible, lse, asked.wanted)
    probe(run, asked.layer, visible, lse)
    subset = None
    for entry, chosen in _chosen_patterns(run, asked.dynamic):
        run.edited = True
        run.acted.add(entry.owner)
        if isinstance(chosen, Tokens):
            subset = chosen.keep if subset is None else subset & chosen.keep
            visible, out = only(visible, chosen.keep), None
        elif _lists_alone(run, asked, visible, chosen):
            run.kernel, run.reasons, out = through_lists(call, chosen, visible, run.terms())
        else:
            visible = _restricted(visible, chosen)
            out, lse = run.attention(visible, extra)
            run.stats = Statistics(lse=lse)
    _group_mass(run, visible, run.stats.lse)
    edits = asked.settled(run)
    if subset is not None and not (edits or extra):
        run.kernel, run.reasons, out = over(call, visible, subset, run.terms())
    if out is None and (edits or run.edited):
        out, lse = run.attention(visible, extra)
    out = _carried_out(run, out, lse, visible, edits)
    run.observe()
    if out is None:
        return run.delegate(call)
    if plain and not edits and not run.edited:
        return _only_looked_at(run, out)
    if subset is not None:
        out = without(out, subset)
    return out.transpose(1, 2).contiguous()


def _chosen_patterns(run: Run, dynamic: list[Entry]) -> Iterator[tuple[Entry, Any]]:
    """Dynamic patterns that do not decline, each asked when the one before has been put in place."""
    for entry in dynamic:
        chosen = run.value(entry)
        if chosen is not None:
            yield entry, fitted(entry.method, run.call, chosen)


def _restricted(visible: Visibility, chosen: Any) -> Visibility:
    return visible.restrict(chosen.visible, chosen.batch, getattr(chosen, "heads", 1))


def _carried_out(
    run: Run, out: Tensor | None, lse: Tensor | None, visible: Visibility, edits: Edits
) -> Tensor | None:
    """The output with every edit made on it."""
    options = run.options()
    for entry, move in edits:
        assert out is not None and lse is not None
        run.acted.add(entry.owner)
        if isinstance(move, RowEdit):
            out = _edit_rows(run, out, lse, visible, move, entry.contribution)
        else:
            out = _move(run, out, lse, visible, move, entry.contribution, options)
    return out


def _only_looked_at(run: Run, out: Tensor) -> Tensor:
    """The user's own kernel gives the output, ours gave the statistics."""
    fused = run.kernel == "lse/fused"  # other forms of ours do not have the bits of the user's kernel
    if run.runtime.facts.get("same_bits") and fused and not out.requires_grad:
        return out.transpose(1, 2)
    return run.delegate(run.call)


def _why_no_window(
    run: Run, layer: CompressingLayer | None, wanted: set[str], dynamic: list[Entry], edits: list[Any] | None
) -> tuple[str, ...]:
    """What else the plan asks for at this call that the kernel of a window does not give."""
    if wanted or dynamic or edits or run.plan.of["observe"]:
        return ("window2d: statistics or an edit are asked for",)
    return ("window2d: the call has a cache that evicts",) if layer is not None else ()


def _windowed(run: Run, window: Window2d, extra: list[Any]) -> Tensor:
    """Attention in a window on the call's grid, by the kernel that visits nothing outside it."""
    call = run.call
    beside, others = extra_of_image(window, extra)
    choice = choose_window(call.query, call.key, call.value, beside)
    run.kernel, run.reasons = f"window2d/{choice.name}", "; ".join(choice.reasons)
    out, lse = window2d(call.query, call.key, call.value, window=window, scale=call.scaling, extra=beside)
    if others:
        out, lse = merge_extra(call, out, lse, others)
    return out.transpose(1, 2).contiguous()


def _together(run: Run, visible: Visibility, wanted: set[str], moves: tuple[Entry, ...]) -> bool:
    """Whether an edit that waits for the column mass is about to be asked for, and one sweep can prepare it."""
    # The sweep leaves out heads that nobody watches; a log-sum-exp is asked for whole.
    if "column_mass" not in wanted or "lse" in wanted or SPREAD & wanted:
        return False
    waits = any("column_mass" in e.contribution.wanted(run.call, run.state(e)) for e in moves)
    return waits and not together_reasons(run.call.query, run.call.key, run.call.value, visible, run.terms())


def _edit_swept(
    run: Run, layer: CompressingLayer | None, visible: Visibility, moves: tuple[Entry, ...]
) -> Tensor:
    """Statistics and output of the heads that are watched in one sweep; the others have their stock bits."""
    call = run.call
    b, h, hkv, lq, _ = call.shape
    found = _heads_watched(run, layer)
    watched = list(range(h) if found is None else found)
    with torch.no_grad():
        swept, swept_lse, mass, swept_scale = attention_and_mass(
            call.query, call.key, call.value, visibility=visible, terms=run.terms(), rows=call.real,
            heads=watched,
        )  # fmt: skip
    _note_mass(run, layer, visible, mass, watched)
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
            out = _edit_rows(run, out, lse, visible, move, entry.contribution)
        else:
            mine = entry.contribution.heads
            own = None if set(range(h) if mine is None else mine) - set(watched) else scale
            options = {**run.options(), "row_scale": own}
            out = _move(run, out, lse, visible, move, entry.contribution, options)
    run.observe()
    if not edits:
        return run.delegate(call)
    return out.to(call.query.dtype).transpose(1, 2).contiguous()


def _group_mass(run: Run, visible: Visibility, lse: Tensor | None) -> Tensor | None:
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


def _edit_named_rows(run: Run, visible: Visibility, moves: tuple[Entry, ...]) -> Tensor | None:
    """Edits that wait for group masses alone and name their rows: the user's own kernel, then those rows anew.

    None when an edit turns out to be of another kind, or to reach rows that nobody asked about.
    """
    call = run.call
    lse = _group_mass(run, visible, None)
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
        out = _move(run, out, lse, visible, move, entry.contribution, run.options())
    return out.transpose(1, 2).contiguous()


def _column_mass(
    run: Run, layer: CompressingLayer | None, visible: Visibility, lse: Tensor | None, options: dict[str, Any]
) -> None:
    """Fill in column_mass (B, H, Lk), zero for heads nobody asked about, and the row counts."""
    call = run.call
    assert lse is not None
    heads = _heads_watched(run, layer)
    options = {k: v for k, v in options.items() if k != "sink_logits"}  # they are inside lse already
    with torch.no_grad():  # what is chosen by it is chosen, not differentiated
        mass = column_mass(
            call.query, call.key, lse, visibility=visible, rows=call.real, heads=heads, **options
        )
    _note_mass(run, layer, visible, mass, heads)


def _note_mass(
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
            lambda index: chosen_mass(call.query, call.key, index, visibility=visible, terms=terms, lse=lse)[
                0
            ],
        )
    layer.score(mass, tail)


def _heads_watched(run: Run, layer: CompressingLayer | None) -> tuple[int, ...] | None:
    if run.adds_up(layer):
        return None
    heads: set[int] = set()
    for entry in run.plan.active:
        if "column_mass" in entry.contribution.wanted(run.call, run.state(entry)):
            if entry.contribution.heads is None:
                return None
            heads.update(entry.contribution.heads)
    return tuple(sorted(heads))


def _move(
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


# ------------------------------------------------------------------ whole rows of probabilities


def _decode_kept(run: Run, layer: CompressingLayer, wanted: set[str]) -> Tensor:
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


def _few_rows(run: Run, visible: Visibility, asked: Asked) -> Tensor:
    """Decode steps and short turns: every probability is at hand, so edits are made on them directly."""
    call, layer = run.call, asked.layer
    lq = call.query.shape[2]
    probabilities = run.row_probabilities(visible, 0, lq)
    run.kernel = "rows"
    if "column_mass" in asked.wanted:
        _mass_of_rows(run, layer, visible, probabilities)
    if SPREAD & asked.wanted:
        spread_of_rows(run, probabilities, asked.wanted)
    probe(run, layer, visible, None, probabilities)
    if "lse" in asked.wanted:
        _, run.stats.lse = run.attention(visible)
    changed = False
    for entry, chosen in _chosen_patterns(run, asked.dynamic):
        changed = True
        run.acted.add(entry.owner)
        if isinstance(chosen, Tokens):
            visible = only(visible, chosen.keep)
            probabilities = without(run.row_probabilities(visible, 0, lq), chosen.keep)
        else:
            visible = _restricted(visible, chosen)
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


def _mass_of_rows(
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


def _edit_rows(
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
