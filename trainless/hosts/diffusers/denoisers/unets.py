"""UNets: what the tokens of each of their attention layers are, on which level, and how many an image has there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .latents import length, tensor
from .words import (
    CROSS,
    FRAMES,
    IMAGE,
    JOINT,
    OBJECTS,
    Geometry,
    Given,
    Part,
    Sequence,
    Size,
    Unknown,
    product,
)

OVER_FRAMES = {
    "temp_attentions", "motion_modules", "temporal_transformer_blocks", "transformer_in",
    "image_latents_temporal_encoder",
}  # fmt: skip
IN_BLOCKS = {"down_blocks", "mid_block", "up_blocks"}
# Names of layers as UNets have them, and what they hold.
_FIRST = "down_blocks.0.attentions.0.transformer_blocks.0"
BLOCKS = {f"{_FIRST}.attn1": IMAGE, f"{_FIRST}.attn2": CROSS}
WITH_FRAMES = {**BLOCKS, "down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1": FRAMES}


def halved(size: Size, times: int, floor: bool = False) -> Size:
    """``size`` after ``times`` downsamplers: a strided convolution with padding rounds up, a pool down."""
    rows, columns = size
    for _ in range(times):
        rows, columns = (rows // 2, columns // 2) if floor else (-(-rows // 2), -(-columns // 2))
    return max(rows, 1), max(columns, 1)


# ---------------------------------------------------------------- which layer is what, and where


def kind_of(model: Any, name: str, module: nn.Module) -> str | None:
    path = name.split(".")
    crossed = getattr(module, "is_cross_attention", False)
    if OVER_FRAMES & set(path):
        return CROSS if crossed else FRAMES
    if path[0] not in IN_BLOCKS:
        return CROSS  # what condenses an image prompt, before the blocks
    if "fuser" in path:
        return OBJECTS
    if getattr(module, "added_kv_proj_dim", None) is not None:
        # Text has projections of its own here; its keys stand before the image's unless they are alone.
        return CROSS if getattr(module, "only_cross_attention", False) else JOINT
    return CROSS if crossed else IMAGE


def nested_kind(model: Any, name: str, module: nn.Module) -> str | None:
    """The same in models that hold several ControlNets, as ``nets.0`` and so on."""
    return kind_of(model, ".".join(name.split(".")[2:]), module)


class Levels:
    """How often the latent has been halved where a module of a UNet sits, read off its blocks.

    ``known`` is False for models without the usual down blocks; ``deepest`` is the last level.
    """

    def __init__(self, model: nn.Module):
        down: list[Any] = list(getattr(model, "down_blocks", None) or ())
        up: list[Any] = list(getattr(model, "up_blocks", None) or ())
        self.known = any(hasattr(block, "downsamplers") for block in down)
        steps = [bool(getattr(block, "downsamplers", None)) for block in down]
        self.down = [sum(steps[:i]) for i in range(len(steps))]
        self.deepest = sum(steps)
        rises = [bool(getattr(block, "upsamplers", None)) for block in up]
        self.up = [self.deepest - sum(rises[:i]) for i in range(len(rises))]

    def __call__(self, name: str) -> int | None:
        """Level of the module called ``name``, 0 at full size; None when it is not in a block."""
        head, *rest = name.split(".")
        if not self.known:
            return None
        if head == "mid_block":
            return self.deepest
        levels = {"down_blocks": self.down, "up_blocks": self.up}.get(head)
        return levels[int(rest[0])] if levels is not None and rest and rest[0].isdigit() else None


class Mirrored:
    """Levels of a UNet whose up blocks are its down blocks in reverse; ``steps``: how often each has been halved."""

    def __init__(self, steps: list[int]):
        self.steps, self.deepest = steps, max(steps, default=0)

    def __call__(self, name: str) -> int | None:
        head, *rest = name.split(".")
        if head not in ("down_blocks", "up_blocks"):
            return None
        return self.steps[int(rest[0])] if head == "down_blocks" else self.steps[-1 - int(rest[0])]


def kandinsky3_levels(model: Any) -> Callable[[str], int | None]:
    """Each down block halves at its end, each up block but the first doubles at its beginning."""
    return Mirrored(list(range(model.num_levels)))


def kandinsky3_kind(model: Any, name: str, module: nn.Module) -> str | None:
    """The first attention of a block sees the image, the others the text, whatever the width of their keys."""
    path = name.split(".")
    return IMAGE if path[2:4] == ["attentions", "0"] else CROSS


def cascade_levels(model: Any) -> Callable[[str], int | None]:
    """A level is halved unless ``switch_level`` says that it is not."""
    count = len(model.config.block_out_channels)
    halves = model.config.switch_level or [True] * (count - 1)
    return Mirrored([sum(map(bool, halves[:i])) for i in range(count)])


def cascade_kind(model: Any, name: str, module: nn.Module) -> str | None:
    """The image's keys stand before those of the prompt, in blocks that have them."""
    block = model.get_submodule(name.rpartition(".")[0])
    return JOINT if block.self_attn else CROSS


# ---------------------------------------------------------------- what a call says


def _pyramid(sample: Size, words: int, boxes: int, text_first: bool, before: int = 1) -> Geometry:
    """Sequences at each level of a latent ``sample``, whose sides are divided by ``before`` first."""

    def at(level: int, floor: bool) -> Callable[[Size], Size]:
        return lambda size: halved((size[0] // before, size[1] // before), level, floor)

    def sequences(kind: str, level: int) -> tuple[Sequence, ...]:
        found = []
        for floor in (False, True):
            grid = at(level, floor)(sample)
            image, text = Part(IMAGE, product(grid)), Part("text", words, rows=False)
            parts = {
                IMAGE: (image,),
                JOINT: (text, image) if text_first else (image, text),
                OBJECTS: (image, Part("boxes", boxes)),
            }
            if kind in parts:
                found.append(Sequence(parts[kind], grid, at=at(level, floor)))
        return tuple(found)

    return Geometry(sample, pyramid=sequences)


def unet(model: Any, given: Given) -> Geometry:
    sample = tensor(given, "sample")
    if sample.dim() < 4:
        raise Unknown(f"sample is {sample.dim()}-D")
    boxes = (given.get("cross_attention_kwargs") or {}).get("gligen", {}).get("boxes")
    count = 0
    if boxes is not None:
        both = getattr(getattr(model, "position_net", None), "feature_type", "text-only") == "text-image"
        count = boxes.shape[1] * (1 + both)
    return _pyramid((sample.shape[-2], sample.shape[-1]), _words(model, given), count, text_first=True)


def _words(model: Any, given: Given) -> int:
    """Keys that text has beside the image's, in UNets that put them there; an image prompt's among them."""
    kind = getattr(model.config, "encoder_hid_dim_type", None)
    words = length(given, "encoder_hidden_states")
    images = getattr(getattr(model, "encoder_hid_proj", None), "num_image_text_embeds", 0)
    if kind == "image_proj":
        return int(images)
    return words + (int(images) if kind == "text_image_proj" else 0)


def stable_cascade(model: Any, given: Given) -> Geometry:
    sample = tensor(given, "sample")
    each = int(model.config.clip_seq)

    def embeds(name: str) -> int:
        value = given.get(name)
        return 0 if value is None else (value.shape[1] if value.dim() == 3 else 1)

    words = embeds("clip_text_pooled") * each
    if given.get("clip_text") is not None and given.get("clip_img") is not None:
        words += embeds("clip_text") + embeds("clip_img") * each
    size = (sample.shape[-2], sample.shape[-1])
    return _pyramid(size, words, 0, text_first=False, before=int(model.config.patch_size))
