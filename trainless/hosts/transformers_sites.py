"""Finding the attention sites of a transformers model, and what is known about each before any call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import Unsupported
from ..seams import Site
from .transformers_contract import CACHE, REGISTRY, problem
from .transformers_images import missing_images, pretrained
from .transformers_version import takes_cache

CROSS = (
    "crossattention",
    "cross_attn",
    "cross_attention",
    "encdecattention",
    "encoder_attn",
    "multihead_attn",
)
Found = tuple[str, nn.Module, frozenset[str], str]  # name, module, parts, role


def find(model: nn.Module, family: str, prefix: str = "", parts: frozenset[str] = frozenset()) -> list[Site]:
    """Every attention module of ``model`` that dispatches through transformers' AttentionInterface.

    Raises Unsupported, naming the family, when the model has attention and none of it dispatches.
    """
    ancestors = pretrained(model)
    found: list[Found] = [
        (name, module, _parts(name, module, ancestors) | parts, _role(name, module))
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
    for module in model.modules():
        if "attention" in type(module).__name__.lower():
            raise Unsupported(
                f"{family}: {type(module).__name__} does not dispatch its attention through transformers' "
                "AttentionInterface, so no patch can reach it; this family is not supported"
            )


_dispatching: dict[type, bool] = {}


def dispatches(cls: type) -> bool:
    """Whether this class's own forward looks up its attention function by its own config."""
    if cls not in _dispatching:
        try:
            source = inspect.getsource(cls.forward)  # type: ignore[attr-defined]
        except (OSError, TypeError, AttributeError):
            source = ""
        _dispatching[cls] = (
            "ALL_ATTENTION_FUNCTIONS" in source and "self.config._attn_implementation" in source
        )
    return _dispatching[cls]


_comparing: dict[type, bool] = {}
COMPARED = re.compile(r"self\.config\._attn_implementation\s*(==|!=|in\b|not in\b)")


def _refusal(module: nn.Module) -> str | None:
    """Why no patch can stand here: the module computes something else for each implementation's name."""
    # GPT-2 looks at the name only to upcast, where it is configured to.
    if getattr(module, "reorder_and_upcast_attn", True) and _compares(type(module)):
        return (
            f"{type(module).__name__} computes something else for each name of an attention implementation, "
            "so it would not be the same under ours"
        )
    return None


def _compares(cls: type) -> bool:
    if cls not in _comparing:
        try:
            _comparing[cls] = COMPARED.search(inspect.getsource(cls)) is not None
        except (OSError, TypeError):
            _comparing[cls] = False
    return _comparing[cls]


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
    return (
        generating and "text" in site.parts and takes_cache(inspect.signature(site.module.forward).parameters)
    )


def _role(name: str, module: nn.Module) -> str:
    path = name.lower().split(".")[-3:]
    if getattr(module, "is_cross_attention", False) or any(c in part for part in path for c in CROSS):
        return "cross"
    return "self"


def _parts(name: str, module: nn.Module, ancestors: Mapping[str, PreTrainedModel]) -> frozenset[str]:
    """Which parts of the model a module belongs to, from its nearest pretrained ancestor and its path."""
    path = name.lower().split(".")
    around = [n for n in ancestors if n in ("", name) or name.startswith(f"{n}.")]
    owner = ancestors[max(around, key=len)] if around else None
    config = getattr(owner, "config", None)
    kind = f"{type(config).__name__} {getattr(owner, 'main_input_name', '')}".lower()
    vision = "pixel_values" in kind or "vision" in kind or any("vision" in p or p == "visual" for p in path)
    if "text_model" in path or "language_model" in path:
        vision = False
    encoder = "encoder" in path or not getattr(module, "is_causal", False)
    if "decoder" in path:
        encoder = False
    return frozenset({"vision" if vision else "text", "encoder" if encoder else "decoder"})


def _numbered(ancestors: Mapping[str, PreTrainedModel], found: list[Found], prefix: str) -> list[Site]:
    groups: dict[tuple[frozenset[str], str], int] = {}
    numbers: list[int] = []
    for _, module, parts, role in found:
        key = (parts, role)
        running = groups.get(key, 0)
        own = getattr(module, "layer_idx", None)
        numbers.append(own if isinstance(own, int) else running)
        groups[key] = running + 1
    sites = []
    for (name, module, parts, role), layer in zip(found, numbers, strict=True):
        count = max(n for n, f in zip(numbers, found, strict=True) if (f[2], f[3]) == (parts, role)) + 1
        heads, kv_heads, width = _head_counts(module)
        sites.append(
            Site(
                name=prefix + name, module=module, host="transformers", role=role, parts=parts, layer=layer,
                layers=count, causal=bool(getattr(module, "is_causal", False)), heads=heads, kv_heads=kv_heads,
                head_dim=width,
                facts={**_site_facts(module, layer), "no_images": missing_images(ancestors, name, parts)},
                refusal=_refusal(module),
            )
        )  # fmt: skip
    return sites


def _head_counts(module: nn.Module) -> tuple[int | None, int | None, int | None]:
    """(query heads, key/value heads, head width) as far as the module or its config says."""
    config = vars(module)["config"]

    def first(*names: str) -> int | None:
        for owner in (module, config):
            for name in names:
                value = getattr(owner, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    heads = first("num_attention_heads", "num_heads", "n_heads", "n_head")
    groups = getattr(module, "num_key_value_groups", None)
    kv = (
        heads // groups
        if heads and isinstance(groups, int) and groups
        else first("num_key_value_heads") or heads
    )
    width = first("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    return heads, kv, width


def _site_facts(module: nn.Module, layer: int) -> dict[str, Any]:
    config = vars(module)["config"]
    facts: dict[str, Any] = {"family": getattr(config, "model_type", "")}
    types = getattr(config, "layer_types", None)
    sliding = getattr(module, "sliding_window", None)
    if types and layer < len(types) and isinstance(types, list):
        facts["layer_type"] = types[layer]
        if types[layer] != "sliding_attention":
            sliding = None
    if sliding is None and not types:
        sliding = (
            getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        )
    facts["sliding_window"] = sliding
    facts["hidden_size"] = getattr(config, "hidden_size", None)
    facts["max_positions"] = getattr(config, "max_position_embeddings", None)
    if hasattr(module, "has_relative_attention_bias"):
        facts["position_bias"] = True
    shared = getattr(module, "is_kv_shared_layer", False)
    facts["shares_kv"] = bool(shared or getattr(module, "store_full_length_kv", False))
    return facts
