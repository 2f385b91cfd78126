"""Probes for transformers models: random tokens with a prefill and cached steps, or random images."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import Unsupported
from ...seams import Site
from ..probes import SEED, STEPS, Decoding, Draw, Probe
from .image_probe import declared, with_images
from .step_probe import images, sequences
from .version import CACHE_NAME, cache_out, takes_cache

SPARE = 8  # positions that some models keep for themselves (offsets of the padding index)
MOST_LOGITS = 1 << 25  # elements; beyond that only the last rows of a prefill are kept


def probes(part: Any, sites: Sequence[Site], tokens: int) -> list[Probe]:
    model = next(m for m in part.module.modules() if isinstance(m, PreTrainedModel))
    takes = inspect.signature(type(model).forward).parameters
    text = model.main_input_name == "input_ids" and "input_ids" in takes
    seen = with_images(model, vocabulary(model.config)) if text and takes_cache(takes) else None
    if text and getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        return [_seq2seq(model, tokens)]
    if text and takes_cache(takes) and decodes(model):
        return [_decoder(model, takes, tokens), *([] if seen is None else [seen])]
    if seen is not None:
        return [seen]  # prompts without an image are not what it is made for
    if text and declared(model):
        raise _unknown(model)
    if text:
        return [_encoder(model, takes, tokens)]
    if model.main_input_name == "pixel_values" and _image_size(model.config) is not None:
        return [_vision(model)]
    raise _unknown(model)


def _unknown(model: PreTrainedModel) -> Unsupported:
    return Unsupported(
        f"what to feed a {type(model).__name__} (it takes {model.main_input_name}) is not known; "
        "give probe=, a dictionary of its inputs or a function of the model"
    )


def dense(part: Any, sites: Sequence[Site], tokens: int) -> list[Probe]:
    """The same, and for a decoder a batch whose shorter row is padded on the left."""
    found = probes(part, sites, tokens)
    model = next(m for m in part.module.modules() if isinstance(m, PreTrainedModel))
    takes = inspect.signature(type(model).forward).parameters
    if model.main_input_name == "input_ids" and "attention_mask" in takes and takes_cache(takes):
        if decodes(model) and not getattr(model.config, "is_encoder_decoder", False):
            found.append(_padded(model, tokens))
    return found


def decodings(part: Any, rule: Any, tokens: int) -> list[Decoding]:
    """What a decoder reads while its caches settle, with images too where it is known how it is given them."""
    model = next(m for m in part.module.modules() if isinstance(m, PreTrainedModel))
    takes = inspect.signature(type(model).forward).parameters
    encodes = getattr(model.config, "is_encoder_decoder", False)
    if model.main_input_name != "input_ids" or "input_ids" not in takes or not takes_cache(takes) or encodes:
        return []
    pool, found = vocabulary(model.config), []
    if decodes(model):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limit = limit - SPARE if isinstance(limit, int) and limit > SPARE else 1 << 30
        found = sequences(model, pool, rule, tokens, limit)
    return [*found, *images(model, pool)]


def _padded(model: PreTrainedModel, tokens: int) -> Probe:
    draw, pool = Draw(model, SEED + 1), vocabulary(model.config)
    length = _fitting(model.config, tokens)
    short = max(1, length // 3)
    ids, more = draw.choice(pool, 2, length), draw.choice(pool, 2, STEPS)
    mask = torch.ones(2, length + STEPS, dtype=torch.long, device=draw.device)
    mask[1, : length - short] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    numbered = "position_ids" in inspect.signature(type(model).forward).parameters

    def run() -> list[Any]:
        outputs, cache = [], None
        for start, stop in [(0, length), *((length + i, length + i + 1) for i in range(STEPS))]:
            given = {"input_ids": torch.cat([ids, more], 1)[:, start:stop], "attention_mask": mask[:, :stop]}
            if numbered:
                given["position_ids"] = places[:, start:stop]
            outputs.append(model(**given, **{CACHE_NAME: cache}, use_cache=True))
            cache = cache_out(outputs[-1])
        return outputs

    return Probe(f"2 rows, {short} and {length} long, padded on the left", run, short=f"2 × {length} tokens")


def decodes(model: PreTrainedModel) -> bool:
    return any(getattr(module, "is_causal", False) for module in model.modules() if "config" in vars(module))


def _decoder(model: PreTrainedModel, takes: Any, tokens: int) -> Probe:
    draw, pool = Draw(model), vocabulary(model.config)
    length = _fitting(model.config, tokens)
    ids, more = draw.choice(pool, 1, length), draw.choice(pool, 1, STEPS)
    keep: dict[str, Any] = {}
    if "logits_to_keep" in takes and length * len(pool) > MOST_LOGITS:
        keep["logits_to_keep"] = max(1, MOST_LOGITS // len(pool))

    def run() -> list[Any]:
        return cached(model, ids, more, keep)

    misses = frozenset({"vision"}) if hasattr(model.config, "vision_config") else frozenset[str]()
    return Probe(_named(length), run, misses, short=f"{length} tokens")


def cached(model: nn.Module, ids: Tensor, more: Tensor, prefill: dict[str, Any] | None = None) -> list[Any]:
    """A prefill of ``ids`` (B, L), then one step for each column of ``more`` (B, n); the outputs of all."""
    found = model(input_ids=ids, use_cache=True, **(prefill or {}))
    outputs, cache = [found], cache_out(found)
    for i in range(more.shape[1]):
        found = model(input_ids=more[:, i : i + 1], **{CACHE_NAME: cache}, use_cache=True)
        outputs.append(found)
    return outputs


def _seq2seq(model: PreTrainedModel, tokens: int) -> Probe:
    draw, pool = Draw(model), vocabulary(model.config)
    length = _fitting(model.config, tokens)
    source, ids, more = (draw.choice(pool, 1, n) for n in (length, length, STEPS))

    def run() -> list[Any]:
        found = model(input_ids=source, decoder_input_ids=ids, use_cache=True)
        outputs, cache = [found], cache_out(found)
        encoded = (found.encoder_last_hidden_state,)
        for i in range(STEPS):
            step = {"decoder_input_ids": more[:, i : i + 1], "encoder_outputs": encoded}
            outputs.append(model(**step, **{CACHE_NAME: cache}, use_cache=True))
        return outputs

    return Probe(f"{length} random source tokens; {_named(length)}", run, short=f"{length} tokens")


def _encoder(model: PreTrainedModel, takes: Any, tokens: int) -> Probe:
    draw, pool = Draw(model), vocabulary(model.config)
    length = _fitting(model.config, tokens)
    mask = torch.ones(2, length, dtype=torch.long, device=draw.device)
    mask[1, length - length // 4 :] = 0
    given: dict[str, Any] = {"input_ids": draw.choice(pool, 2, length), "attention_mask": mask}
    said = f"2 rows of random tokens, {length} and {length - length // 4} long"
    if "pixel_values" in takes and _image_size(getattr(model.config, "vision_config", None)) is not None:
        given["pixel_values"] = _pixels(draw, model.config.vision_config)
        said += "; 2 random images"
    return Probe(said, lambda: model(**given), short=f"2 × {length} tokens")


def _vision(model: PreTrainedModel) -> Probe:
    images = _pixels(Draw(model), model.config)
    size = f"{images.shape[2]}×{images.shape[3]}"
    return Probe(f"2 random images of {size}", lambda: model(pixel_values=images), short=f"2 images {size}")


def _pixels(draw: Draw, config: Any) -> Tensor:
    rows, columns = _image_size(config) or (0, 0)
    return draw.normal(2, getattr(config, "num_channels", 3), rows, columns)


def _image_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def vocabulary(config: Any) -> Tensor:
    """Token ids without those that the config gives a meaning: padding, image placeholders and the like."""
    text = config.get_text_config()
    special: set[int] = set()
    for name, value in {**vars(config), **vars(text)}.items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")) and value is not None:
            special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    ids = [i for i in range(int(text.vocab_size)) if i not in special]
    return torch.tensor(ids)


def _fitting(config: Any, tokens: int) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return tokens
    return max(2, min(tokens, limit - STEPS - SPARE))


def _named(length: int) -> str:
    return f"{length} random tokens, then {STEPS} cached steps"
