"""Holds one watched attention call against the dense rule and against the facts that methods were told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..cache import CompressingLayer, PackedLayer, StaticStatefulMixin
from ..engine.runtime import Runtime
from ..engine.watching import Made
from ..kernels import Blocks, Spans, Window2d
from ..seams import (
    BESIDE,
    AttentionPlan,
    Entry,
    Evict,
    MassMove,
    Pairs,
    Quantise,
    RowEdit,
    Tokens,
)
from .caches import History, Lost, answering
from .dense import AskedCall, Found, Published, apart, attention, read, tolerance, wide
from .heard import Heard, Record, Value, in_columns, in_columns_of

MOST_PAIRS = 1 << 25  # (batch, head, row, key) in one call: what fits into memory in full
HALF = (torch.float16, torch.bfloat16)


def entropy_over_rows(p: Tensor) -> Tensor:
    """(B, H, Lk): entropy of each key's shares over the rows of probabilities (B, H, Lq, Lk)."""
    share = p / p.sum(2, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return -torch.xlogy(share, share).sum(2)


class Judge:
    """One call under judgement; what it finds goes into the record of its site.

    histories: of cache layers, by their id. originals: of the entries that tell what they return. mask: the
    two-dimensional mask (B, L) that the model was given for the sequence of this site, if it was.
    """

    def __init__(
        self, runtime: Runtime, record: Record, heard: Heard, histories: dict[int, History],
        originals: Mapping[Entry, Entry], mask: Tensor | None,
    ):  # fmt: skip
        self.runtime, self.record, self.histories = runtime, record, histories
        self.originals, self.mask = originals, mask
        self.made, self.updates, self.call = heard.made, heard.updates, heard.call
        self.last = heard.last
        self.values, self.groups = heard.values, heard.groups

    def check(self, out: Tensor, stock: Tensor | None) -> None:
        plan, record, made = self.runtime.plan, self.record, self.made
        if plan.inert:
            return
        if self.call is None and not self.runtime.prepared.numbers:
            record.passed_over += 1
            if stock is not None and not torch.equal(stock, out):
                record.fail("result", "a call that is left alone differs from the model's own attention")
            return
        self._filled()
        out, stock = self._told_order(out, stock)
        made = self.made
        real = self._padding()
        history = self._layer(real)
        self._unasked(plan)
        b, h, lq = made.query.shape[:3]
        lk = made.key.shape[2] if history is None or history.key is None else history.key.shape[2]
        if b * h * lq * lk > MOST_PAIRS:
            record.skip("result", f"{lq} × {lk} pairs of a call are too many to compute in full")
            if history is not None:
                history.lose()
            return
        published = self._published(plan, history, lk)
        record.seams |= {e.contribution.kind for e in plan.active if e.contribution.kind not in BESIDE}
        form = [v for v in self.values if v.entry.contribution.kind == "form" and v.given is not None]
        found = None
        if form:
            self._form(form[-1], out, published)
        else:
            found = self._dense(made, out, stock, history, published, real)
        if found is not None:
            self._statistics(found, history, real)
        self._cache(plan, history, found, real, made.query.dtype)

    def _filled(self) -> None:
        """Of a static cache, the slots that hold a token: no method is told of the others."""
        made, call = self.made, self.call
        if call is None or not isinstance(call.layer, StaticStatefulMixin):
            return
        lk = call.key.shape[2]
        if lk < made.key.shape[2]:
            mask = (
                made.mask[..., :lk] if isinstance(made.mask, Tensor) and made.mask.dim() == 4 else made.mask
            )
            self.made = dataclasses.replace(
                made, key=made.key[:, :, :lk], value=made.value[:, :, :lk], mask=mask
            )

    def _told_order(self, out: Tensor, stock: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The call, what came out and what the model gives, with query heads beside the key head that they read.

        Where the call repeats its heads as a whole and its cache has each once, methods are told of it in that order.
        """
        made, call = self.made, self.call
        if call is None or call.key.shape[1] == made.key.shape[1]:
            return out, stock
        heads, held = made.query.shape[1], call.key.shape[1]
        key, value = made.key[:, :held], made.value[:, :held]
        times = made.key.shape[1] // held
        if not (torch.equal(key.repeat(1, times, 1, 1), made.key) and heads == made.key.shape[1]):
            return out, stock
        order = torch.arange(heads, device=out.device).view(-1, held).t().reshape(-1)
        self.made = dataclasses.replace(made, query=made.query[:, order], key=key, value=value)
        return out[:, :, order], None if stock is None else stock[:, :, order]

    def _dense(
        self, made: Made, out: Tensor, stock: Tensor | None, history: History | None, published: Published,
        real: Tensor | None,
    ) -> Found | None:  # fmt: skip
        """The call in full, held against what came out; None where it cannot be read."""
        asked = self._read(made, history, stock)
        if asked is None:
            return None
        found = attention(asked, published)
        doubtful = found.doubtful
        if real is not None:
            doubtful = doubtful | ~real[:, None]
        rounded = any(isinstance(f, Tensor) for f in published.factors)
        allowed = tolerance(made.query.dtype, found.largest, rounded)
        gap = float(apart(out.transpose(1, 2), found.output, asked.value, doubtful).max())
        record = self.record
        record.worst, record.gap = max(record.worst, gap / allowed), max(record.gap, gap)
        if gap > allowed:
            record.fail(
                "result", f"off by {gap:.2g} of the largest value, and rounding explains {allowed:.1g}"
            )
        else:
            record.held["result"] += 1
        return found

    def _read(self, made: Made, history: History | None, stock: Tensor | None) -> AskedCall | None:
        """The call in plain terms. A reading is trusted once it gives the model's own attention."""
        key, value = made.key, made.value
        if history is not None and history.key is not None and history.value is not None:
            # What a module makes of numbers that its cache made of codes is taken as it comes.
            if not (history.expanded and history.packed):
                key, value = history.key, history.value
            elif made.key.shape[2] != history.key.shape[2]:
                key, value = history.placed(made.key), history.placed(made.value)
        h = made.query.shape[1]
        key, value = (t.repeat_interleave(h // t.shape[1], 1) for t in (key, value))
        causal = bool(getattr(self.runtime.site.module, "is_causal", True)) and made.causal is not False
        for from_start in (False, True):
            asked = read(made, key, value, causal, from_start)
            if stock is None:
                break
            plain = attention(asked, Published())
            gap = apart(stock.transpose(1, 2), plain.output, asked.value, plain.doubtful)
            if float(gap.max()) <= tolerance(made.query.dtype, plain.largest):
                break
        else:
            self.record.skip("result", "its own attention is none that the dense rule can read")
            return None
        if history is not None:
            exists = history.exists()
            asked.seen = exists if asked.seen is None else asked.seen & exists
            policy = history.layer.policy
            if policy.rolled and self.runtime.rotate is not None:
                steps = history.gone_after()
                if bool(steps.any()):
                    asked.key = self.runtime.rotate(asked.key, steps)
        return asked

    # ------------------------------------------------------------------ what contributions published

    def _unasked(self, plan: AttentionPlan) -> None:
        """A contribution that changes calls and was never asked has not been applied."""
        asked = {id(v.entry) for v in self.values}
        for entry in plan.active:
            own = entry.contribution
            always = own.kind in ("scale", "keys", "position", "gain", "mass", "form")
            later = self.call is None or self.call.past > 0
            always = always or (own.kind == "pattern" and not own.dynamic and not (own.first and later))
            original = self.originals.get(entry, entry)
            if always and own.constant is None and id(original) not in asked:
                self.record.fail("result", f"{entry.method} was not asked for its {own.kind}")

    def _published(self, plan: AttentionPlan, history: History | None, lk: int) -> Published:
        found = Published()
        for entry in plan.of["scale"]:
            if entry.contribution.constant is not None:
                found.factors.append(entry.contribution.constant)
        for entry in plan.of["gain"]:
            if entry.contribution.constant is not None:
                found.gains.append((entry.contribution.heads, entry.contribution.constant))
        latest = {
            id(v.entry): v for v in self.values
        }  # a value that is asked for again is the one that counts
        for value in latest.values():
            if value.given is not None:
                self._publish(found, value, history, lk)
        return found

    @staticmethod
    def _publish(found: Published, value: Value, history: History | None, lk: int) -> None:
        """Put what one contribution gave in its place."""
        own, given = value.entry.contribution, value.given
        if own.kind == "scale":
            found.factors.append(given)
        elif own.kind == "pattern" and isinstance(given, Tokens):
            found.tokens.append(given)
        elif own.kind == "pattern" and isinstance(given, Pairs | Window2d | Blocks | Spans):
            found.pairs.append(given)
        elif own.kind == "keys":
            found.extra.append(given)
        elif own.kind == "gain":
            found.gains.append((own.heads, given))
        elif own.kind == "mass" and isinstance(given, MassMove):
            found.moves.append((own.heads, in_columns_of(given, value, history, lk)))
        elif own.kind == "mass" and isinstance(given, RowEdit) and value.blocks:
            blocks = sorted(value.blocks, key=lambda block: block[0])
            edited = torch.cat([after for _, _, after in blocks], 2)
            found.edits.append((own.heads, in_columns(edited, value, history, own.heads, lk)))

    def _form(self, value: Value, out: Tensor, published: Published) -> None:
        """Another operator: held against the plain form that its contribution declares."""
        plain = value.entry.contribution.plain
        if plain is None:
            self.record.skip("result", f"{value.entry.method} declares no plain form of its operator")
            return
        call = value.call
        exact = dataclasses.replace(call, query=wide(call.query), key=wide(call.key), value=wide(call.value))
        want = plain(exact).transpose(1, 2)  # (B, H, Lq, D)
        for heads, gain in published.gains:
            index = list(range(want.shape[1])) if heads is None else list(heads)
            want = want.clone()
            by = wide(gain).transpose(1, 2) if isinstance(gain, Tensor) else gain
            want[:, index] = want[:, index] * by
        none = torch.zeros(want.shape[:3], dtype=torch.bool, device=want.device)
        values = wide(call.value).repeat_interleave(want.shape[1] // call.value.shape[1], 1)
        gap = float(apart(out.transpose(1, 2), want, values, none).max())
        allowed = 8 * tolerance(call.query.dtype, 1.0)
        self.record.worst, self.record.gap = max(self.record.worst, gap / allowed), max(self.record.gap, gap)
        if gap > allowed:
            self.record.fail("result", f"off by {gap:.2g} of the largest value from its plain form")
        else:
            self.record.held["result"] += 1

    def _statistics(self, found: Found, history: History | None, real: Tensor | None) -> None:
        """What methods were shown of the attention, where its keys still stand in their columns."""
        b, h, lq, lk = found.probabilities.shape
        rows = torch.ones(b, lq, dtype=torch.bool, device=found.lse.device) if real is None else real
        slack = 1e-3 if found.probabilities.dtype == torch.float64 else 1e-2
        for value in self.values:
            own, stats = value.entry.contribution, value.stats
            heads = list(range(h)) if own.heads is None else list(own.heads)
            if value.call.query.dtype in HALF:
                slack = 0.1
            if (
                stats.column_mass is not None
                and stats.column_mass.shape[-1] == lk
                and value.positions is None
            ):
                want = (found.probabilities * rows[:, None, :, None]).sum(2)[:, heads]
                self._agrees("column mass", stats.column_mass[:, heads], want, slack, value)
            self._spread(value, found.probabilities * rows[:, None, :, None], heads, slack)
            named = self.groups.get(id(value.entry))
            if stats.group_mass is not None and named is not None and named.of.shape[-1] == lk:
                of = named.of.repeat_interleave(h // named.of.shape[1], 1)[:, :, None]
                p = found.probabilities
                want = torch.stack([(p * (of == g)).sum(-1) for g in range(1, named.count + 1)], -1)
                if named.rows is not None:
                    want = want * named.rows[:, None, :, None]
                keep = rows[:, None, :, None]
                self._agrees("mass of groups", stats.group_mass * keep, want * keep, slack, value)
            for start, before, _ in value.blocks:
                want = found.probabilities[:, heads, start : start + before.shape[2]]
                got = in_columns(before, value, history, own.heads, lk)
                keep = rows[:, None, start : start + before.shape[2], None]
                self._agrees("probabilities", got * keep, want * keep, slack, value)

    def _spread(self, value: Value, p: Tensor, heads: list[int], slack: float) -> None:
        """Largest entries and entropies; p: probabilities (B, H, Lq, Lk), 0 in rows of padding."""
        known = {
            "row_max": lambda: p.amax(3),
            "row_entropy": lambda: -torch.xlogy(p, p).sum(3),
            "column_max": lambda: p.amax(2),
            "column_entropy": lambda: entropy_over_rows(p),
        }
        for name, of in known.items():
            got, columns = getattr(value.stats, name), name.startswith("column")
            placed = value.positions is None and got is not None and got.shape[-1] == p.shape[-1]
            if got is not None and (placed or not columns):
                self._agrees(name.replace("_", " "), got[:, heads], of()[:, heads], slack, value)

    def _agrees(self, what: str, got: Tensor, want: Tensor, slack: float, value: Value) -> None:
        gap = float((wide(got) - want).abs().max()) if want.numel() else 0.0
        if gap > slack * max(1.0, float(want.abs().max())):
            self.record.fail("result", f"{value.entry.method} was shown a {what} that is off by {gap:.2g}")

    # ------------------------------------------------------------------ facts of the call

    def _padding(self) -> Tensor | None:
        """Which rows are real by the model's own input, bool (B, Lq), held against what methods were told."""
        made, mask, lq = self.made, self.mask, self.made.query.shape[2]
        told = None if self.call is None else self.call.real
        past = 0 if self.call is None else self.call.past
        if mask is None or mask.shape[0] != made.query.shape[0] or mask.shape[1] != past + lq:
            return told
        real = mask[:, -lq:].bool()
        if self.call is None or (self.runtime.plan.delegable and not self.runtime.plan.needs_layer):
            return real  # nothing that runs here asks
        said = torch.ones_like(real) if told is None else told
        if not torch.equal(said, real):
            row = int((said != real).any(1).int().argmax())
            self.record.fail(
                "padding",
                f"methods are told that {int(said[row].sum())} of the {lq} tokens of row {row} are no padding, and by "
                f"the model's own mask {int(real[row].sum())} are",
            )
        else:
            self.record.held["padding"] += 1
        return real

    def _layer(self, real: Tensor | None) -> History | None:
        """The history of the cache layer that methods keep something on; and whether it is the call's own."""
        plan, call, record = self.runtime.plan, self.call, self.record
        made, updates = self.made, self.updates
        # Where the keys are another layer's, what stands for the call's own is never updated.
        alien = not updates and bool(self.runtime.site.facts.get("borrows"))
        if call is None or not plan.needs_layer or call.layer is None or alien:
            return None
        layer = call.layer
        aside = not hasattr(layer, "update")  # something that stands in for a layer, for a further attention
        if not updates and self.last is not None and (self.last.layer is layer or aside):
            # Some modules attend several times over the keys of one update.
            if isinstance(layer, CompressingLayer):
                if id(layer) in self.histories:
                    self.histories[id(layer)].lose()
                raise Lost("several attentions over the keys of one update are not followed")
            record.held["cache"] += 1
            return None
        if not updates:
            record.fail("cache", "methods keep the sequence on a layer that this call did not update")
            return None
        last = updates[-1]
        if len(updates) > 1:
            record.fail("cache", f"the cache was updated {len(updates)} times for one call")
        if last.layer is not layer:
            record.fail(
                "cache",
                "methods keep the sequence on another layer of the cache than the one that this call updated",
            )
            return None
        if not isinstance(layer, CompressingLayer):
            record.held["cache"] += 1
            return None
        history = self.histories.setdefault(id(layer), History(layer))
        if history.stamp is None and history.calls:
            raise Lost("an earlier call of the sequence was not followed")
        try:
            history.feed(last, made.key, made.value, made.query.shape[1], real)
        except Lost as error:
            record.fail("cache", str(error))
            raise
        fed = last.key.shape[1], last.key.shape[3], last.value.shape[3]
        met = made.key.shape[1], made.key.shape[3], made.value.shape[3]
        if fed != met and not layer.policy.chosen and plan.quantiser is None:
            record.held["expanded"] += 1
        record.held["cache"] += 1
        return history

    def _cache(
        self, plan: AttentionPlan, history: History | None, found: Found | None, real: Tensor | None,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """What the layer kept after the call, and its codes."""
        if history is None:
            return
        layer, record = history.layer, self.record
        policy = plan.evict
        if found is None:
            history.lose()
            record.skip("kept", "the call itself could not be computed in full")
            return
        if isinstance(policy, Evict) and policy.replay is not None:
            history.lose()
            record.skip(
                "kept", "what stays is decided when the prompt has been read a second time, after the call"
            )
            return
        if layer.record_past or layer.lease.deferring:
            history.lose()
            record.skip(
                "kept", "the layer decides later: drafts may be taken back, or a prefill comes in parts"
            )
            return
        mass = None
        if isinstance(policy, Evict) and policy.score is not None and not policy.of_keys:
            mass = self._scored(policy, found, real)
        chosen = None
        if plan.evictor is not None and policy is not None and policy.chosen:
            told, chosen = self._chosen(plan.evictor)
            policy = policy if told else None
        slack = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.1)
        history.shown = answering(layer)
        problems, dropped = history.settle(policy, mass, chosen, slack)
        for problem in problems:
            record.fail("kept", problem)
        if policy is not None and not problems:
            record.held["kept"] += 1
            record.held["dropped"] += dropped
        if isinstance(layer, PackedLayer) and isinstance(plan.quantise, Quantise):
            problems, worst, packed = history.unpack(plan.quantise)
            record.codes = max(record.codes, worst)
            for problem in problems:
                record.fail("precision", problem)
            if packed and not problems:
                record.held["precision"] += 1

    @staticmethod
    def _scored(policy: Evict, found: Found, real: Tensor | None) -> Tensor:
        """Probabilities (B, H, Lq, Lk) of the rows by which a rule scores; zero in the others."""
        b, _, lq, _ = found.probabilities.shape
        rows = torch.ones(b, lq, dtype=torch.bool, device=found.lse.device) if real is None else real
        if policy.last:
            # Where the budget is a share, the prompt of a row may be scored by fewer.
            few = [policy.parts(int(n)).last if policy.once else policy.last for n in rows.sum(1)]
            counts = torch.tensor(few, device=rows.device)[:, None]
            rows = rows & (rows.long().flip(1).cumsum(1).flip(1) <= counts)
        if policy.sample is not None:
            rows = rows * policy.sample.times(rows.long().cumsum(1) - 1)
        return found.probabilities * rows[:, None, :, None]

    def _chosen(self, evictor: Entry) -> tuple[bool, Tensor | None]:
        """Whether the method's own choice after this call can be followed, and the choice; None: everything stays."""
        original = self.originals.get(evictor, evictor)
        mine = [v for v in self.values if v.entry is original]
        if not mine or mine[-1].given is None:
            return True, None
        if mine[-1].positions is not None:  # chosen among slots that have moved since
            self.record.skip("kept", "a later choice is among what is left, and is taken as it is")
            return False, None
        return True, mine[-1].given
