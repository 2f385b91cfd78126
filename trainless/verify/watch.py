"""Sees every attention call at the sites of a patch as the model made it, and holds what came out against ``dense``.

While it is on, contributions tell what they returned, cache updates tell what they were given, and each call is
computed anew. The statistics that methods were shown, the cache layer that they were shown and the tokens that they
were told are padding are held against the call itself.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..errors import TrainlessError
from ..hosts.base import Made, Runtime
from ..kernels import Window2d
from ..kv import CompressingLayer, PackedLayer
from ..seams import (
    BESIDE,
    AttentionCall,
    AttentionPlan,
    Entry,
    Evict,
    Groups,
    MassMove,
    Pairs,
    Quantise,
    RowEdit,
    Statistics,
    Tokens,
)
from .caches import History, Lost, Update
from .dense import Asked, Found, Published, apart, attention, read, tolerance, wide

MOST_PAIRS = 1 << 25  # (batch, head, row, key) in one call: what fits into memory in full
CHECKS = ("result", "kept", "precision", "cache", "padding")
TOPS = ("attention_mask", "decoder_attention_mask")


@dataclasses.dataclass
class Value:
    """What one contribution returned in a call, and what it was shown."""

    entry: Entry
    call: AttentionCall
    stats: Statistics
    given: Any
    positions: Tensor | None  # of the slots of the cache, at that moment
    blocks: list[tuple[int, Tensor, Tensor]] = dataclasses.field(default_factory=list)  # of a RowEdit


@dataclasses.dataclass
class Record:
    """What was found at one site: per check, how often it held, what is wrong, and why it could not be made."""

    calls: int = 0
    passed_over: int = 0
    held: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    reasons: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    worst: float = 0.0  # of the results: as a share of what rounding may do
    gap: float = 0.0  # of the results: as a share of the largest value
    codes: float = 0.0
    seams: set[str] = dataclasses.field(default_factory=set)

    def fail(self, check: str, what: str) -> None:
        self.wrong.setdefault(check, []).append(what)

    def skip(self, check: str, why: str) -> None:
        self.reasons.setdefault(check, Counter())[why] += 1


class SiteWatch:
    """Stands at one runtime while a patch is watched."""

    def __init__(self, watching: Watching, runtime: Runtime):
        self.watching, self.runtime = watching, runtime
        self.record = Record()
        self.inside = False
        self.call: AttentionCall | None = None
        self.values: list[Value] = []
        self.groups: dict[int, Groups] = {}

    # ------------------------------------------------------------------ what hosts and contributions tell

    def wants(self) -> bool:
        return not self.inside and threading.get_ident() == self.watching.thread

    def told(self, call: AttentionCall) -> None:
        if self._mine():
            self.call = call

    def _mine(self) -> bool:
        return self.inside and threading.get_ident() == self.watching.thread

    def recorded(self, entry: Entry) -> Entry:
        """The same entry, whose contribution also tells what it returns."""
        own = entry.contribution
        if own.value is None or own.kind in BESIDE:
            return entry
        value = own.value

        def telling(call: AttentionCall, stats: Statistics, state: Any) -> Any:
            found = value(call, stats, state)
            if not self._mine():
                return found
            positions = getattr(call.layer, "positions", None)
            positions = positions.clone() if isinstance(positions, Tensor) else None
            told = Value(entry, call, stats, found, positions)
            self.values.append(told)
            if isinstance(found, RowEdit):
                return RowEdit(functools.partial(_edited, told, found.edit))
            return found

        more: dict[str, Any] = (
            {} if own.groups is None else {"groups": self._telling_groups(entry, own.groups)}
        )
        return dataclasses.replace(entry, contribution=dataclasses.replace(own, value=telling, **more))

    def _telling_groups(
        self, entry: Entry, groups: Callable[..., Groups | None]
    ) -> Callable[..., Groups | None]:
        def telling(call: AttentionCall, state: Any) -> Groups | None:
            found = groups(call, state)
            if found is not None and self._mine():
                self.groups[id(entry)] = found
            return found

        return telling

    # ------------------------------------------------------------------ a call

    def around(self, made: Made, proceed: Callable[[], Tensor]) -> Tensor:
        self.record.calls += 1
        updates = self.watching.updates_of(self.runtime.site.module)
        self.inside = True
        try:
            stock = self._stock(proceed) if self._fits_stock(updates) else None
            self.call, self.values, self.groups = None, [], {}
            out = proceed()
        finally:
            self.inside = False
        with torch.no_grad():
            try:
                self._check(made, out, stock, updates)
            except (Lost, TrainlessError) as error:
                self.record.skip("result", str(error))
            except torch.OutOfMemoryError:
                self.record.skip("result", "the whole matrix of a call does not fit into memory")
        return out

    def _fits_stock(self, updates: list[Update]) -> bool:
        """Whether the user's own attention can run on what this call brings: not where its cache has dropped keys."""
        return not any(isinstance(u.layer, CompressingLayer) and u.layer.evicted for u in updates)

    def _stock(self, proceed: Callable[[], Tensor]) -> Tensor:
        """What the user's own attention gives for the same call."""
        runtime = self.runtime
        plan, residual = runtime.plan, runtime.call.residual
        runtime.plan = AttentionPlan([])
        try:
            return proceed()
        finally:
            runtime.plan, runtime.call.residual = plan, residual

    def _check(self, made: Made, out: Tensor, stock: Tensor | None, updates: list[Update]) -> None:
        plan, record = self.runtime.plan, self.record
        if plan.inert:
            return
        if self.call is None and plan.constant is None:
            record.passed_over += 1
            if stock is not None and not torch.equal(stock, out):
                record.fail("result", "a call that is left alone differs from the model's own attention")
            return
        real = self._padding(made)
        history = self._layer(made, updates, real)
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
        form = [v for v in self.values if v.entry.contribution.kind == "form"]
        found = None
        if form:
            self._form(form[-1], out, published)
        else:
            found = self._dense(made, out, stock, history, published, real)
        if found is not None:
            self._statistics(found, history, real)
        self._cache(plan, history, found, real, made.query.dtype)

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

    def _read(self, made: Made, history: History | None, stock: Tensor | None) -> Asked | None:
        """The call in plain terms. A reading is trusted once it gives the model's own attention."""
        key, value = made.key, made.value
        if history is not None and history.key is not None and history.value is not None:
            key, value = history.key, history.value
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
            always = always or (own.kind == "pattern" and not own.dynamic)
            original = self.watching.originals.get(entry, entry)
            if always and own.constant is None and id(original) not in asked:
                self.record.fail("result", f"{entry.method} was not asked for its {own.kind}")

    def _published(self, plan: AttentionPlan, history: History | None, lk: int) -> Published:
        found = Published()
        for entry in plan.of["scale"]:
            if entry.contribution.constant is not None:
                found.factors.append(entry.contribution.constant)
        latest = {
            id(v.entry): v for v in self.values
        }  # a value that is asked for again is the one that counts
        for value in latest.values():
            own, given = value.entry.contribution, value.given
            if given is None:
                continue
            if own.kind == "scale":
                found.factors.append(given)
            elif own.kind == "pattern" and isinstance(given, Tokens):
                found.tokens.append(given)
            elif own.kind == "pattern" and isinstance(given, Pairs | Window2d):
                found.pairs.append(given)
            elif own.kind == "keys":
                found.extra.append(given)
            elif own.kind == "gain":
                found.gains.append((own.heads, given))
            elif own.kind == "mass" and isinstance(given, MassMove):
                found.moves.append((own.heads, _in_columns_of(given, value, history, lk)))
            elif own.kind == "mass" and isinstance(given, RowEdit) and value.blocks:
                blocks = sorted(value.blocks, key=lambda block: block[0])
                edited = torch.cat([after for _, _, after in blocks], 2)
                found.edits.append((own.heads, _in_columns(edited, value, history, own.heads, lk)))
        return found

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
            if value.call.query.dtype in (torch.float16, torch.bfloat16):
                slack = 0.1
            if (
                stats.column_mass is not None
                and stats.column_mass.shape[-1] == lk
                and value.positions is None
            ):
                want = (found.probabilities * rows[:, None, :, None]).sum(2)[:, heads]
                self._agrees("column mass", stats.column_mass[:, heads], want, slack, value)
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
                got = _in_columns(before, value, history, own.heads, lk)
                keep = rows[:, None, start : start + before.shape[2], None]
                self._agrees("probabilities", got * keep, want * keep, slack, value)

    def _agrees(self, what: str, got: Tensor, want: Tensor, slack: float, value: Value) -> None:
        gap = float((wide(got) - want).abs().max()) if want.numel() else 0.0
        if gap > slack * max(1.0, float(want.abs().max())):
            self.record.fail("result", f"{value.entry.method} was shown a {what} that is off by {gap:.2g}")

    # ------------------------------------------------------------------ facts of the call

    def _padding(self, made: Made) -> Tensor | None:
        """Which rows are real by the model's own input, bool (B, Lq), held against what methods were told."""
        mask, lq = self.watching.mask_of(self.runtime.site), made.query.shape[2]
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

    def _layer(self, made: Made, updates: list[Update], real: Tensor | None) -> History | None:
        """The history of the cache layer that methods keep something on; and whether it is the call's own."""
        plan, call, record = self.runtime.plan, self.call, self.record
        if call is None or not plan.needs_layer or call.layer is None:
            return None
        layer = call.layer
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
        history = self.watching.histories.setdefault(id(layer), History(layer))
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
        if layer.record_past or layer.lease.deferring:
            history.lose()
            record.skip(
                "kept", "the layer decides later: drafts may be taken back, or a prefill comes in parts"
            )
            return
        mass = None
        if isinstance(policy, Evict) and policy.score is not None:
            b, _, lq, _ = found.probabilities.shape
            rows = torch.ones(b, lq, dtype=torch.bool, device=found.lse.device) if real is None else real
            if policy.last:
                rows = rows & (rows.long().flip(1).cumsum(1).flip(1) <= policy.last)
            mass = found.probabilities * rows[:, None, :, None]
        chosen = None
        if plan.evictor is not None and policy is not None and policy.chosen:
            original = self.watching.originals.get(plan.evictor, plan.evictor)
            mine = [v for v in self.values if v.entry is original]
            if mine and mine[-1].given is not None:
                if mine[-1].positions is not None:
                    policy = None  # chosen among slots that have moved since
                    record.skip("kept", "a later choice is among what is left, and is taken as it is")
                else:
                    chosen = mine[-1].given
        slack = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.1)
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


