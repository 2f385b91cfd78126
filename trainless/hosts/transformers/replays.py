"""A prompt read a second time: the inputs of its call given again to the decoder that owns the layers, leaving no trace.

The second reading goes on from the cache in plain layers of its own, which take over the keys of the cache's and are
thrown away, so that there is nothing to crop: the cache, its counters and what methods remember never see it. At each
site the user's own attention runs, with the factors and gains that stand there.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ...cache import AppendingMixin, CompressingLayer, RaggedLayer, StatefulMixin, chosen_pairs
from ...edits.journal import AttributeEdit, HookEdit, Journal
from ...engine.replaying import pair_scores
from ...engine.runtime import ATTRIBUTE, Runtime
from ...errors import InputError, Unsupported
from ...kernels.visibility import bias_times
from ...seams import Contribution, Evict, Replay
from .inputs import cache_among, noted
from .uncompiled import uncompiled
from .version import CACHE_NAMES

PLACE = "_trainless_replays"
TOKENS = ("inputs_embeds", "input_ids")
# What a decoder may be given that is either repeated for the second reading or has no say in what it computes.
KNOWN = {
    *TOKENS,
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "cache_position",
    "use_cache",
    "return_dict",
}


class UnderWay(threading.local):
    """The second reading under way in this thread."""

    def __init__(self) -> None:
        self.reading: Reading | None = None


under_way = UnderWay()  # asked at every attention call, so without a function around it


def current() -> Reading | None:
    """The second reading that the call under way belongs to; None in all other calls."""
    return under_way.reading


@dataclass
class GivenPart:
    """What a decoder was given for one call, or one chunk, of a prompt."""

    name: str  # of TOKENS
    tokens: Tensor  # (B, L) or (B, L, D)
    positions: Tensor | None  # (…, B or 1, L)


class Reading:
    """One second reading: the tokens that are read now, and the scores of the pairs of every layer so far."""

    def __init__(
        self, rules: Mapping[int, tuple[Runtime, CompressingLayer]], real: Tensor | None, length: int
    ):
        self.rules, self.real, self.length = rules, real, length
        self.scores: dict[int, Tensor] = {}
        self.columns = self.exists = self.sinks = self.sunk = torch.empty(0)

    def attend(
        self, runtime: Runtime, own: Any, module: nn.Module, given: tuple[Tensor, ...], mask: Any,
        scaling: float | None, dropout: float, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """The user's own attention, and at a site of the rule the scores of this chunk's pairs."""
        query, key = given[:2]
        ready = runtime.prepared
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scaling, softcap, learned = scaling * ready.factor, kwargs.get("softcap"), kwargs.get("s_aux")
        if ready.factor != 1.0:
            if softcap is not None or learned is not None:
                raise Unsupported(
                    f"{runtime.site.name}: a prompt cannot be read again under a factor on soft-capped logits or learned "
                    "sinks; remove one of the two patches"
                )
            mask = bias_times(mask, ready.factor, query.shape[2], key.shape[2])
        rule = self.rules.get(id(runtime))
        if rule is not None:
            columns, exists, sinks, sunk = (
                t.to(query.device) for t in (self.columns, self.exists, self.sinks, self.sunk)
            )
            found = pair_scores(
                query, key, columns, exists, sinks, sunk, scale=scaling, softcap=softcap, sink_logits=learned
            )
            self._keep(id(runtime), found)
        out, weights = own(module, *given, mask, scaling=scaling, dropout=dropout, **kwargs)
        return ready.gained(out), weights

    def _keep(self, number: int, found: Tensor) -> None:
        b, hkv, _ = found.shape
        if number not in self.scores:
            self.scores[number] = found.new_zeros(b, hkv, self.length)
        exists = self.exists.to(found.device)[:, None].expand_as(found)
        columns = self.columns.to(found.device)[:, None].expand_as(found)
        scores = self.scores[number]
        # A token that does not exist stands in a column of another one, whose score is not to be touched.
        scores.scatter_reduce_(2, columns, found.masked_fill(~exists, 0), "amax")


class Replays:
    """Stands at the pretrained model that owns the layers of a decoder, for the sites in it whose rule asks for it."""

    def __init__(self, owner: PreTrainedModel):
        self.owner = owner
        self.names = list(inspect.signature(type(owner).forward).parameters)[1:]
        self.runtimes: list[Runtime] = []

    def after(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            _uncompiled(self, args, kwargs, output)
        else:
            self._after(args, kwargs, output)

    def _after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if current() is not None or not any(_replay(r) for r in self.runtimes):
            return
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        cache = cache_among((*kwargs.values(), *args, *values))
        waiting = [] if cache is None else self._waiting(cache)
        if not waiting:
            return
        assert cache is not None
        first = waiting[0][1]
        first.prompt.append(self._prompt(dict(zip(self.names, args, strict=False)) | kwargs))
        if not first.lease.deferring:
            self.finish(cache)

    def _waiting(self, cache: Cache) -> list[tuple[Runtime, CompressingLayer]]:
        found = []
        for runtime in self.runtimes:
            number = getattr(runtime.site.module, "layer_idx", None)
            if _replay(runtime) is None or not isinstance(number, int) or number >= len(cache.layers):
                continue
            layer = cache.layers[number]
            if (
                isinstance(layer, CompressingLayer)
                and layer.waits
                and layer.lease is runtime.prepared.evictor
            ):
                found.append((runtime, layer))
        return found

    def _prompt(self, given: dict[str, Any]) -> GivenPart:
        """What has to be given again of a call; Unsupported for what is not known to be repeatable."""
        method = self._method()
        strange = next(
            (n for n, v in given.items() if n not in KNOWN and not isinstance(v, (bool, int, float, str, type(None)))),
            None,
        )  # fmt: skip
        if strange is not None:
            raise Unsupported(
                f"{method}: {type(self.owner).__name__} was given {strange!r}, of which is not known whether it can be "
                "given again when the prompt is read a second time; leave it out, or remove the patch"
            )
        around = noted(self.runtimes[0])
        mask = given.get("attention_mask")
        handmade = around is not None and around.padding is None and around.handmade is not None
        if (around is None or handmade) and not (
            mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        ):
            raise Unsupported(
                f"{method}: a mask made by hand cannot be continued when the prompt is read a second time; give the 2-D "
                "mask of which tokens are padding, or none"
            )
        name = next((n for n in TOKENS if isinstance(given.get(n), Tensor)), None)
        if name is None:
            raise Unsupported(
                f"{method}: {type(self.owner).__name__} was given neither tokens nor embeddings"
            )
        positions = given.get("position_ids")
        return GivenPart(name, given[name].detach(), positions if isinstance(positions, Tensor) else None)

    def _method(self) -> str:
        return next(r.plan.evictor.method for r in self.runtimes if _replay(r) and r.plan.evictor is not None)

    # ------------------------------------------------------------------ the second reading

    @torch.no_grad()
    def finish(self, cache: Cache) -> None:
        """Read the prompt in ``cache`` a second time, and keep of it what that says; nothing where none waits."""
        waiting = self._waiting(cache)
        if not waiting:
            return
        first = waiting[0][1]
        parts, rule = first.prompt, first.policy
        first.prompt = []
        length, replay = first.seen, rule.replay
        assert replay is not None
        self._check(cache, parts, length)
        tokens = torch.cat([p.tokens for p in parts], 1)
        positions = None
        if all(p.positions is not None for p in parts):
            positions = torch.cat([p.positions for p in parts if p.positions is not None], -1)
        real = None if first.real is None else first.real.to(tokens.device)
        reading = Reading({id(r): (r, layer) for r, layer in waiting}, real, length)
        exists = (
            torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if real is None else real
        )
        assert isinstance(rule.sinks, int)
        sinks = rule.sinks
        with _reading(reading):
            for start in range(0, int(exists.sum(1).max()), replay.chunk):
                self._read(
                    reading, cache, parts[0].name, tokens, positions, exists, sinks, start, replay.chunk
                )
        self._choose(reading, sinks, replay)

    def _check(self, cache: Cache, parts: Sequence[GivenPart], length: int) -> None:
        method = self._method()
        if sum(p.tokens.shape[1] for p in parts) != length or len({p.name for p in parts}) > 1:
            raise Unsupported(
                f"{method}: this cache holds {length} tokens, and what was given for them is not known, so they cannot "
                "be read a second time; start a new cache"
            )
        if getattr(cache, "offloading", False):
            raise Unsupported(
                f"{method}: a prompt in an offloaded cache cannot be read a second time; use another cache"
            )
        for module in self.owner.modules():
            runtime = vars(module).get(ATTRIBUTE)
            if isinstance(runtime, Runtime):
                _refuse_company(method, runtime)

    def _read(
        self, reading: Reading, cache: Cache, name: str, tokens: Tensor, positions: Tensor | None, exists: Tensor,
        sinks: int, start: int, size: int,
    ) -> None:  # fmt: skip
        """Read the tokens ``start`` to ``start + size`` of each row, the row's paddings not counted."""
        number = exists.long().cumsum(1) - 1
        wanted = exists & (number >= start) & (number < start + size)
        width = int(wanted.sum(1).max())
        # Those of each row at the left, so that they follow the prompt at once, whatever a window counts.
        columns = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        there = wanted.gather(1, columns)
        early = exists & (number < sinks)
        most = int(early.sum(1).max())
        reading.columns, reading.exists = columns, there
        reading.sinks = early.int().argsort(dim=1, stable=True)[:, early.shape[1] - most :]
        reading.sunk = (early & ~wanted).gather(1, reading.sinks)
        wide = columns[..., None].expand(*columns.shape, tokens.shape[2]) if tokens.dim() == 3 else columns
        given: dict[str, Any] = {name: tokens.gather(1, wide), "use_cache": True}
        given[next(n for n in CACHE_NAMES if n in self.names)] = _beside(cache, self._method())
        if not bool(exists.all()):
            given["attention_mask"] = torch.cat([exists, there], 1).long()
        if positions is not None:
            given["position_ids"] = self._continued(positions, exists, columns, there)
        elif reading.length + width > self._limit() >= reading.length:
            self._too_long(reading.length + width)
        self.owner.forward(**given)

    def _continued(self, positions: Tensor, exists: Tensor, columns: Tensor, there: Tensor) -> Tensor:
        """Positions of a chunk that follow those of the prompt; of several axes those that turn keys go together."""
        b, length = exists.shape
        axes = positions.expand(*positions.shape[:-2], b, length).reshape(-1, b, length)
        # Four axes: the first numbers the tokens for masks, the others turn keys.
        groups = [axes[:1], axes[1:]] if axes.shape[0] == 4 else [axes]
        found, furthest = [], 0
        for group in groups:
            own = group.gather(2, columns[None].expand(group.shape[0], -1, -1))
            last = group.masked_fill(~exists, -1).amax((0, 2))
            first = own.masked_fill(~there, length + int(group.max())).amin((0, 2))
            moved = own - first[:, None] + last[:, None] + 1
            found.append(torch.where(there, moved, 1))
            furthest = max(furthest, int(found[-1].max()) + 1)
        if furthest > self._limit() > int(axes.max()):
            self._too_long(furthest)
        return torch.cat(found).reshape(*positions.shape[:-2], b, -1)

    def _limit(self) -> int:
        found = [r.site.facts.get("max_positions") for r in self.runtimes]
        return min((n for n in found if isinstance(n, int)), default=1 << 62)

    def _too_long(self, reached: int) -> None:
        raise InputError(
            f"{self._method()}: reading the prompt a second time reaches position {reached}, and the model was made for "
            f"{self._limit()}; make chunk smaller, or the prompt shorter"
        )

    def _choose(self, reading: Reading, sinks: int, replay: Replay) -> None:
        rules = [(n, *rule) for n, rule in reading.rules.items()]
        unread = next((r.site.name for n, r, _ in rules if n not in reading.scores), None)
        if unread is not None:
            raise Unsupported(
                f"{self._method()}: {unread} was not called when the prompt was read a second time"
            )
        capacity = rules[0][2].policy.capacity
        assert isinstance(capacity, float)
        kept = chosen_pairs(
            [reading.scores.pop(n) for n, _, _ in rules],
            reading.real,
            capacity,
            sinks,
            replay.among,
            replay.floor,
        )
        for (_, runtime, layer), keep in zip(rules, kept, strict=True):
            acted = layer.keep_pairs(keep.to(layer.keys.device))
            if isinstance(layer, RaggedLayer):
                layer.freeze_heads()
            with runtime.counting:
                for owner in acted:
                    runtime.tallies[owner].acted += 1
            for entry in runtime.plan.of["kv"]:
                runtime.tallies[entry.owner].hold(layer)  # type: ignore[index]


