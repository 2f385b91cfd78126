"""One call of the attention interface as the engine's own, with what is known about it; or a refusal by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from ...cache import CompressingLayer, ExpandedLayer, Freezing, StatefulMixin, StaticStatefulMixin
from ...engine.runtime import Runtime
from ...errors import InputError, Unsupported
from ...kernels.visibility import visibility
from ...seams import AttentionCall
from .inputs import Noted, noted
from .sequences import surroundings
from .sites import HARMLESS, UNDERSTOOD
from .version import DummyLayer

PACKED = {"cu_seq_lens_q", "cu_seq_lens_k"}


def call_of(
    module: nn.Module,
    runtime: Runtime,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> AttentionCall:
    """The interface's arguments as an AttentionCall; refuses by name what would change the logits unseen."""
    for name, given in kwargs.items():
        if given is None or name in UNDERSTOOD or (name in HARMLESS and name not in PACKED):
            continue
        if name in PACKED and mask is None and query.shape[0] == 1 and _one_sequence(given):
            continue
        raise Unsupported(
            f"{runtime.site.name}: the model passes {name!r} to its attention, which "
            f"{'packs several sequences into one' if name in PACKED else 'no patch knows how to honour'}; "
            "remove the patch, or run without it"
        )
    if kwargs.get("cache") is not None:
        raise Unsupported(f"{runtime.site.name}: paged attention (continuous batching) cannot be patched")
    lq, lk = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    facts = runtime.facts
    around = noted(runtime)
    layer = _layer(module, runtime, query, key, value)
    _refuse_several(runtime, around, layer)
    if isinstance(layer, StaticStatefulMixin):
        # The slots that hold no token yet are nobody's, and no call of the engine is about them.
        lk = facts["past"] + lq
        key, value = key[:, :, :lk], value[:, :, :lk]
        mask = mask[..., :lk] if isinstance(mask, Tensor) else mask
        if facts.get("turn", 1) == 1:
            layer.fit(facts["past"], lk)
    if layer is None and lk != lq and (undeclared := runtime.site.facts.get("undeclared")):
        raise Unsupported(
            f"{runtime.site.name}: {undeclared} does not say whose keys it reads, and {lk} keys came for {lq} queries "
            "without a cache, so they are others'; set is_cross_attention = True on it, or leave it out by where"
        )
    # A 2-D mask marks padding and leaves causality to the flag; any other mask says everything itself.
    padding = isinstance(mask, Tensor) and mask.dim() == 2
    causal = causal and lq > 1 and (mask is None or padding)
    if causal and lk > lq and isinstance(layer, StaticLayer):
        key, value, lk = key[:, :, :lq], value[:, :, :lq], lq  # an empty static cache: only these are filled
    elif runtime.plan.of["pattern"] and lk > lq and isinstance(layer, StaticLayer) and facts["past"] == 0:
        # The same under a mask, for patterns, which are about the tokens that there are.
        if isinstance(mask, Tensor) and mask.dim() == 4:
            key, value, mask, lk = key[:, :, :lq], value[:, :, :lq], mask[..., :lq], lq
    if (
        isinstance(layer, Freezing)
        and layer.capacity is not None
        and isinstance(mask, Tensor)
        and mask.dim() == 4
    ):
        mask = mask[..., : facts["past"] + lq]  # it is as wide as the static cache whose place the layer took
    implementation = vars(module)["config"]._real._attn_implementation
    facts["same_bits"] = (
        implementation == "sdpa" and query.device.type == "cpu" and kwargs.get("position_bias") is None
    )
    facts["attentions"] = bool(around is not None and around.attentions and implementation in (None, "eager"))
    window = kwargs.get("sliding_window")
    # A compressed layer hands out fewer keys than the mask is about.
    held = facts["past"] + lq if isinstance(layer, CompressingLayer) else lk
    call = AttentionCall(
        query, key, value, mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal, dropout=dropout,
        position_bias=kwargs.get("position_bias"), softcap=kwargs.get("softcap"), sink_logits=kwargs.get("s_aux"),
        # A tensor mask already has the window in it.
        sliding_window=window if mask is None or padding else None,
        site=runtime.site, layer=layer, past=facts.get("past", 0),
        real=_real_rows(runtime, around, mask, query.shape[0], lq, held), facts=facts,
    )  # fmt: skip
    return _untiled(runtime, call)


