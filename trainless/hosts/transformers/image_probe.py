"""Image probes for vision-language models: random pixels in the layout of a family's processor, and their prompt.

How a family is handed its images is declared by model type; how many placeholders they take is asked of the model's
own ``get_image_features``, and its forward checks that both agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..probes import SEED, STEPS, Draw, Probe

IMAGES = 2
MANY = 300  # placeholders of one image; with more a probe has one image only
WORDS = 12  # text tokens before an image, and after the last
Inputs = dict[str, Tensor]


def _side(vision: Any) -> tuple[int, int]:
    size = vision.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _square(config: Any, count: int, draw: Draw) -> Inputs:
    """(images, channels, rows, columns), as large as the tower says."""
    vision = config.vision_config
    return {"pixel_values": draw.normal(count, getattr(vision, "num_channels", 3), *_side(vision))}


def _listed(config: Any, count: int, draw: Draw) -> Inputs:
    """(rows of the batch, images, channels, rows, columns)."""
    return {name: value[None] for name, value in _square(config, count, draw).items()}


def _sized(config: Any, count: int, draw: Draw) -> Inputs:
    """Images with their sizes beside them."""
    size = torch.tensor([_side(config.vision_config)] * count, device=draw.device)
    return {**_square(config, count, draw), "image_sizes": size}


def _tiled(config: Any, count: int, draw: Draw) -> Inputs:
    """The whole image and its tiles, (images, 1 + tiles, channels, rows, columns), for the first of its grids."""
    vision = config.vision_config
    (rows, columns), (high, wide) = _side(vision), config.image_grid_pinpoints[0]
    tiles = 1 + (high // rows) * (wide // columns)
    pixels = draw.normal(count, tiles, getattr(vision, "num_channels", 3), rows, columns)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[high, wide]] * count, device=draw.device)}


def _patches(config: Any, count: int, draw: Draw) -> Inputs:
    """A row of numbers for each patch of all images, and the grid of each image: four merged patches on a side."""
    vision = config.vision_config
    side = 4 * vision.spatial_merge_size
    width = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, side, side]] * count, device=draw.device)
    return {"pixel_values": draw.normal(count * side * side, width), "image_grid_thw": grid}


LAYOUTS: Mapping[str, Callable[[Any, int, Draw], Inputs]] = {
    **dict.fromkeys(("llava", "vipllava", "paligemma", "gemma3", "internvl"), _square),
    **dict.fromkeys(("idefics3", "smolvlm"), _listed),
    **dict.fromkeys(("mistral3",), _sized),
    **dict.fromkeys(("llava_next", "llava_onevision"), _tiled),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _patches
    ),
}
PREFIX = {"paligemma"}  # their token types tell prompt from answer, and not images from text


def declared(model: PreTrainedModel) -> bool:
    return model.config.model_type in LAYOUTS and hasattr(model, "get_image_features")


@dataclass(frozen=True)
class Prompt:
    """One row of text with images in it, and what the model's first call needs beside the ids (1, L)."""

    ids: Tensor
    given: Inputs
    said: str  # how many tokens and images
    short: str
    draw: Draw

    @property
    def prefill(self) -> Inputs:
        return {**self.given, "attention_mask": torch.ones_like(self.ids)}


def with_images(model: PreTrainedModel, pool: Tensor) -> Probe | None:
    """One prompt with images between its text, then cached steps; None where its images cannot be made.

    pool: the ids that text may have.
    """
    prompt = prompt_with_images(model, pool)
    if prompt is None:
        return None
    more = prompt.draw.choice(pool, 1, STEPS)

    def run() -> list[Any]:
        from .probe import cached

        return cached(model, prompt.ids, more, prompt.prefill)

    return Probe(f"{prompt.said}, then {STEPS} cached steps", run, short=prompt.short)


def prompt_with_images(model: PreTrainedModel, pool: Tensor) -> Prompt | None:
    """Text with images between; None where its images cannot be made. pool: the ids that text may have."""
    config, takes = model.config, inspect.signature(type(model).forward).parameters
    if not declared(model):
        return None
    count = IMAGES
    size = _placeholders(model, LAYOUTS[config.model_type](config, 1, Draw(model)))
    if size is None:
        return None
    if size > MANY:
        count = 1
    draw = Draw(model, SEED + 2)
    given: dict[str, Any] = dict(LAYOUTS[config.model_type](config, count, draw))
    image = next(
        v for n in ("image_token_id", "image_token_index") if isinstance(v := getattr(config, n, None), int)
    )
    start = getattr(config, "vision_start_token_id", None)
    opening = [start] if isinstance(start, int) else []
    marks = torch.tensor([*opening, *[image] * size], device=draw.device)[None]
    pieces = [piece for _ in range(count) for piece in (draw.choice(pool, 1, WORDS), marks)]
    ids = torch.cat([*pieces, draw.choice(pool, 1, WORDS)], 1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            given[name] = torch.zeros_like(ids) if config.model_type in PREFIX else (ids == image).long()
    images = "an image" if count == 1 else f"{count} images"
    said = f"{ids.shape[1]} tokens with {images} of {size} among them"
    return Prompt(ids, given, said, f"{ids.shape[1]} with {images}", draw)


def _placeholders(model: Any, images: Inputs) -> int | None:
    """Tokens that take the features of one image; None where the model makes none of it."""
    try:
        found = model.get_image_features(**images)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return None
    features = getattr(found, "pooler_output", found)
    parts = [features] if isinstance(features, Tensor) else list(features)
    width = model.get_input_embeddings().weight.shape[1]
    if not parts or any(not isinstance(part, Tensor) or part.shape[-1] != width for part in parts):
        return None
    return sum(part.numel() for part in parts) // width