_uncompiled = uncompiled(Replays._after)


def asked(given: Contribution) -> bool:
    """Whether a contribution has prompts read a second time."""
    return isinstance(given.policy, Evict) and given.policy.replay is not None and not given.inert


def _replay(runtime: Runtime) -> Replay | None:
    rule = runtime.plan.evict
    return None if rule is None else rule.replay


def _refuse_company(method: str, runtime: Runtime) -> None:
    """What stands elsewhere in the model must have no say in a second reading, or one that is a number."""
    for entry in runtime.plan.active:
        given = entry.contribution
        if given.kind in ("weights", "input", "logits") or getattr(given, "constant", None) is not None:
            continue
        if given.kind == "around" and given.scope == "call":
            continue
        if given.kind == "kv" and (_replay(runtime) is not None or entry is runtime.plan.quantiser):
            if entry is not runtime.plan.quantiser or _replay(runtime) is not None:
                continue
        raise Unsupported(
            f"{method} and {entry.method} at {runtime.site.name}: the prompt is read a second time, in which "
            f"{entry.method} would act once more; use one of them"
        )


def _beside(cache: Cache, method: str) -> Cache:
    """A cache that goes on from ``cache`` and leaves it as it is."""
    # Who listens to a cache's updates stands on the instance, and what was copied would go on to the cache itself.
    made = _bare(cache)
    made.layers = []
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        kind = type(layer).__bases__[1] if isinstance(layer, StatefulMixin | AppendingMixin) else type(layer)
        if isinstance(layer, CompressingLayer) or kind is DynamicLayer:
            plain = DynamicLayer()
            if isinstance(layer.keys, Tensor):
                plain.lazy_initialization(layer.keys, layer.values)
                plain.keys, plain.values = layer.keys, layer.values
        elif type(layer) is DynamicSlidingWindowLayer:
            plain = _bare(layer)
        else:
            raise Unsupported(
                f"{method}: cache layer {number} is a {kind.__name__}, from which a prompt cannot be read a second time; "
                "give the model a dynamic cache of its own config, or none"
            )
        made.layers.append(plain)
    return made


