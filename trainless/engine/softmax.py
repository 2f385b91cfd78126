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

from typing import Any

from torch import Tensor

from ..cache import CompressingLayer
from ..errors import Unsupported
from ..kernels.visibility import Visibility
from ..seams import Entry, Statistics, Tokens
from .asked import Asked, chosen_patterns, restricted
from .column_sums import note_column_mass, note_group_mass, probe
from .few_rows import decode_kept, few_rows
from .moved_mass import carry_out, edit_named_rows
from .pattern_kernels import listed_alone, through_listed, why_no_window, windowed
from .patterns import Pattern, through_lists, window_of
from .run import FEW_ROWS, SAMPLED, Run
from .spread import SPREAD, note_spread
from .subset import only, over, without
from .swept_edits import edit_swept, sweepable

# Statistics that the shortest way of a decode step over kept tokens gives.
KEPT = {"column_mass", "probe_mass"}


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
        return few_rows(run, visible, asked)
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
            return decode_kept(run, layer, asked.wanted)
    if not (asked.wanted or asked.dynamic or run.groups):
        # Frozen rules need no statistics: ask them first, they may have nothing to edit in this call.
        edits = asked.settled(run)
        if not (edits or asked.patterns or asked.extra or run.edited or run.plan.of["observe"]):
            return run.delegate(call)
    window, run.why_not = window_of(call, asked.patterns)
    if window is not None and not run.runtime.facts.get("attentions"):
        run.why_not = why_no_window(run, layer, asked.wanted, asked.dynamic, asked.edits)
        if not run.why_not:
            return windowed(run, window, asked.extra)
    return through_listed(run, asked) if asked.patterns else None


def _prepared_edits(run: Run, visible: Visibility, asked: Asked) -> Tensor | None:
    """The output of edits that one sweep, or the mass of some groups, can prepare; None for others."""
    if run.groups and not asked.wanted:
        edited = edit_named_rows(run, visible, asked.moves)
        if edited is not None:
            return edited
    if not run.groups and sweepable(run, visible, asked.wanted, asked.moves):
        return edit_swept(run, asked.layer, visible, asked.moves)
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
        note_column_mass(run, asked.layer, visible, lse, options)
    if SPREAD & asked.wanted:
        note_spread(run, visible, lse, asked.wanted)
    probe(run, asked.layer, visible, lse)
    subset = None
    for entry, chosen in chosen_patterns(run, asked.dynamic):
        run.edited = True
        run.acted.add(entry.owner)
        if isinstance(chosen, Tokens):
            subset = chosen.keep if subset is None else subset & chosen.keep
            visible, out = only(visible, chosen.keep), None
        elif listed_alone(run, asked, visible, chosen):
            run.kernel, run.reasons, out = through_lists(call, chosen, visible, run.terms())
        else:
            visible = restricted(visible, chosen)
            out, lse = run.attention(visible, extra)
            run.stats = Statistics(lse=lse)
    note_group_mass(run, visible, run.stats.lse)
    edits = asked.settled(run)
    if subset is not None and not (edits or extra):
        run.kernel, run.reasons, out = over(call, visible, subset, run.terms())
    if out is None and (edits or run.edited):
        out, lse = run.attention(visible, extra)
    out = carry_out(run, out, lse, visible, edits)
    run.observe()
    if out is None:
        return run.delegate(call)
    if plain and not edits and not run.edited:
        return _only_looked_at(run, out)
    if subset is not None:
        out = without(out, subset)
    return out.transpose(1, 2).contiguous()


def _only_looked_at(run: Run, out: Tensor) -> Tensor:
    """The user's own kernel gives the output, ours gave the statistics."""
    fused = run.kernel == "lse/fused"  # other forms of ours do not have the bits of the user's kernel
    if run.runtime.facts.get("same_bits") and fused and not out.requires_grad:
        return out.transpose(1, 2)
    return run.delegate(run.call)
