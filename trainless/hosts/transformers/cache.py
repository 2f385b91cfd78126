"""Cache layers and chunked prefill on the transformers host: what happens around an attention call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from ...cache import (
    CompressingLayer,
    ExpandedLayer,
    Freezing,
    PackedLayer,
    StatefulMixin,
    beside_recurrence,
    in_place,
    plain,
    stateful,
)
from ...edits.journal import mark
from ...engine.runtime import Runtime
from ...errors import InputError, Unsupported
from ...seams import AttentionPlan, Entry, Lease
from . import replays, traced
from .contract import GENERATE, problem
from .inputs import noted
from .layers import PLAIN, depths_of, index_of
from .outside import ASSISTED, refuse_unprepared
from .static import INSTEAD, evicting_kind, fixed_kind, refusal, settles
from .uncompiled import uncompiled
from .version import DummyLayer, cache_in, layers_of


def before(runtime: Runtime, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note which cache layer this call will use, replacing a stock layer that is still empty by ours."""
    if replays.current() is not None:
        return  # the cache of a second reading is nobody's
    if not torch.compiler.is_compiling():
        watch = runtime.watch
        if watch is None or not watch.traced or not traced.note(runtime, module, args, kwargs):
            _note_layer(runtime, module, args, kwargs)
    elif not traced.note(runtime, module, args, kwargs):
        _uncompiled(runtime, module, args, kwargs)