def _bare(held: Any) -> Any:
    """A shallow copy without what somebody has hung on the object in the place of its own methods."""
    made = copy.copy(held)
    for name in [n for n in vars(made) if callable(getattr(type(made), n, None))]:
        del vars(made)[name]
    return made


@contextlib.contextmanager
def _reading(reading: Reading) -> Iterator[None]:
    under_way.reading = reading
    try:
        yield
    finally:
        under_way.reading = None


def watch(runtime: Runtime, model: nn.Module, station: Journal) -> None:
    """Put a Replays at the pretrained model nearest around the site, into ``station``, where there is none yet."""
    reason = runtime.site.facts.get("no_replay", "how its prompt could be read a second time is not known")
    if reason is not None:
        raise Unsupported(f"{runtime.site.name}: {reason}")
    name = next(n for n, m in model.named_modules() if m is runtime.site.module)
    around = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    place, owner = max(
        (one for one in around if one[0] == "" or name.startswith(f"{one[0]}.")), key=lambda one: len(one[0])
    )
    own = f"{PLACE}_{id(station):x}"
    replays = vars(owner).get(own)
    if replays is None:
        replays, where = Replays(owner), place or "model"
        station.add(AttributeEdit(owner, own, replays, f"{where}.{own}"))
        hook = replays.after
        station.add(
            HookEdit(
                owner, lambda: owner.register_forward_hook(hook, with_kwargs=True), f"forward hook on {where}"
            )
        )
    if all(one is not runtime for one in replays.runtimes):
        replays.runtimes.append(runtime)
    runtime.asked["replay"] = replays
