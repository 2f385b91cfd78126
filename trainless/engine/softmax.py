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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import CompressingLayer
from ..errors import Unsupported
from ..kernels.column_mass import RowScale, attention_and_mass, column_mass, together_reasons
from ..kernels.group_mass import group_mass
from ..kernels.lse import attention as attention_lse
from ..kernels.lse import choose as choose_lse
from ..kernels.lse import row_attention
from ..kernels.mass_move import mass_move
from ..kernels.visibility import Visibility
from ..kernels.window2d import Window2d, window2d
from ..kernels.window2d import choose as choose_window
from ..seams import Contribution, Entry, MassMove, RowEdit, Statistics, Tokens
from .extra_keys import merge_extra
from .patterns import Pattern, extra_of_image, window_of
from .row_edits import apply, apply_to, edited_rows, mass_of_groups, move_edit, on_heads
from .run import Run
from .subset import only, over, without

FEW_ROWS = 16  # up to this many query rows the probabilities are computed outright
ROW_BLOCK = 128  # rows at a time where an edit needs whole rows of probabilities


class SoftmaxRun(Run):
    """What the steps of a plan do that deal with the softmax."""

    def _softmax(
        self,
        layer: CompressingLayer | None,
        extra: list[Any],
        patterns: list[Pattern],
        wanted: set[str],
        moves: tuple[Entry, ...],
    ) -> Tensor:
        call = self.call
        if call.dropout:
            raise Unsupported(
                f"{self.runtime.site.name}: attention dropout is on (training mode) and a patch edits this "
                "attention; call model.eval() or remove the patch"
            )
        dynamic = [e for e in self.plan.of["pattern"] if e.contribution.dynamic and e in self.asking]
        if layer is not None and layer.evicted and call.query.shape[2] == 1 and not (extra or moves):
            if not (patterns or dynamic or self.plan.of["observe"] or "lse" in wanted):
                return self._decode_kept(layer, wanted)
        edits = None
        if not (wanted or dynamic or self.groups):
            # Frozen rules need no statistics: ask them first, they may have nothing to edit in this call.
            edits = [(entry, move) for entry in moves if (move := self._value(entry)) is not None]
            if not (edits or patterns or extra or self.edited or self.plan.of["observe"]):
                return self.delegate(call)
        window, self.why_not = window_of(call, patterns)
        if window is not None and not self.runtime.facts.get("attentions"):
            self.why_not = self._why_no_window(layer, wanted, dynamic, edits)
            if not self.why_not:
                return self._windowed(window, extra)
        visible = self._visibility(layer, patterns)
        # Whoever asks for the probabilities themselves is given all of them, as they are after the edits.
        if (call.query.shape[2] <= FEW_ROWS or self.runtime.facts.get("attentions")) and not extra:
            return self._few_rows(layer, visible, wanted, moves, dynamic, edits)
        plain = not (self.edited or extra)
        if plain and self.groups and not (wanted or dynamic):
            edited = self._edit_named_rows(visible, moves)
            if edited is not None:
                return edited
        if plain and not dynamic and not self.groups and self._together(visible, wanted, moves):
            return self._edit_swept(layer, visible, moves)
        out, lse = None, None
        if not plain or wanted - {"probe_mass"}:
            out, lse = self._attention(visible, extra)
            self.edited = self.edited or bool(extra)
            self.stats.lse = lse
        options = self._options()
        if "column_mass" in wanted:
            self._column_mass(layer, visible, lse, options)
        self._probe(layer, visible, lse)
        subset = None
        for entry in dynamic:
            chosen = self._value(entry)
            if chosen is None:
                continue
            self.edited = True
            self.acted.add(entry.owner)
            if isinstance(chosen, Tokens):
                subset = chosen.keep if subset is None else subset & chosen.keep
                visible, out = only(visible, chosen.keep), None
            else:
                visible = visible.restrict(chosen.visible, chosen.batch)
                out, lse = self._attention(visible, extra)
                self.stats = Statistics(lse=lse)
        changed = False
        self._group_mass(visible, self.stats.lse)
        if edits is None:
            edits = [(entry, move) for entry in moves if (move := self._value(entry)) is not None]
        if subset is not None and not (edits or extra):
            self.kernel, self.reasons, out = over(call, visible, subset, self._terms())
        if out is None and (edits or self.edited):
            out, lse = self._attention(visible, extra)
        for entry, move in edits:
            changed = True
            assert out is not None and lse is not None
            self.acted.add(entry.owner)
            if isinstance(move, RowEdit):
                out = self._edit_rows(out, lse, visible, move, entry.contribution)
            else:
                out = self._move(out, lse, visible, move, entry.contribution, options)
        self._observe()
        if out is None:
            return self.delegate(call)
        if plain and not changed and not self.edited:
            # Only looked at: the user's own kernel gives the output, ours gave the statistics.
            fused = (
                self.kernel == "lse/fused"
            )  # other forms of ours do not have the bits of the user's kernel
            if self.runtime.facts.get("same_bits") and fused and not out.requires_grad:
                return out.transpose(1, 2)
            return self.delegate(call)
        if subset is not None:
            out = without(out, subset)
        return out.transpose(1, 2).contiguous()

    def _why_no_window(
        self, layer: CompressingLayer | None, wanted: set[str], dynamic: list[Entry], edits: list[Any] | None
    ) -> tuple[str, ...]:
        """What else the plan asks for at this call that the kernel of a window does not give."""
        if wanted or dynamic or edits or self.plan.of["observe"]:
            return ("window2d: statistics or an edit are asked for",)
        return ("window2d: the call has a cache that evicts",) if layer is not None else ()

    def _windowed(self, window: Window2d, extra: list[Any]) -> Tensor:
        """Attention in a window on the call's grid, by the kernel that visits nothing outside it."""
        call = self.call
        beside, others = extra_of_image(window, extra)
        choice = choose_window(call.query, call.key, call.value, beside)
        self.kernel, self.reasons = f"window2d/{choice.name}", "; ".join(choice.reasons)
        out, lse = window2d(call.query, call.key, call.value, window=window, scale=call.scaling, extra=beside)
        if others:
            out, lse = merge_extra(call, out, lse, others)
        return out.transpose(1, 2).contiguous()

    def _together(self, visible: Visibility, wanted: set[str], moves: tuple[Entry, ...]) -> bool:
        """Whether an edit that waits for the column mass is about to be asked for, and one sweep can prepare it."""
        # The sweep leaves out heads that nobody watches; a log-sum-exp is asked for whole.
        if "column_mass" not in wanted or "lse" in wanted:
            return False
        waits = any("column_mass" in e.contribution.wanted(self.call, self._state(e)) for e in moves)
        return waits and not together_reasons(
            self.call.query, self.call.key, self.call.value, visible, self._terms()
        )

    def _edit_swept(
        self, layer: CompressingLayer | None, visible: Visibility, moves: tuple[Entry, ...]
    ) -> Tensor:
        """Statistics and output of the heads that are watched in one sweep; the others have their stock bits."""
        call = self.call
        b, h, hkv, lq, _ = call.shape
        found = self._heads_watched(layer)
        watched = list(range(h) if found is None else found)
        with torch.no_grad():
            swept, swept_lse, mass, swept_scale = attention_and_mass(
                call.query, call.key, call.value, visibility=visible, terms=self._terms(), rows=call.real,
                heads=watched,
            )  # fmt: skip
        self._note_mass(layer, visible, mass, watched)
        self._probe(layer, visible, None)
        lse = swept_lse.new_zeros(b, h, lq)
        lse[:, watched] = swept_lse
        self.stats.lse = lse
        edits = [(entry, move) for entry in moves if (move := self._value(entry)) is not None]
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
        self.kernel, self.reasons = "together", ""
        for entry, move in edits:
            self.acted.add(entry.owner)
            if isinstance(move, RowEdit):
                out = self._edit_rows(out, lse, visible, move, entry.contribution)
            else:
                mine = entry.contribution.heads
                own = None if set(range(h) if mine is None else mine) - set(watched) else scale
                options = {**self._options(), "row_scale": own}
                out = self._move(out, lse, visible, move, entry.contribution, options)
        self._observe()
        if not edits:
            return self.delegate(call)
        return out.to(call.query.dtype).transpose(1, 2).contiguous()

    def _group_mass(self, visible: Visibility, lse: Tensor | None) -> Tensor | None:
        """Fill in the masses that are asked for; returns the log-sum-exp of the rows asked about."""
        total = None
        for entry, named in self.groups.items():
            with torch.no_grad():  # gates are chosen by it, not differentiated
                self.masses[entry], found = group_mass(
                    self.call.query, self.call.key, groups=named.of, count=named.count, rows=named.rows,
                    lse=lse, visibility=visible, **self._options(),
                )  # fmt: skip
            total = found if total is None else torch.maximum(total, found)
        return total

    def _edit_named_rows(self, visible: Visibility, moves: tuple[Entry, ...]) -> Tensor | None:
        """Edits that wait for group masses alone and name their rows: the user's own kernel, then those rows anew.

        None when an edit turns out to be of another kind, or to reach rows that nobody asked about.
        """
        call = self.call
        lse = self._group_mass(visible, None)
        edits = [(entry, move) for entry in moves if (move := self._value(entry)) is not None]
        asked = [named.rows for named in self.groups.values()]
        for _, move in edits:
            if isinstance(move, RowEdit) or move.rows is None:
                return None
            if len(asked) > 1 or (asked[0] is not None and bool((move.rows & ~asked[0][:, None]).any())):
                return None
        self._observe()
        out = self.delegate(call)
        if not edits:
            return out
        self.kernel = "rows of groups"
        out = out.transpose(1, 2)
        for entry, move in edits:
            assert isinstance(move, MassMove) and lse is not None
            self.acted.add(entry.owner)
            out = self._move(out, lse, visible, move, entry.contribution, self._options())
        return out.transpose(1, 2).contiguous()

    def _column_mass(
        self, layer: CompressingLayer | None, visible: Visibility, lse: Tensor | None, options: dict[str, Any]
    ) -> None:
        """Fill in column_mass (B, H, Lk), zero for heads nobody asked about, and the row counts."""
        call = self.call
        assert lse is not None
        heads = self._heads_watched(layer)
        options = {k: v for k, v in options.items() if k != "sink_logits"}  # they are inside lse already
        with torch.no_grad():  # what is chosen by it is chosen, not differentiated
            mass = column_mass(
                call.query, call.key, lse, visibility=visible, rows=call.real, heads=heads, **options
            )
        self._note_mass(layer, visible, mass, heads)

    def _note_mass(
        self,
        layer: CompressingLayer | None,
        visible: Visibility,
        mass: Tensor,
        heads: Sequence[int] | None,
    ) -> None:
        """Keep column mass (B, h, Lk) of ``heads`` as a statistic, and tell it to a layer that scores by it."""
        call = self.call
        if heads is not None and len(heads) < call.query.shape[1]:
            whole = mass.new_zeros(mass.shape[0], call.query.shape[1], mass.shape[2])
            whole[:, list(heads)] = mass
            mass = whole
        self.stats.column_mass = mass
        self.stats.rows = visible.counts(call.query.shape[0])
        if layer is not None and layer.scored_by() == "column_mass":
            layer.score(mass, self._tail(layer, visible) if layer.rows_apart() else None)

    def _tail(self, layer: CompressingLayer, visible: Visibility) -> Tensor:
        """The last rows of probabilities, where the layer wants them one by one."""
        lq = self.call.query.shape[2]
        return self._row_probabilities(visible, max(0, lq - layer.rows_apart()), lq)

    def _probe(
        self,
        layer: CompressingLayer | None,
        visible: Visibility | None,
        lse: Tensor | None,
        probabilities: Tensor | None = None,
    ) -> None:
        """Fill in the statistics over chosen rows, and tell a layer that scores by them."""
        if not self.probed.index:
            return
        if probabilities is None:
            assert visible is not None
            self.probed.compute(self.call, visible, self._terms(), lse)
        else:
            self.probed.take(probabilities, visible)
        if layer is None or layer.scored_by() != "probe_mass":
            return
        found = self.probed.of(self.plan.evictor) if self.plan.evictor is not None else None
        if not found:
            return
        tail = None
        if layer.rows_apart():
            # Which of the rows are the last ones is known when the drafts, or the chunks, are.
            tail = probabilities
            if tail is None and visible is not None:
                tail = self._tail(layer, visible)
            if tail is not None and self.call.real is not None:
                tail = tail * self.call.real[:, None, -tail.shape[2] :, None]
        layer.score(found["probe_mass"], tail)

    def _heads_watched(self, layer: CompressingLayer | None) -> tuple[int, ...] | None:
        if layer is not None and layer.scored_by() == "column_mass":
            return None
        heads: set[int] = set()
        for entry in self.plan.active:
            if "column_mass" in entry.contribution.wanted(self.call, self._state(entry)):
                if entry.contribution.heads is None:
                    return None
                heads.update(entry.contribution.heads)
        return tuple(sorted(heads))

    def _move(
        self,
        out: Tensor,
        lse: Tensor,
        visible: Visibility,
        move: MassMove,
        contribution: Contribution,
        options: dict[str, Any],
    ) -> Tensor:
        call = self.call
        return mass_move(
            call.query, call.key, call.value, out, lse,
            source=move.source, keep=move.keep, target=move.target, rows=move.rows,
            heads=contribution.heads, visibility=visible, **options,
        )  # fmt: skip

    # ------------------------------------------------------------------ whole rows of probabilities

    def _decode_kept(self, layer: CompressingLayer, wanted: set[str]) -> Tensor:
        """A decode step over kept tokens, the call that runs most often: no mask, no copies, one score update."""
        call = self.call
        out, probabilities = row_attention(
            call.query, call.key, call.value, valid=layer.valid(), **self._options()
        )
        self.kernel = "rows"
        if "column_mass" in wanted:
            rows = probabilities if call.real is None else probabilities * call.real[:, None, :, None]
            layer.score(rows[:, :, 0], rows if layer.rows_apart() else None)
        if "probe_mass" in wanted:
            holes = layer.valid() is not None
            self._probe(layer, self._visibility(layer, []) if holes else None, None, probabilities)
        return out.transpose(1, 2).contiguous()

    def _few_rows(
        self,
        layer: CompressingLayer | None,
        visible: Visibility,
        wanted: set[str],
        moves: tuple[Entry, ...],
        dynamic: list[Entry],
        edits: list[tuple[Entry, MassMove | RowEdit]] | None,
    ) -> Tensor:
        """Decode steps and short turns: every probability is at hand, so edits are made on them directly."""
        call = self.call
        lq = call.query.shape[2]
        probabilities = self._row_probabilities(visible, 0, lq)
        self.kernel = "rows"
        rows = probabilities if call.real is None else probabilities * call.real[:, None, :, None]
        if "column_mass" in wanted:
            self.stats.column_mass = rows.sum(2)
            self.stats.rows = (
                visible.counts(call.query.shape[0]) if not (layer is not None and layer.evicted) else None
            )
            if layer is not None and layer.scored_by() == "column_mass":
                layer.score(self.stats.column_mass, rows if layer.rows_apart() else None)
        self._probe(layer, visible, None, probabilities)
        if "lse" in wanted:
            _, self.stats.lse = self._attention(visible)
        changed = False
        for entry in dynamic:
            chosen = self._value(entry)
            if chosen is None:
                continue
            changed = True
            self.acted.add(entry.owner)
            if isinstance(chosen, Tokens):
                visible = only(visible, chosen.keep)
                probabilities = without(self._row_probabilities(visible, 0, lq), chosen.keep)
            else:
                visible = visible.restrict(chosen.visible, chosen.batch)
                probabilities = self._row_probabilities(visible, 0, lq)
        for entry, named in self.groups.items():
            self.masses[entry] = mass_of_groups(probabilities, named)
        if edits is None:
            edits = [(entry, move) for entry in moves if (move := self._value(entry)) is not None]
        # Rows that every edit leaves out have the bits of the user's own kernel, where it could run at all; without
        # such rows it need not run.
        named_rows = None if changed or self.edited else edited_rows(edits, probabilities)
        for entry, move in edits:
            changed = True
            self.acted.add(entry.owner)
            edit = move.edit if isinstance(move, RowEdit) else move_edit(move)
            heads = entry.contribution.heads
            probabilities = on_heads(probabilities, heads, edit, 0)
        self._observe()
        if self.runtime.facts.get("attentions") and not (layer is not None and layer.evicted):
            self.runtime.facts["weights"] = probabilities.to(call.query.dtype)
        if named_rows is not None and not bool(named_rows.all()):
            return apply_to(self._stock_heads(visible, named_rows), probabilities, call.value, named_rows)
        if not (changed or self.edited):
            # Only looked at, or found nothing to edit: the user's own kernel gives the output, bit for bit.
            return self.delegate(call)
        return apply(probabilities, call.value, call.query.dtype).transpose(1, 2).contiguous()

    def _stock_heads(self, visible: Visibility, edited: Tensor) -> Tensor:
        """(B, Lq, H, D): the user's own output, but in heads of which every row is ``edited`` (B, H, Lq)."""
        call = self.call
        left = (~edited).any(-1).any(0).nonzero()[:, 0]
        b, h, hkv, lq, _ = call.shape
        shared = visible.structured and call.position_bias is None and call.sink_logits is None
        # Other forms of ours (under gradients, say) do not have the bits of the user's kernel.
        form = choose_lse(call.query, call.key, call.value, visibility=visible, terms=self._terms())
        shared = shared and form.name == "fused"
        if not (self.runtime.facts.get("same_bits") and shared and 4 * len(left) <= h):
            return self.delegate(call)
        of = left // (h // hkv)
        some, _ = attention_lse(
            call.query[:, left], call.key[:, of], call.value[:, of], visibility=visible, scale=call.scaling,
            softcap=call.softcap,
        )  # fmt: skip
        out = call.query.new_zeros(b, lq, h, call.value.shape[3])
        out[:, :, left] = some.transpose(1, 2)
        return out

    def _edit_rows(
        self, out: Tensor, lse: Tensor, visible: Visibility, move: RowEdit, contribution: Contribution
    ) -> Tensor:
        """Apply a rule whose groups differ from row to row, a block of rows at a time."""
        call = self.call
        lq = call.query.shape[2]
        parts = []
        for start in range(0, lq, ROW_BLOCK):
            stop = min(lq, start + ROW_BLOCK)
            probabilities = self._row_probabilities(visible, start, stop)
            edited = on_heads(probabilities, contribution.heads, move.edit, start)
            parts.append(apply(edited, call.value, call.query.dtype))
        whole = torch.cat(parts, 2)
        if contribution.heads is None:
            return whole
        out = out.clone()
        out[:, list(contribution.heads)] = whole[:, list(contribution.heads)]
        return out
