"""Sees every attention call at the sites of a patch as the model made it, and holds what came out against ``dense``.

While it is on, contributions tell what they returned, cache updates tell what they were given, and each call is
computed anew. What is found goes into a record for each site.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..cache import CompressingLayer
from ..engine.runtime import Runtime
from ..engine.watching import Made
from ..errors import TrainlessError
from ..seams import BESIDE, AttentionCall, Entry, Groups, RowEdit, Statistics
from .caches import History, Lost, Update
from .heard import Heard, Record, Value
from .judging import Judge

# What models call the mask of their tokens.
TOPS = ("attention_mask", "decoder_attention_mask")


class SiteWatch:
    """Stands at one runtime while a patch is watched."""

    settles = traced = False

    def __init__(self, watching: Watching, runtime: Runtime):
        self.watching, self.runtime = watching, runtime
        self.record = Record()
        self.inside = False
        self.heard: Heard | None = None

    # ------------------------------------------------------------------ what hosts and contributions tell

    def wants(self) -> bool:
        return not self.inside and threading.get_ident() == self.watching.thread

    def told(self, call: AttentionCall) -> None:
        if self._mine() and self.heard is not None:
            self.heard.call = call

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
            if not self._mine() or self.heard is None:
                return found
            positions = getattr(call.layer, "positions", None)
            positions = positions.clone() if isinstance(positions, Tensor) else None
            told = Value(entry, call, stats, found, positions)
            self.heard.values.append(told)
            if isinstance(found, RowEdit):
                return RowEdit(functools.partial(_edited, told, found.edit))
            return found

        more: dict[str, Any] = (
            {} if own.groups is None else {"groups": self._telling_groups(entry, own.groups)}
        )
        return dataclasses.replace(entry, contribution=own.but(value=telling, **more))

    def _telling_groups(
        self, entry: Entry, groups: Callable[..., Groups | None]
    ) -> Callable[..., Groups | None]:
        def telling(call: AttentionCall, state: Any) -> Groups | None:
            found = groups(call, state)
            if found is not None and self._mine() and self.heard is not None:
                self.heard.groups[id(entry)] = found
            return found

        return telling

    # ------------------------------------------------------------------ a call

    def around(self, made: Made, proceed: Callable[[], Tensor], stock: Callable[[], Tensor]) -> Tensor:
        self.record.calls += 1
        module = self.runtime.site.module
        again = self.watching.last.get(module)
        heard = Heard(made, self.watching.updates_of(module), again)
        with torch.no_grad():
            own = stock() if self._fits_stock(made, heard.updates) else None
        self.inside, self.heard = True, heard
        try:
            out = proceed()
        finally:
            self.inside, self.heard = False, None
        watching = self.watching
        mask = watching.mask_of(self.runtime.site)
        judge = Judge(self.runtime, self.record, heard, watching.histories, watching.originals, mask)
        with torch.no_grad():
            try:
                judge.check(out, own)
            except (Lost, TrainlessError) as error:
                self.record.skip("result", str(error))
            except torch.OutOfMemoryError:
                self.record.skip("result", "the whole matrix of a call does not fit into memory")
        return out

    @staticmethod
    def _fits_stock(made: Made, updates: list[Update]) -> bool:
        """Whether the user's own attention can run on what this call brings: not where its cache has dropped keys, or
        hands out fewer than the static cache in whose place it stands."""
        mask = made.mask
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[3] not in (1, made.key.shape[2]):
            return False
        return not any(isinstance(u.layer, CompressingLayer) and u.layer.evicted for u in updates)


def _edited(told: Value, edit: Callable[[Tensor, int], Tensor], p: Tensor, start: int) -> Tensor:
    before = p.detach().clone()
    after = edit(p, start)
    told.blocks.append((start, before, after.detach().clone()))
    return after


# ---------------------------------------------------------------- all sites of a patch


class Watching:
    """All sites of a patch while they are watched, and the caches that its model uses meanwhile."""

    def __init__(self, runtimes: Iterable[Runtime], tops: Iterable[nn.Module]):
        self.thread = threading.get_ident()
        self.sites = {r.site.module: self._site(r) for r in runtimes if r.site.kind == "attention"}
        self.tops = list(tops)
        self.originals: dict[Entry, Entry] = {}
        self.histories: dict[int, History] = {}
        self.masks: dict[str, Tensor | None] = {}
        self.current: list[nn.Module] = []
        self.pending: dict[nn.Module, list[Update]] = {}
        self.last: dict[nn.Module, Update] = {}  # of the forward under way
        self.caches: list[Any] = []

    def _site(self, runtime: Runtime) -> SiteWatch:
        return SiteWatch(self, runtime)

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
        self.last.pop(module, None)
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
        made = Update(layer, key, value, keys, values)
        self.pending[self.current[-1]].append(made)
        self.last[self.current[-1]] = made
        return keys, values

    def updates_of(self, module: nn.Module) -> list[Update]:
        """The updates since the module's last attention call."""
        found = self.pending.get(module, [])
        self.pending[module] = []
        return found
