"""Finding the attention sites of a transformers model, and what is known about each before any call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import Unsupported
from ...seams import Site
from .contract import CACHE, REGISTRY, problem
from .cross import assumed, merged
from .dispatch import compares, dispatches, passes, unmatched
from .families import Family, family_of
from .images import missing_images, pretrained
from .layers import Held, Layers
from .parts import ModelParts, keeps

Found = tuple[str, nn.Module, frozenset[str], str]  # name, module, parts, role
# Arguments of the interface that do not change the logits. Anything else that is set is refused by name.
HARMLESS = {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch", "deterministic",
    "labels", "logits_to_keep", "token_type_ids", "mm_token_type_ids", "attention_mask", "position_embeddings",
    "output_router_logits",
}  # fmt: skip
# Arguments that the engine knows the meaning of.
UNDERSTOOD = {"position_bias", "softcap", "s_aux", "sliding_window", "is_causal", "cache"}
# Always in the call, and without a value where the model's own mask says the same.
AT_TIMES = {"indices", "block_indices", "scaling", "dropout"}


def find(model: nn.Module, family: str, prefix: str = "", parts: frozenset[str] = frozenset()) -> list[Site]:
    """Every attention module of ``model`` that dispatches through transformers' AttentionInterface.

    Raises Unsupported, naming the family, when the model has attention and none of it dispatches.
    """
    ancestors = pretrained(model)
    known = ModelParts(ancestors)
    found: list[Found] = [
        (name, module, known.of(name, module) | parts, known.role(name, module))
        for name, module in model.named_modules()
        if dispatches(type(module)) and "config" in vars(module)
    ]
    if not found:
        _refuse(model, family)
    if broken := problem(REGISTRY):
        raise Unsupported(f"{family}: {broken}; use a tested version")
    sites = _numbered(ancestors, found, prefix)
    for site in sites:
        site.facts["caches"] = _caches(site, ancestors, prefix)  # type: ignore[index]
        site.facts["no_cache_layer"] = problem(CACHE)  # type: ignore[index]
    return sites


def _refuse(model: nn.Module, family: str) -> None:
    for name in unmatched(model):
        raise Unsupported(
            f"{family}: {name} does not dispatch its attention through transformers' "
            "AttentionInterface, so no patch can reach it; this family is not supported"
        )


def _refusal(module: nn.Module) -> str | None:
    """Why no patch can stand here: the module computes what ours would not."""
    cls = type(module)
    if merged(module):
        return (
            f"{cls.__name__} reads its own keys and the encoder's in one softmax, which no patch tells apart"
        )
    # GPT-2 looks at the name only to upcast, where it is configured to.
    if getattr(module, "reorder_and_upcast_attn", True) and compares(cls):
        return (
            f"{cls.__name__} computes something else for each name of an attention implementation, "
            "so it would not be the same under ours"
        )
    strange = passes(cls) - HARMLESS - UNDERSTOOD - AT_TIMES
    if strange:
        return f"{cls.__name__} passes {sorted(strange)[0]!r} to its attention, which no patch knows how to honour"
    return None


def _caches(site: Site, ancestors: Mapping[str, PreTrainedModel], prefix: str) -> bool:
    """Whether generating keeps this site's keys: decoders do, and prefix language models (PaliGemma), which read
    their prompt without causality and then go on token by token."""
    if site.causal or site.role != "self":
        return site.causal
    name = site.name.removeprefix(prefix)
    around = [m for n, m in ancestors.items() if n == "" or name.startswith(f"{n}.")]
    generating = any(
        isinstance(m, PreTrainedModel)
        and m.can_generate()
        and not getattr(m.config, "is_encoder_decoder", False)
        for m in around
    )
    return generating and {"text", "decoder"} <= site.parts and keeps(site.module)


def _numbered(ancestors: Mapping[str, PreTrainedModel], found: list[Found], prefix: str) -> list[Site]:
    groups: dict[tuple[frozenset[str], str], int] = {}
    numbers: list[int] = []
    for _, module, parts, kind in found:
        key = (parts, kind)
        running = groups.get(key, 0)
        own = getattr(module, "layer_idx", None)
        # Blocks that stand at several depths have no number of their own, or a negative one.
        numbers.append(own if isinstance(own, int) and own >= 0 else running)
        groups[key] = running + 1
    caches = Layers(ancestors)
    sites = []
    for (name, module, parts, kind), layer in zip(found, numbers, strict=True):
        count = max(n for n, f in zip(numbers, found, strict=True) if (f[2], f[3]) == (parts, kind)) + 1
        heads, kv_heads, width = _head_counts(module)
        held = caches.of(name, module) if "decoder" in parts and kind == "self" else Held()
        facts = {**_site_facts(module, layer, held), "no_images": missing_images(ancestors, name, parts)}
        if "decoder" in parts and kind == "self":
            facts["no_replay"] = caches.no_replay(name, family_of(module).keys)
            if facts["depths"] > 1 or facts["calls"] > 1:
                facts["no_replay"] = "the layer attends more than once for each token"
        if kind == "self" and assumed(module):
            facts["undeclared"] = type(module).__name__
        facts["cache_shape"] = _cache_shape(module, family_of(module), kv_heads, width)
        sites.append(
            Site(
                name=prefix + name, module=module, host="transformers", role=kind, parts=parts, layer=layer,
                layers=count, causal=bool(getattr(module, "is_causal", False)), heads=heads, kv_heads=kv_heads,
                head_dim=width, facts=facts, refusal=_refusal(module),
            )
        )  # fmt: skip
    return sites


def _head_counts(module: nn.Module) -> tuple[int | None, int | None, int | None]:
    """(query heads, key/value heads, head width) as far as the module or its config says."""
    config = vars(module)["config"]

    def first(*names: str) -> int | None:
        for owner in (module, config):
            for name in names:
                value = _told(owner, name)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    heads = first("num_attention_heads", "num_heads", "n_heads", "n_head")
    groups = getattr(module, "num_key_value_groups", None)
    own = getattr(module, "num_key_value_heads", None)
    if isinstance(own, int):
        kv: int | None = own
    elif heads and isinstance(groups, int) and groups:
        kv = heads // groups
    else:
        kv = first("num_key_value_heads") or heads
    width = first("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    return heads, kv, width


def _cache_shape(
    module: nn.Module, family: Family, kv_heads: int | None, width: int | None
) -> tuple[int, int, int] | None:
    """(heads, width of a key, width of a value) in the cache, as far as the module says."""
    if family.keys == "latent":
        rank, turned = getattr(module, "kv_lora_rank", None), getattr(module, "qk_rope_head_dim", None)
        return (1, rank, turned) if isinstance(rank, int) and isinstance(turned, int) else None
    if kv_heads is None or width is None:
        return None
    key, value = (_projected(module, name, kv_heads) for name in ("k_proj", "v_proj"))
    own = getattr(module, "v_head_dim", None)
    return kv_heads, key or width, value or (own if isinstance(own, int) else key or width)


def _projected(module: nn.Module, name: str, heads: int) -> int | None:
    """Width of a head by the size of what projects to it; None where that is another layer than a plain one."""
    size = getattr(getattr(module, name, None), "out_features", None)
    return size // heads if isinstance(size, int) and size % heads == 0 else None


def _told(owner: Any, name: str) -> Any:
    """An attribute, None where there is none, and where a config of unequal layers has one for each of them."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def _site_facts(module: nn.Module, layer: int, held: Held) -> dict[str, Any]:
    config = vars(module)["config"]
    facts: dict[str, Any] = {"family": _told(config, "model_type") or ""}
    types = _told(config, "layer_types")
    sliding = getattr(module, "sliding_window", None)
    if types and layer < len(types) and isinstance(types, list):
        facts["layer_type"] = types[layer]
        if types[layer] != "sliding_attention":
            sliding = None
    if sliding is None and not types:
        sliding = (
            _told(config, "sliding_window") if _told(config, "use_sliding_window") is not False else None
        )
    facts["sliding_window"] = held.window if held.kinds else sliding
    if held.window is not None:
        facts["window_held"] = held.window - 1  # between calls, for the next token
    facts["hidden_size"] = _told(config, "hidden_size")
    facts["max_positions"] = _told(config, "max_position_embeddings")
    if hasattr(module, "has_relative_attention_bias") or "position_bias" in passes(type(module)):
        facts["position_bias"] = True
    shared = getattr(module, "is_kv_shared_layer", False)
    # From 5.24 on the last layer of each kind stores its keys for a drafter where no layer reads them.
    facts["shares_kv"] = bool(shared or getattr(module, "store_full_length_kv", False))
    family = family_of(module)
    chunked = str(facts.get("layer_type")) == "chunked_attention"
    facts |= {
        "keys": family.keys, "calls": family.calls, "no_evict": family.no_evict,
        "no_kv": family.no_kv or held.no_kv(chunked), "no_state": family.no_state or held.no_state,
        "no_residual": family.no_residual, "borrows": held.borrows, "depths": held.depths,
        "static_layers": held.static,
    }  # fmt: skip
    return facts
