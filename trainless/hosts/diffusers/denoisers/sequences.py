"""Denoisers that build one sequence of their own: several kinds of text, padding inside, rows that begin apart."""

from __future__ import annotations

from itertools import chain, groupby, islice, repeat
from math import prod
from typing import Any

import torch
from torch import Tensor

from .latents import grid_of, length, ordered, side, single_frame, tensor
from .packed import leading_image, once, shapes_of
from .words import IMAGE, JOINT, Geometry, Given, Part, Sequence, Size, Unknown, product

MULTIPLE = (
    32  # Z-Image pads image and text to multiples of so many tokens each, which attend and are attended to
)
PER_SLOT = 4  # Qwen-Image 2.1: tokens for each place that the prompt keeps for an image


def _sample(given: Given) -> Size:
    hidden = tensor(given, "hidden_states")
    if hidden.dim() != 4:
        raise Unknown(f"hidden_states are {hidden.dim()}-D, and this class is read with 4-D latents")
    return hidden.shape[-2], hidden.shape[-1]


def lumina2(model: Any, given: Given) -> Geometry:
    """Lumina 2: each row is its own words, the image, and padding up to the longest row."""
    sample = _sample(given)
    grid = grid_of(sample, side(model))
    mask = tensor(given, "encoder_attention_mask")
    words: list[int] = once(mask, lambda: mask.sum(1).tolist())
    parts = (Part("text", max(words)), Part(IMAGE, product(grid)))
    starts = torch.tensor(words) if len(set(words)) > 1 else None
    found = {IMAGE: (Sequence(parts[1:], grid),), JOINT: (Sequence(parts, grid, starts=starts),)}
    return Geometry(sample, found)