def tell(runtime: Runtime, call: AttentionCall, entering: Tensor | None) -> None:
    """Put the facts that somebody asks for into ``call.facts``."""
    asks, facts = runtime.plan.asks, call.facts
    if "images" in asks:
        facts |= runtime.asked["images"].at(
            runtime.site, call.layer, call.past, call.query, call.key.shape[2]
        )
    if "residual" in asks:
        if entering is None:
            raise Unsupported(
                f"{runtime.site.name}: its attention was called outside its layer, so what enters the layer is "
                "not known; call the model"
            )
        facts["residual"] = entering
    if runtime.plan.layered:
        facts["layers"] = surroundings(runtime).states


# ---------------------------------------------------------------- the cache layer of the call


def _layer(module: nn.Module, runtime: Runtime, query: Tensor, key: Tensor, value: Tensor) -> Any:
    """The cache layer that belongs to the call, after what the plan relies on has been checked against the call."""
    facts, plan, site = runtime.facts, runtime.plan, runtime.site
    layer = facts.get("layer")
    lq, lk = query.shape[2], key.shape[2]
    if layer is None:
        if lk > lq and plan.needs_layer and site.role == "self":
            raise Unsupported(
                f"{plan.entries[0].method}: {site.name} attends to {lk - lq} tokens of a cache that the "
                "patch cannot see, so it cannot keep the state of the sequence; this way of caching is not supported"
            )
        return None
    if isinstance(layer, DummyLayer):
        _follow(runtime, layer, lq, lk)
        return layer
    if not (plan.needs_layer or isinstance(layer, CompressingLayer)):
        return layer
    turn = facts["turn"] = facts.get("turn", 0) + 1
    if turn > 1:
        if turn > site.facts.get("calls", 1) and plan.of["kv"]:
            raise Unsupported(
                f"{_first(runtime)}: {site.name} attends more than once to the keys of one update of its cache; "
                "this class is not supported"
            )
        # What the call does to the layer is done: what methods remember is all that is left of it.
        return SimpleNamespace(states=layer.states) if isinstance(layer, CompressingLayer) else layer
    if site.role == "self" and int(layer.get_seq_length()) != facts["past"] + lq:
        raise Unsupported(
            f"{_first(runtime)}: {site.name} did not put its {lq} tokens into the cache layer that the patch holds "
            "for it; this way of caching is not supported"
        )
    if isinstance(layer, CompressingLayer) and layer.active:
        _check_keys(module, runtime, layer, key, value)
    return layer


def _first(runtime: Runtime) -> str:
    return next(
        (e.method for e in runtime.plan.active if e.contribution.stateful or e in runtime.plan.of["kv"]), ""
    )


def _follow(runtime: Runtime, layer: Any, lq: int, lk: int) -> None:
    """A layer without keys of its own: what is remembered grows with the keys that it is given."""
    facts = runtime.facts
    facts["past"] = facts.pop("total", lk) - lq
    if not isinstance(layer, StatefulMixin):
        return
    if lk > facts["past"] + lq:
        raise Unsupported(
            f"{_first(runtime)}: {runtime.site.name} reads the layer of another in a static cache, which cannot carry "
            "the state of a sequence; use a dynamic cache (drop cache_implementation)"
        )
    if vars(layer).pop("untold", False) and facts["past"]:
        raise InputError(
            f"{_first(runtime)}: {runtime.site.name} reads {facts['past']} tokens that the patch never saw; "
            "start with an empty cache after patching"
        )
    layer.grow(lk - lq, lq)


def _check_keys(module: nn.Module, runtime: Runtime, layer: Any, key: Tensor, value: Tensor) -> None:
    """Whether the keys that are attended to come from those in the cache in the way that is declared.

    Most classes attend to the tensors of the cache themselves. Numbers are compared at the first call of a
    sequence only, and only where they are not.
    """
    held_key, held_value = layer.keys, layer.values
    if isinstance(layer, ExpandedLayer):
        assert layer.handed is not None
        held_key, held_value = layer.handed
    if key is held_key and value is held_value:
        return
    how, fresh = runtime.site.facts.get("keys", "same"), runtime.facts["past"] == 0
    hkv = held_key.shape[1]
    good = key.shape[2] == held_key.shape[2]
    if how in ("split", "read"):
        good = good and key.shape == held_key.shape and (not fresh or torch.equal(key, held_key))
        good = good and isinstance(layer, ExpandedLayer)
    elif how == "tiled":
        times = key.shape[1] // hkv
        good = good and key.shape == (key.shape[0], times * hkv, *held_key.shape[2:])
        good = good and (not fresh or torch.equal(key, held_key.repeat(1, times, 1, 1)))
    elif how == "latent":
        good = good and hkv == 1 and (not fresh or _expands(module, held_key, held_value, key, value))
    else:
        good = good and key.shape == held_key.shape and value.shape == held_value.shape
        good = good and (not fresh or (torch.equal(key, held_key) and torch.equal(value, held_value)))
    if not good:
        raise Unsupported(
            f"{_first(runtime)}: {type(module).__name__} at {runtime.site.name} does not attend to the keys that its "
            f"cache returned ({tuple(held_key.shape)} were kept, {tuple(key.shape)} are attended to), and what it "
            "makes of them is not known; this class is not supported"
        )