def _edited(told: Value, edit: Callable[[Tensor, int], Tensor], p: Tensor, start: int) -> Tensor:
    before = p.detach().clone()
    after = edit(p, start)
    told.blocks.append((start, before, after.detach().clone()))
    return after


# ---------------------------------------------------------------- slots of a cache as columns of the sequence


def _in_columns_of(move: MassMove, value: Value, history: History | None, lk: int) -> MassMove:
    heads = value.entry.contribution.heads
    source = _in_columns(move.source, value, history, heads, lk)
    target = None if move.target is None else _in_columns(move.target, value, history, heads, lk)
    return dataclasses.replace(move, source=source, target=target)


def _in_columns(
    tensor: Tensor, value: Value, history: History | None, heads: tuple[int, ...] | None, lk: int
) -> Tensor:
    """(B, h, …, slots) to (B, h, …, T): what stands in a slot, in the column of the token that it holds."""
    if value.positions is None or history is None or history.of_head is None:
        return tensor
    b, h = tensor.shape[:2]
    mine = history.of_head if heads is None else history.of_head[list(heads)]
    positions = value.positions[:, mine] if h > 1 or len(mine) == 1 else value.positions[:, :1]
    columns = history._columns(positions).masked_fill(positions < 0, lk)
    shape = (*tensor.shape[:-1], tensor.shape[-1])
    index = columns.reshape(b, h, *[1] * (tensor.dim() - 3), columns.shape[-1]).expand(shape)
    wider = tensor.new_zeros(*tensor.shape[:-1], lk + 1)
    return wider.scatter(-1, index, tensor)[..., :lk]