def z_image(model: Any, given: Given) -> Geometry:
    """Z-Image: image and text, each padded to a multiple of 32; shorter rows end in padding that nobody sees."""
    images, prompts = given.get("x"), given.get("cap_feats")
    if not images or not prompts or not all(isinstance(i, Tensor) for i in (*images, *prompts)):
        raise Unknown("this call mixes several images in a row (omni mode), whose places are not declared")
    if len({i.shape[1:] for i in images}) > 1:
        raise Unknown("the images of this batch are of different sizes")
    frames, rows, columns = images[0].shape[1:]
    single_frame(frames)
    patch = int(given.get("patch_size", 2))
    if (patch, patch) != z_image_patch(model):
        raise Unknown(
            f"the call chooses patches of {patch}, and this model is read with {z_image_patch(model)[0]}"
        )
    grid = (rows // patch, columns // patch)
    image: tuple[Part, ...] = (Part(IMAGE, product(grid)),)
    if pad := -product(grid) % MULTIPLE:
        image = (*image, Part("padding", pad))
    words = max(len(p) + -len(p) % MULTIPLE for p in prompts)
    joint = Sequence((*image, Part("text", words)), grid)
    return Geometry((rows, columns), {IMAGE: (Sequence(image, grid),), JOINT: (joint,)})


def z_image_patch(model: Any) -> Size:
    """The pipeline's; a model may have several, of which a call chooses one."""
    size = int(model.config.all_patch_size[0])
    return size, size


def omnigen(model: Any, given: Given) -> Geometry:
    """OmniGen: the prompt, pictures inside it included, a token for the time, the image."""
    sample = _sample(given)
    grid = grid_of(sample, side(model))
    ids = given.get("input_ids")
    words = ids.shape[1] if isinstance(ids, Tensor) else 0
    return ordered("text image", grid, words + 1, sample=sample)


def hidream(model: Any, given: Given) -> Geometry:
    """HiDream: the image, padded to the longest sequence unless it is square, then T5's text and Llama's twice."""
    hidden = tensor(given, "hidden_states")
    patch = side(model)
    if given.get("hidden_states_masks") is None:
        sample = _sample(given)
        grid = grid_of(sample, patch)
        tokens = product(grid) if sample[0] == sample[1] else int(model.max_seq)
    else:
        sizes = given.get("img_sizes")
        rows = sizes.tolist() if isinstance(sizes, Tensor) else [list(s) for s in sizes or ()]
        if not rows or any(row != rows[0] for row in rows):
            raise Unknown("the images of this batch are of different sizes (img_sizes)")
        grid, tokens = (int(rows[0][0]), int(rows[0][1])), hidden.shape[1]
        sample = grid[0] * patch[0], grid[1] * patch[1]
    words = length(given, "encoder_hidden_states_t5")
    words += 2 * length(given, "encoder_hidden_states_llama3", axis=2)
    padding = tokens - product(grid)
    beside = (Part("padding", padding),) if padding else ()
    return ordered("image text", grid, words, beside, sample=sample)


def ernie(model: Any, given: Given) -> Geometry:
    sample = _sample(given)
    return ordered("image text", grid_of(sample, side(model)), length(given, "text_bth"), sample=sample)


def ideogram4(model: Any, given: Given) -> Geometry:
    """Ideogram 4: ``indicator`` says of each token whether it is the image's; rows may begin apart."""
    from diffusers.models.transformers.transformer_ideogram4 import OUTPUT_IMAGE_INDICATOR

    marks, ids = tensor(given, "indicator"), tensor(given, "position_ids")

    def read() -> tuple[list[int], list[int]] | None:
        image = marks == OUTPUT_IMAGE_INDICATOR
        counts, starts = image.sum(1), image.int().argmax(1)
        place = torch.arange(marks.shape[1], device=marks.device)
        whole = (place >= starts[:, None]) & (place < (starts + counts)[:, None])
        return (counts.tolist(), starts.tolist()) if torch.equal(whole, image) else None

    found = once(marks, read)
    if found is None or len(set(found[0])) > 1 or not found[0][0]:
        raise Unknown("the indicator does not mark one piece of the same size in every row for the image")
    count, firsts = found[0][0], found[1]
    grid = leading_image(ids, firsts[0])
    if product(grid) != count:
        raise Unknown(f"position_ids give a grid of {grid[0]} × {grid[1]} for {count} image tokens")
    before, after = firsts[0], marks.shape[1] - count - firsts[0]
    parts = (Part("text", before), Part(IMAGE, count), Part("padding", after))
    starts = torch.tensor(firsts) if len(set(firsts)) > 1 else None
    joint = Sequence(tuple(p for p in parts if p.tokens), grid, starts=starts)
    return Geometry((grid[0] * 2, grid[1] * 2), {JOINT: (joint,)})


def fibo2(model: Any, given: Given) -> Geometry:
    """Bria Fibo 2: gist tokens of the text, the image, context images; the gist comes last where it is padded."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    sample = _sample(given)
    patch = side(model)
    grid = grid_of(sample, patch)
    others = sum(
        product(grid_of((c.shape[2], c.shape[3]), patch)) for c in given.get("context_latents") or ()
    )
    image = (Part(IMAGE, product(grid)), *((Part("reference", others),) if others else ()))
    text, mask = tensor(given, "encoder_hidden_states"), given.get("encoder_attention_mask")
    lengths = [text.shape[2]] * text.shape[0]
    if isinstance(mask, Tensor):
        lengths = once(mask, lambda: mask.sum(1).tolist())
    config = model.config
    counts = compute_gist_count(
        lengths, min_gist=config.min_num_gist_tokens, max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step, min_text_len=config.gist_min_text_len, max_text_len=config.gist_max_text_len,
    )  # fmt: skip
    gist = Part("gist", max(counts))
    parts = (gist, *image) if min(counts) == max(counts) else (*image, gist)
    return Geometry(sample, {IMAGE: (Sequence(image, grid),), JOINT: (Sequence(parts, grid),)})


def qwen21(model: Any, given: Given) -> Geometry:
    """Qwen-Image 2.1: text and reference images in turn, then the image. Each stretch of the prompt attends to itself
    and what comes before it, in a call of its own; the image sees everything. Later steps may have the keys of the
    prompt from a cache.
    """
    shapes = shapes_of(given)
    frames, rows, columns = shapes[-1]
    single_frame(frames)
    mask = tensor(given, "img_mask")
    marked: list[bool] = once(mask, lambda: mask[0].tolist())
    blocks = [prod(s) for s in shapes]
    if sum(blocks) != PER_SLOT * sum(marked):
        raise Unknown("img_shapes and img_mask do not give the same number of image tokens")
    prefix = sum(PER_SLOT if mark else 1 for mark in marked) - blocks[-1]
    before = (Part("text and references", prefix, rows=False),) if prefix else ()
    found = [Sequence((*before, Part(IMAGE, blocks[-1])), (rows, columns))]
    if given.get("kv_cache_mode") != "cached":
        found += once(mask, lambda: _stretches(marked, blocks, prefix), tuple(blocks))
    return Geometry((rows * 2, columns * 2), {JOINT: tuple(found)})


def _stretches(marked: list[bool], blocks: list[int], prefix: int) -> list[Sequence]:
    """The calls over the prompt: a run of text or one reference image as queries, and all that comes before it."""
    images = chain.from_iterable(repeat(number, size) for number, size in enumerate(blocks))
    owners = [owner for mark in marked for owner in (islice(images, PER_SLOT) if mark else (None,))]
    found, place = [], 0
    for _, run in groupby(owners[:prefix]):
        size = len(list(run))
        earlier = (Part("earlier", place, rows=False),) if place else ()
        found.append(Sequence((*earlier, Part("prompt", size))))
        place += size
    return found


def hunyuan_video15(model: Any, given: Given) -> Geometry:
    hidden = tensor(given, "hidden_states")
    single_frame(hidden.shape[2])
    sample = hidden.shape[-2], hidden.shape[-1]
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return ordered("image text", grid_of(sample, side(model)), length(given, *names), sample=sample)


def mochi(model: Any, given: Given) -> Geometry:
    """Mochi: one attention call for each row of the batch, with the words of that row alone."""
    hidden = tensor(given, "hidden_states")
    single_frame(hidden.shape[2])
    sample = hidden.shape[-2], hidden.shape[-1]
    grid = grid_of(sample, side(model))
    mask = tensor(given, "encoder_attention_mask")
    words: list[int] = once(mask, lambda: mask.bool().sum(1).tolist())
    image = Part(IMAGE, product(grid))
    found = tuple(Sequence((image, Part("text", n)), grid) for n in sorted(set(words)))
    return Geometry(sample, {JOINT: found})