@torch.no_grad()
def _expands(module: Any, held_key: Tensor, held_value: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the last token's keys and values are what the module makes of its latents."""
    made = module.expand_kv(held_key[:, :, -1:], held_value[:, :, -1:])
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= 1e-2 * b.abs().max() + 1e-6)
        for a, b in zip(made, (key[:, :, -1:], value[:, :, -1:]), strict=True)
    )


def _untiled(runtime: Runtime, call: AttentionCall) -> AttentionCall:
    """Where a class repeats its heads as a whole, the call with each head once, and the query heads beside theirs."""
    if runtime.site.facts.get("keys") != "tiled" or not isinstance(call.layer, CompressingLayer):
        return call
    heads, hkv = call.query.shape[1], call.layer.keys.shape[1]
    order = torch.arange(heads).view(-1, hkv).t().reshape(-1).to(call.query.device)
    runtime.facts["order"] = order
    return replace(call, query=call.query[:, order], key=call.key[:, :hkv], value=call.value[:, :hkv])


# ---------------------------------------------------------------- which rows


def _refuse_several(runtime: Runtime, around: Noted | None, layer: Any) -> None:
    """Several prompts in one row: whoever looks over rows, or keeps anything of a sequence, takes them for one."""
    fresh = runtime.facts.get("past", 0) == 0
    for entry in runtime.plan.active:
        given = entry.contribution
        looks = given.stateful or given.lookahead or given.statistics or given.in_order
        if given.kind == "kv":
            looks = layer is not None
        if not (looks and (fresh or given.in_order)):
            continue
        if around is not None and around.several():
            if isinstance(around.custom, dict):
                raise Unsupported(
                    f"{entry.method}: the patched model was handed masks that a model around it has made, and which "
                    "tokens they hide for being padding cannot be told; patch the whole model instead"
                )
            raise Unsupported(
                f"{entry.method}: a row of this call holds several sequences (positions that start anew, or a mask "
                "that hides earlier tokens), and the method would take them for one; give each a row of its own"
            )
        return


def _real_rows(
    runtime: Runtime, around: Noted | None, mask: Any, batch: int, lq: int, lk: int
) -> Tensor | None:
    """(B, Lq) bool: which of this call's tokens are not padding; None: all."""
    if around is not None and "text" in runtime.site.parts and not isinstance(around.custom, dict):
        if around.custom is None or isinstance(around.custom, Tensor):
            return around.real(lq, batch)
    if mask is None or lk < lq:
        return None
    if not isinstance(mask, Tensor):
        real = _block_mask_diagonal(mask, lq, lk)
    elif mask.dim() == 2:
        real = mask[:, -lq:].bool()
    elif mask.dim() != 4 or mask.shape[-1] < lq:
        return None
    else:
        own = mask[..., -lq:]
        seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        real = seen.any(-2).any(1)
    return None if bool(real.all()) else real


def _block_mask_diagonal(mask: Any, lq: int, lk: int) -> Tensor:
    """Which tokens see themselves under a flex BlockMask, evaluated a block of rows at a time."""
    seen = visibility(mask, causal=False, lq=lq, lk=lk)
    found = []
    for start in range(0, lq, 128):
        rows = torch.arange(start, min(lq, start + 128), device=seen.device)
        own = (rows + lk - lq).expand(mask.shape[0], 1, -1).contiguous()
        block = seen.columns(own, rows)
        if block is None:
            return torch.ones(mask.shape[0], lq, dtype=torch.bool, device=seen.device)
        found.append(block[:, 0].diagonal(dim1=-2, dim2=-1))
    return torch.cat(found, 1)


def _one_sequence(bounds: Any) -> bool:
    return isinstance(bounds, Tensor) and bounds.numel() == 2
