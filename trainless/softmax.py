"""Softmax attention observed and edited: the middle of a call's way through its plan.

``attention.py`` says what happens before and after. Here the output comes with the log-sum-exp of its rows,
statistics are taken, dynamic patterns and edits asked for and carried out. Which form computes what:

- up to FEW_ROWS query rows (decode, drafts): their probabilities are computed outright and edited;
- statistics that may lead to an edit: output, log-sum-exp and column mass in one sweep, and for heads that then
  are not edited the output of the user's own kernel;
- anything else: the fused operator, then one pass per statistic, then an edit of few columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, Unsupported
from .hosts.base import Runtime
from .kernels.column_mass import RowScale, attention_and_mass, column_mass, together_reasons
from .kernels.common import Terms
from .kernels.group_mass import group_mass
from .kernels.lse import attention as attention_lse
from .kernels.lse import choose, row_attention, row_probabilities
from .kernels.mass_move import mass_move
from .kernels.visibility import Visibility, visibility
from .kv import CompressingLayer
from .rows import apply, apply_to, edited_rows, mass_of_groups, move_edit, on_heads
from .seams import (
    AttentionCall,
    AttentionPlan,
    Contribution,
    Entry,
    Groups,
    MassMove,
    RowEdit,
    State,
    Statistics,
)

Delegate = Callable[[AttentionCall], Tensor]
FEW_ROWS = 16  # up to this many query rows the probabilities are computed outright
ROW_BLOCK = 128  # rows at a time where an edit needs whole rows of probabilities


class SoftmaxRun:
    """One call under way; what the steps of a plan share, and those that deal with the softmax."""

    def __init__(self, runtime: Runtime, call: AttentionCall, delegate: Delegate):
        self.runtime, self.call, self.delegate = runtime, call, delegate
        self.plan: AttentionPlan = runtime.plan
        self.states: dict[str, State] = {}
        self.acted: set[Any] = set()
        self.edited = False  # the output can no longer come from the delegate
        self.stats = Statistics()
        self.groups: dict[Entry, Groups] = {}  # who wants to know the mass of which groups, and …
        self.masses: dict[Entry, Tensor] = {}  # … what it is
        self.kernel, self.reasons = "stock", ""

    def _state(self, entry: Entry) -> State:
        if entry.method not in self.states:
            kept = getattr(self.call.layer, "states", None)
            # Without a cache there is no sequence to remember: the state lives for this call.
            self.states[entry.method] = State() if kept is None else kept.setdefault(entry.method, State())
        return self.states[entry.method]

    def _value(self, entry: Entry) -> Any:
        if entry.contribution.constant is not None:
            return entry.contribution.constant
        value = entry.contribution.value
        if value is None:
            raise InputError(
                f"{entry.method}: a {entry.contribution.kind} contribution needs a value function"
            )
        heads = entry.contribution.heads
        if heads and max(heads) >= self.call.query.shape[1]:
            raise InputError(
                f"{entry.method}: head {max(heads)} does not exist at {self.runtime.site.name}, "
                f"which has {self.call.query.shape[1]} heads"
            )
        stats = self.stats
        if entry in self.masses:
            stats = replace(stats, group_mass=self.masses[entry])
        return value(self.call, stats, self._state(entry))

    def _observe(self) -> None:
        for entry in self.plan.of["observe"]:
            self._value(entry)
            self.acted.add(entry.owner)

    def _softmax(
        self,
        layer: CompressingLayer | None,
        extra: list[Any],
        predicates: list[Entry],
        wanted: set[str],
        moves: tuple[Entry, ...],
    ) -> Tensor:
        call = self.call
        if call.dropout:
            raise Unsupported(
                f"{self.runtime.site.name}: attention dropout is on (training mode) and a patch edits this "
                "attention; call model.eval() or remove the patch"
            )
        if layer is not None and layer.evicted and call.query.shape[2] == 1 and not (extra or moves):
            if not self.plan.of["pattern"] and not self.plan.of["observe"] and "lse" not in wanted:
                return self._decode_kept(layer, wanted)
        dynamic = [e for e in self.plan.of["pattern"] if e.contribution.dynamic]
        edits = None
        if not (wanted or dynamic or self.groups):
            # Frozen rules need no statistics: ask them first, they may have nothing to edit in this call.
            edits = [(entry, move) for entry in moves if (move := self._value(entry)) is not None]
            if not (edits or predicates or extra or self.edited or self.plan.of["observe"]):
                return self.delegate(call)
        visible = self._visibility(layer, predicates)
        if call.query.shape[2] <= FEW_ROWS and not extra:
            return self._few_rows(layer, visible, wanted, moves, dynamic, edits)
        plain = not (self.edited or extra)
        if plain and self.groups and not (wanted or dynamic):
            edited = self._edit_named_rows(visible, moves)
            if edited is not None:
                return edited
        if plain and not dynamic and not self.groups and self._together(visible, wanted, moves):
            return self._edit_swept(layer, visible, moves)
        out, lse = self._attention(visible)
        self.edited = self.edited or bool(extra)
        if extra:
            out, lse = self._merge_extra(out, lse, extra)
        self.stats.lse = lse
        options = self._options()
        if "column_mass" in wanted:
            self._column_mass(layer, visible, lse, options)
        for entry in dynamic:
            pairs = self._value(entry)
            if pairs is not None:
                visible = visible.restrict(pairs.visible)
                out, lse = self._attention(visible)
                self.stats = Statistics(lse=lse)
                self.edited = True
                self.acted.add(entry.owner)
        changed = False
        self._group_mass(visible, self.stats.lse)
        if edits is None:
            edits = [(entry, move) for entry in moves if (move := self._value(entry)) is not None]
        for entry, move in edits:
            changed = True
            self.acted.add(entry.owner)
            if isinstance(move, RowEdit):
                out = self._edit_rows(out, lse, visible, move, entry.contribution)
            else:
                out = self._move(out, lse, visible, move, entry.contribution, options)
        self._observe()
        if plain and not changed and not self.edited:
            # Only looked at: the user's own kernel gives the output, ours gave the statistics.
            if self.runtime.facts.get("same_bits") and not out.requires_grad:
                return out.transpose(1, 2)
            return self.delegate(call)
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

    def _visibility(self, layer: CompressingLayer | None, predicates: list[Entry]) -> Visibility:
        call = self.call
        mask, causal = call.mask, call.causal
        if layer is not None and layer.evicted:
            mask, causal = layer.mask(mask, call.query.shape[2], causal)
        _, h, hkv, lq, lk = call.shape
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] not in (1, h):
            mask = mask.repeat_interleave(h // hkv, 1)  # slots differ from one key/value head to the next
        # Flash-style padding (B, Lk) comes beside the causal flag, not instead of it.
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        visible = visibility(
            mask if padding is None else None,
            causal=causal,
            lq=lq,
            lk=lk,
            real=call.real,
            window=call.sliding_window,
            device=call.query.device,
        )
        if padding is not None:
            visible = replace(visible, keys=padding[:, -lk:].bool())
        for entry in predicates:
            pairs = self._value(entry)
            if pairs is not None:
                visible = visible.restrict(pairs.visible)
                self.edited = True
                self.acted.add(entry.owner)
        return visible

    def _options(self) -> dict[str, Any]:
        call = self.call
        return {
            "scale": call.scaling,
            "position_bias": call.position_bias,
            "softcap": call.softcap,
            "sink_logits": call.sink_logits,
        }

    def _terms(self) -> Terms:
        call = self.call
        return Terms(call.scaling, call.position_bias, call.softcap, call.sink_logits)

    def _attention(self, visible: Visibility) -> tuple[Tensor, Tensor]:
        call = self.call
        options = self._options()
        choice = choose(call.query, call.key, call.value, visibility=visible, terms=self._terms())
        self.kernel, self.reasons = f"lse/{choice.name}", "; ".join(choice.reasons)
        out, lse = attention_lse(call.query, call.key, call.value, visibility=visible, **options)
        return out, lse

    def _column_mass(
        self, layer: CompressingLayer | None, visible: Visibility, lse: Tensor, options: dict[str, Any]
    ) -> None:
        """Fill in column_mass (B, H, Lk), zero for heads nobody asked about, and the row counts."""
        call = self.call
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
        if layer is not None and layer.wants_scores():
            tail = None
            if layer.record_past:
                # These rows may be taken back by the next crop, so the layer wants them one by one.
                rows = min(layer.TAIL, call.query.shape[2])
                tail = self._row_probabilities(visible, call.query.shape[2] - rows, call.query.shape[2])
            layer.score(mass, tail)

    def _heads_watched(self, layer: CompressingLayer | None) -> tuple[int, ...] | None:
        if layer is not None and layer.wants_scores():
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
            layer.score(rows[:, :, 0], rows if layer.record_past else None)
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
            if layer is not None and layer.wants_scores():
                layer.score(self.stats.column_mass, rows if layer.record_past else None)
        if "lse" in wanted:
            _, self.stats.lse = self._attention(visible)
        changed = False
        for entry in dynamic:
            pairs = self._value(entry)
            if pairs is not None:
                probabilities = self._row_probabilities(visible.restrict(pairs.visible), 0, lq)
                changed = True
                self.acted.add(entry.owner)
        for entry, named in self.groups.items():
            self.masses[entry] = mass_of_groups(probabilities, named)
        if edits is None:
            edits = [(entry, move) for entry in moves if (move := self._value(entry)) is not None]
        # Rows that every edit leaves out have the bits of the user's own kernel, where it could run at all.
        named_rows = None if changed or self.edited else edited_rows(edits, probabilities)
        for entry, move in edits:
            changed = True
            self.acted.add(entry.owner)
            edit = move.edit if isinstance(move, RowEdit) else move_edit(move)
            heads = entry.contribution.heads
            probabilities = on_heads(probabilities, heads, edit, 0)
        self._observe()
        if named_rows is not None:
            return apply_to(self.delegate(call), probabilities, call.value, named_rows)
        if not (changed or self.edited):
            # Only looked at, or found nothing to edit: the user's own kernel gives the output, bit for bit.
            return self.delegate(call)
        return apply(probabilities, call.value, call.query.dtype).transpose(1, 2).contiguous()

    def _row_probabilities(self, visible: Visibility, start: int, stop: int) -> Tensor:
        """Probabilities (B, H, rows, Lk) of the rows start..stop."""
        call = self.call
        bias = call.position_bias
        if bias is not None:
            bias = bias[:, :, start:stop] if bias.shape[2] > 1 else bias
        added = visible.bias_at(torch.arange(start, stop, device=visible.device))
        if added is not None:
            bias = added if bias is None else bias + added
        return row_probabilities(
            call.query[:, :, start:stop], call.key, valid=visible.rows(start, stop), scale=call.scaling,
            position_bias=bias, softcap=call.softcap, sink_logits=call.sink_logits,
        )  # fmt: skip

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

    def _merge_extra(self, out: Tensor, lse: Tensor, extra: list[Any]) -> tuple[Tensor, Tensor]:
        """Attention over more keys is attention over each set, weighted by their log-sum-exp: exact."""
        call = self.call
        total, mixed = lse, out.to(lse.dtype)
        for more in extra:
            lk = more.key.shape[2]
            seen = visibility(
                more.visible, causal=False, lq=call.query.shape[2], lk=lk, real=None, device=call.query.device
            )
            beside, weight = attention_lse(
                call.query, more.key, more.value, visibility=seen, scale=call.scaling
            )
            merged = torch.logaddexp(total, weight)
            keep = torch.exp(total - merged).nan_to_num(0.0)[..., None]
            add = torch.exp(weight - merged).nan_to_num(0.0)[..., None]
            mixed = mixed * keep + beside.to(lse.dtype) * add
            total = merged
        return mixed.to(out.dtype), total