# ---------------------------------------------------------------- all sites of a patch


class Watching:
    """All sites of a patch while they are watched, and the caches that its model uses meanwhile."""

    def __init__(self, runtimes: Iterable[Runtime], tops: Iterable[nn.Module]):
        self.thread = threading.get_ident()
        self.sites = {r.site.module: SiteWatch(self, r) for r in runtimes if r.site.kind == "attention"}
        self.tops = list(tops)
        self.originals: dict[Entry, Entry] = {}
        self.histories: dict[int, History] = {}
        self.masks: dict[str, Tensor | None] = {}
        self.current: list[nn.Module] = []
        self.pending: dict[nn.Module, list[Update]] = {}
        self.caches: list[Any] = []

    @contextmanager
    def on(self) -> Iterator[Watching]:
        handles = []
        entries = {watch: list(watch.runtime.entries) for watch in self.sites.values()}
        try:
            for module, watch in self.sites.items():
                told = [watch.recorded(e) for e in entries[watch]]
                self.originals |= dict(zip(told, entries[watch], strict=True))
                watch.runtime.entries = told
                watch.runtime.refresh()
                watch.runtime.watch = watch
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, always_call=True))
            handles += [
                t.register_forward_pre_hook(self._top, with_kwargs=True, prepend=True) for t in self.tops
            ]
            yield self
        finally:
            for watch, before in entries.items():
                watch.runtime.watch = None
                watch.runtime.entries = before
                watch.runtime.refresh()
            for handle in handles:
                handle.remove()
            for cache in self.caches:
                vars(cache).pop("update", None)

    # ------------------------------------------------------------------ masks that the model is given

    def _top(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self.thread:
            self.masks = {name: kwargs.get(name) for name in TOPS if isinstance(kwargs.get(name), Tensor)}

    def mask_of(self, site: Any) -> Tensor | None:
        """The two-dimensional mask (B, L) that the model was given for the sequence of this site, if it was."""
        if site.role != "self" or site.host != "transformers" or "vision" in site.parts:
            return None
        names: tuple[str, ...] = TOPS
        if "encoder" in site.parts and "decoder" not in site.parts:
            names = TOPS[:1]
        elif self.tops and any(
            getattr(getattr(t, "config", None), "is_encoder_decoder", False) for t in self.tops
        ):
            names = TOPS[1:]
        found = next((m for n in names if (m := self.masks.get(n)) is not None), None)
        return found if found is not None and found.dim() == 2 else None

    # ------------------------------------------------------------------ updates of caches

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self.thread:
            return
        self.current.append(module)
        self.pending[module] = []
        for given in (*kwargs.values(), *args):
            inner = (
                (given.self_attention_cache, given.cross_attention_cache)
                if isinstance(given, EncoderDecoderCache)
                else (given,)
            )
            for cache in inner:
                if isinstance(cache, Cache) and not any(c is cache for c in self.caches):
                    self.caches.append(cache)
                    cache.update = functools.partial(self._updated, cache, cache.update)  # type: ignore[method-assign]

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == self.thread and self.current and self.current[-1] is module:
            self.current.pop()

    def _updated(
        self,
        cache: Cache,
        update: Callable[..., Any],
        key: Tensor,
        value: Tensor,
        index: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if threading.get_ident() != self.thread or not self.current:
            return update(key, value, index, *args, **kwargs)
        layer = cache.layers[index] if index < len(cache.layers) else None
        history = self.histories.get(id(layer))
        if history is not None and history.stamp is not None:
            try:
                history.check_untouched()
            except Lost:
                history.stamp = None
        keys, values = update(key, value, index, *args, **kwargs)
        layer = cache.layers[index] if layer is None else layer
        self.pending[self.current[-1]].append(Update(layer, key, value, keys, values))
        return keys, values

    def updates_of(self, module: nn.Module) -> list[Update]:
        """The updates since the module's last attention call."""
        found = self.pending.get(module, [])
        self.pending[module] = []
        return found