def _note_layer(runtime: Runtime, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    facts = runtime.facts
    facts.clear()
    runtime.call.step = traced.step(runtime, module, args, kwargs)
    if runtime.call.step is not None:
        return
    if any(kwargs.get(name) is not None for name in ("key_value_states", "encoder_hidden_states")):
        # The same class serves as self- and cross-attention; only the site's own role is patched.
        if runtime.site.role != "cross":
            facts["cross"] = True
            return
    around = noted(runtime)
    if around is not None:
        refuse_unprepared(runtime, around.generating)
    # By type, not by name: some families call it layer_past, or pass it by position.
    cache = next((a for a in (*kwargs.values(), *args) if isinstance(a, Cache | EncoderDecoderCache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.cross_attention_cache if runtime.site.role == "cross" else cache.self_attention_cache
    if not isinstance(cache, Cache):
        return
    index = index_of(module, kwargs)
    if index is None:
        return
    layer = _adopt(runtime, cache, index)
    if layer is None:
        return
    facts["layer"] = layer
    if isinstance(layer, DummyLayer):
        facts["total"] = int(cache.get_seq_length())  # the layer that it reads has these already
        return
    facts["past"] = int(layer.get_seq_length())
    if isinstance(layer, CompressingLayer):
        layer.expect(cache)
    drafts = around is not None and around.generating is not None and around.generating.option == ASSISTED
    drafts = drafts or getattr(layer, "record_past", False)
    if runtime.plan.lookahead and facts["past"] == 0 and drafts:
        raise Unsupported(
            f"{runtime.plan.lookahead[0].method}: its statistics look at the whole prompt, and the first call of "
            "assisted decoding brings a draft along with it; do without assisted decoding"
        )


_uncompiled = uncompiled(_note_layer)


def _adopt(runtime: Runtime, cache: Cache, index: int) -> Any:
    """The layer ``index`` of ``cache``, made ours if the plan needs that; None when the cache has no such layer."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        return None
    if runtime.plan.needs_layer:
        cache.layers[index] = _ours(runtime, plain(cache.layers[index]), index)
    return cache.layers[index]


def _ours(runtime: Runtime, layer: Any, index: int) -> Any:
    """The layer that this plan needs in place of ``layer``; refuses what holds tokens already."""
    plan = runtime.plan
    first = plan.quantiser or plan.evictor
    if isinstance(layer, StatefulMixin | CompressingLayer):
        _must_remember(plan, layer, index)
    if first is None:
        if isinstance(layer, StatefulMixin | CompressingLayer):
            return layer
        _refuse_static(runtime, type(layer), index)
        if not isinstance(layer, DummyLayer):
            _must_be_empty(plan.entries[0].method, layer, index)
            return stateful(layer)
        made = stateful(layer)
        made.untold = True  # how much of the sequence there is already, which its first call tells
        return made
    if isinstance(layer, CompressingLayer):
        mine: set[Any] = {e.owner for e in plan.of["kv"]}
        if mine <= layer.leases:
            return layer
        if layer.seen:
            evictor, packer = _owner(plan.evictor), _owner(plan.quantiser)
            if layer.rebind(evictor, packer, plan.evict, plan.quantise):
                return layer
            names = " and ".join(sorted({lease.name for lease in layer.leases}))
            stranger = next(e.method for e in plan.of["kv"] if e.owner not in layer.leases)
            raise Unsupported(
                f"{stranger}: this cache was filled under another patch ({names}); start a new cache"
            )
        return _compressing(runtime, layer)
    kind = type(layer).__bases__[1] if isinstance(layer, StatefulMixin) else type(layer)
    _refuse_static(runtime, kind, index)
    if kind not in PLAIN and kind is not StaticLayer:
        raise Unsupported(
            f"{first.method}: cache layer {index} is a {kind.__name__}, and only a plain dynamic layer can "
            f"{'evict' if plan.quantiser is None else 'be packed'}; give the model a dynamic cache of its own config "
            "(DynamicCache(config=model.config)), or none"
        )
    _must_be_empty(first.method, layer, index)
    return _compressing(runtime, layer)


def _refuse_static(runtime: Runtime, kind: type, index: int) -> None:
    if not issubclass(kind, StaticLayer):
        return
    reason = refusal(runtime.plan, runtime.site, kind)
    if reason is not None:
        plan = runtime.plan
        first = plan.quantiser or plan.evictor or plan.entries[0]
        raise Unsupported(f"{first.method}: layer {index} of this static cache: {reason}; {INSTEAD}")


def _compressing(runtime: Runtime, layer: Any) -> CompressingLayer:
    """An empty layer in place of ``layer`` that follows the rules of the plan."""
    plan = runtime.plan
    evictor, packer = _owner(plan.evictor), _owner(plan.quantiser)
    capacity = layer.max_cache_len if isinstance(layer, StaticLayer) else None
    if isinstance(layer, Freezing):
        capacity = layer.capacity
    settled = settles(plan, runtime.site, capacity)
    made: CompressingLayer
    if packer is None or plan.quantise is None:
        assert plan.evict is not None and evictor is not None
        kind = evicting_kind(plan.evict)
        made = kind(plan.evict, evictor, capacity) if settled else CompressingLayer(plan.evict, evictor)
    elif settled:
        made = fixed_kind(plan)(plan.quantise, packer, plan.evict, evictor, capacity)
    else:
        cls = PackedLayer if runtime.site.facts.get("keys", "same") == "same" else ExpandedLayer
        made = cls(plan.quantise, packer, plan.evict, evictor)
    return beside_recurrence(made, layer) if isinstance(layer, LinearAttentionCacheLayerMixin) else made


def _owner(entry: Entry | None) -> Lease | None:
    owner = entry.owner if entry is not None else None
    assert owner is None or isinstance(owner, Lease)
    return owner


def _must_remember(plan: AttentionPlan, layer: Any, index: int) -> None:
    """A method that goes on from what it remembers of a sequence was there from its first token on."""
    if not _seen(layer):
        return
    for entry in plan.active:
        if not entry.contribution.stateful:
            continue
        state, lease = layer.states.get(entry.method), _owner(entry)
        if state is None:
            _must_be_empty(entry.method, layer, index)
        elif state.owner is not lease:
            assert lease is not None
            if state.owner is None or state.owner.applied or state.owner.terms != lease.terms:
                raise Unsupported(
                    f"{entry.method}: this cache was filled under another patch ({entry.method} with other parameters); "
                    "start a new cache"
                )
            state.owner = lease


def _seen(layer: Any) -> int:
    """Tokens of the sequence so far; for a layer without keys of its own, whether anything was remembered."""
    return len(layer.states) if isinstance(layer, DummyLayer) else int(layer.get_seq_length())


def _must_be_empty(method: str, layer: Any, index: int) -> None:
    if _seen(layer):
        held = "" if isinstance(layer, DummyLayer) else f"{_seen(layer)} "
        raise InputError(
            f"{method}: cache layer {index} already holds {held}tokens that the patch never saw; "
            "start with an empty cache after patching (a prefix-tuning adapter fills it before every call, so use one of "
            "another kind: prompt tuning or LoRA)"
        )


def cache_wrapper(model: nn.Module, runtimes: Sequence[Runtime]) -> Callable[..., Any]:
    """``_prepare_cache_for_generation`` of this instance, which also gives patched layers their place in the cache.

    Assisted decoding tells the cache, before the first forward, that tokens may be taken back again; a
    layer that comes with the first call would not have heard of it.
    """
    original: Any = model._prepare_cache_for_generation

    @functools.wraps(original)
    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        compressing = [e for r in runtimes for e in (r.plan.evictor, r.plan.quantiser) if e is not None]
        if compressing and generation_config.use_cache is False:
            raise Unsupported(
                f"{compressing[0].method}: generate(use_cache=False) keeps no cache, so there is nothing to compress; "
                "pass use_cache=True (the model's own generation config may have it off), or remove the patch"
            )
        result = original(generation_config, model_kwargs, *args, **kwargs)
        cache = cache_in(model_kwargs)
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if not isinstance(cache, Cache):
            return result
        for runtime in runtimes:
            if runtime.site.role == "self" and runtime.plan.needs_layer:
                for index in depths_of(runtime.site.module, cache.layers):
                    _adopt(runtime, cache, index)
            elif runtime.site.role == "self" and runtime.prepared.numbers:
                _append_in_place(cache, depths_of(runtime.site.module, cache.layers))
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        return result

    vars(prepare)["runtimes"] = runtimes
    return mark(prepare)


def _append_in_place(cache: Cache, depths: Sequence[int]) -> None:
    """Give the layers of a call that is scaled only buffers with room: stock ones copy all they hold for every token."""
    if cache.offloading:
        return  # its layers come and go as tensors, which buffers would hold twice
    for index in depths:
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = in_place(layer)


def prefill_wrapper(model: nn.Module, runtimes: Sequence[Runtime]) -> Callable[..., Any]:
    """``_prefill`` of this instance, deferring eviction until the last chunk of a chunked prefill."""
    original: Any = model._prefill

    @functools.wraps(original)
    def prefill(
        input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.prefill_chunk_size is None:
            return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
        leases: list[Any] = []
        broken = problem(GENERATE) if any(runtime.plan.needs_layer for runtime in runtimes) else None
        if broken:
            raise Unsupported(f"prefill_chunk_size under a patch: {broken}; leave the option out")
        for runtime in runtimes:
            if runtime.plan.lookahead:
                raise Unsupported(
                    f"{runtime.plan.lookahead[0].method}: prefill_chunk_size would change its result, because its "
                    "statistics look at the whole prompt; drop the option, or choose running statistics where the "
                    "method has them"
                )
            leases += [e.owner for e in runtime.plan.of["kv"]]
        try:
            for lease in leases:
                lease.deferring = True
            outputs = original(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            for lease in leases:
                lease.deferring = False
        cache = cache_in(model_kwargs)
        for again in {id(found): found for r in runtimes if (found := r.asked.get("replay"))}.values():
            if isinstance(cache, Cache):
                again.finish(cache)
        for layer in layers_of(cache):
            if isinstance(layer, CompressingLayer):
                layer.settle()
        return outputs

    return mark(prefill)


def continuous_wrapper(method: str) -> Callable[[nn.Module, Sequence[Runtime]], Callable[..., Any]]:
    """Makes the wrapper of an entry into continuous batching, refused before it starts where a patch would act.

    Its requests are answered by a thread of its own, where an error at an attention call ends as an empty answer.
    """

    def wrapper(model: nn.Module, runtimes: Sequence[Runtime]) -> Callable[..., Any]:
        original: Any = getattr(model, method)

        @functools.wraps(original)
        def start(*args: Any, **kwargs: Any) -> Any:
            plans = [(*r.plan.active, *r.plan.of["logits"]) for r in runtimes]
            acting = next((entries[0].method for entries in plans if entries), None)
            if acting is not None:
                raise Unsupported(
                    f"{acting}: continuous batching ({method}) keeps its keys in pages of its own, which no patch can "
                    "reach; use generate(), or pause or remove the patch"
                )
            return original(*args, **kwargs)

        return mark(start)

    return wrapper
