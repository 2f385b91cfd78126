"""Denoisers whose pipeline packs latents into tokens (B, tokens, C); where they lie is said by ids or shapes.

Ids are read once per tensor of ids, which serves every step of an image: the only look at values on the device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from .latents import length, side, single_frame, tensor
from .words import IMAGE, JOINT, Geometry, Given, Part, Read, Sequence, Size, Unknown, Unseen, product

_seen = threading.local()  # .table: id of a tensor -> (weak reference, version, what was read)


def once(key: Tensor, read: Callable[[], Any], more: Any = None) -> Any:
    """``read()``, remembered as long as ``key`` is the same tensor and nobody has written to it.

    ``more``: whatever else the result depends on, hashable.
    """
    if torch.compiler.is_compiling():
        raise Unseen("it is said by the values of a tensor, which a compiled graph does not show")
    if not hasattr(_seen, "table"):
        _seen.table = {}
    table: dict[Any, tuple[weakref.ref[Tensor], int, Any]] = _seen.table
    version = 0 if key.is_inference() else key._version  # inference tensors count no versions
    name = (id(key), read.__qualname__, more)
    held = table.get(name)
    if held is not None and held[0]() is key and held[1] == version:
        return held[2]
    found = read()
    for dead in [name for name, (ref, _, _) in table.items() if ref() is None]:
        del table[dead]
    table[name] = (weakref.ref(key), version, found)
    return found


def row_by_row(ids: Tensor) -> Size | None:
    """Rows and columns of the tokens at ``ids`` (N, 2: row, column), where they are one grid, row by row; else None.

    Pipelines make ids in the model's dtype, and bfloat16 has no odd number beyond 256: a size read off the
    largest id would be wrong for large images.
    """
    y, x = ids[:, 0], ids[:, 1]
    if not len(x):
        return None
    returns = (x[1:] < x[:-1]).nonzero()
    # Where x never returns there is a single row, or a single column.
    columns = int(returns[0]) + 1 if len(returns) else 1 if bool((x == x[0]).all()) else len(x)
    if len(x) % columns:
        return None
    y, x = y.view(-1, columns), x.view(-1, columns)
    counted = all(
        bool((axis == (axis[0].double() + torch.arange(len(axis), device=axis.device)).to(axis.dtype)).all())
        for axis in (y[:, 0], x[0])
    )
    alike = bool((y == y[:, :1]).all()) and bool((x == x[0]).all())
    return (y.shape[0], columns) if counted and alike else None


def leading_image(ids: Tensor, first: int = 0) -> Size:
    """The grid of the image that begins at token ``first`` of ``ids`` (N, 3 or more: image, row, column, …).

    The tokens of one image share their first id; those of another image, a reference, follow with another one.
    """

    def read() -> Size | None:
        table = (ids if ids.dim() == 2 else ids[0])[first:]
        others = (table[:, 0] != table[0, 0]).nonzero() if len(table) else table
        count = int(others[0]) if len(others) else len(table)
        if bool((table[count:, 0] == table[0, 0]).any()):
            return None
        return row_by_row(table[:count, 1:3])

    grid = once(ids, read, first)
    if grid is None:
        raise Unknown("the ids of its tokens are not those of one image, row by row, with others behind it")
    found: Size = grid
    return found


def _latent(grid: Size) -> Size:
    return grid[0] * 2, grid[1] * 2


def image_and_references(grid: Size, tokens: int, grids: int = 1) -> tuple[Part, ...]:
    own = product(grid) * grids
    if own > tokens:
        raise Unknown(f"{own} tokens are said to be the image's, and hidden_states holds {tokens}")
    others = (Part("reference", tokens - own),) if tokens > own else ()
    return Part(IMAGE, own), *others


def with_ids(model: Any, given: Given) -> Geometry:
    """FLUX and its kin: text first, then the image and its references, told apart by ``img_ids``."""
    grid = leading_image(tensor(given, "img_ids"))
    image = image_and_references(grid, tensor(given, "hidden_states").shape[1])
    parts = (Part("text", length(given, "encoder_hidden_states")), *image)
    return Geometry(_latent(grid), {JOINT: (Sequence(parts, grid),)})


def flux2(model: Any, given: Given) -> Geometry:
    """FLUX.2, with references whose keys are kept from the first step on.

    That step puts them first ("extract"); they attend to themselves alone, in a call of their own. Later steps bring
    their keys back between those of text and image ("cached").
    """
    mode, cache = given.get("kv_cache_mode"), given.get("kv_cache")
    ids, tokens = tensor(given, "img_ids"), tensor(given, "hidden_states").shape[1]
    text = Part("text", length(given, "encoder_hidden_states"))
    if mode == "extract" and (held := int(given.get("num_ref_tokens") or 0)):
        grid = leading_image(ids, held)
        parts = (text, Part("reference", held, rows=False), *image_and_references(grid, tokens - held))
        alone = Sequence((Part("reference", held),))
        return Geometry(_latent(grid), {JOINT: (Sequence(parts, grid), alone)})
    if mode == "cached" and cache is not None:
        grid = leading_image(ids)
        cached = Part("reference", int(cache.num_ref_tokens), rows=False)
        return Geometry(
            _latent(grid), {JOINT: (Sequence((text, cached, *image_and_references(grid, tokens)), grid),)}
        )
    return with_ids(model, given)


def flux3(model: Any, given: Given) -> Geometry:
    """FLUX.3: early layers of text, image and references apart, then all of them in one sequence."""
    grid = leading_image(tensor(given, "img_ids"))
    own = image_and_references(grid, tensor(given, "hidden_states").shape[1])
    others = length(given, "image_cond_hidden_states")
    beside = (Part("reference", others),) if others else ()
    text = Part("text", length(given, "encoder_hidden_states"))
    found = {IMAGE: (Sequence(own, grid),), JOINT: (Sequence((text, *own, *beside), grid),)}
    return Geometry(_latent(grid), found)


def krea2(model: Any, given: Given) -> Geometry:
    """Krea 2: one table of ids for the text and the image behind it."""
    words = length(given, "encoder_hidden_states")
    grid = leading_image(tensor(given, "position_ids"), words)
    image = image_and_references(grid, tensor(given, "hidden_states").shape[1])
    return Geometry(_latent(grid), {JOINT: (Sequence((Part("text", words), *image), grid),)})


# ---------------------------------------------------------------- shapes


def shapes_of(given: Given, name: str = "img_shapes") -> list[tuple[int, ...]]:
    """The (frames, rows, columns) of each image of one row; every row must have the same."""
    shapes = given.get(name)
    if not shapes:
        raise Unknown(f"the call of the denoiser has no {name}")
    if isinstance(shapes, tuple) and all(isinstance(n, int) for n in shapes):
        return [shapes]
    rows = [tuple(tuple(int(n) for n in s) for s in (row if _nested(row) else [row])) for row in shapes]
    if len(set(rows)) > 1:
        raise Unknown(f"the rows of the batch have images of different sizes ({name})")
    return list(rows[0])


def _nested(row: Any) -> bool:
    return isinstance(row[0], (list, tuple))


def with_shapes(order: str) -> Read:
    """Qwen-Image and NucleusMoE: ``img_shapes`` has the generated image first, its references behind it.

    A layered image holds several images of one size; its last shape is the reference that it was cut from.
    order: "text image", or "image text" where text has keys only.
    """

    def read(model: Any, given: Given) -> Geometry:
        shapes = shapes_of(given)
        frames, *grid = shapes[0]
        single_frame(frames)
        layered = bool(getattr(model.config, "use_layer3d_rope", False))
        layers = shapes[:-1] if layered and len(shapes) > 1 else shapes[:1]
        if len(set(layers)) > 1:
            raise Unknown("the layers of the image are of different sizes (img_shapes)")
        size = (grid[0], grid[1])
        tokens = tensor(given, "hidden_states").shape[1]
        said = sum(prod(s) for s in shapes)
        if said != tokens:
            raise Unknown(f"img_shapes gives {said} image tokens, and hidden_states holds {tokens}")
        image = image_and_references(size, tokens, len(layers))
        words = length(given, "encoder_hidden_states")
        parts = (Part("text", words), *image)
        if order == "image text":
            parts = (*image, Part("text", words, rows=False))
        found = Sequence(parts, size, len(layers))
        return Geometry(_latent(size), {JOINT: (found,)})

    return read


def joy_plus(model: Any, given: Given) -> Geometry:
    """JoyImage-Edit-Plus: the edited image, its references, padding up to the longest row, and the text."""
    shapes = shapes_of(given, "shape_list")
    frames, rows, columns = shapes[0]
    single_frame(frames)
    grid, said = (rows, columns), sum(prod(s) for s in shapes)
    tokens = tensor(given, "hidden_states").shape[1]
    padding = (Part("padding", tokens - said),) if tokens > said else ()
    image = image_and_references(grid, said)
    parts = (*image, *padding, Part("text", length(given, "encoder_hidden_states")))
    patch = side(model)
    return Geometry((rows * patch[0], columns * patch[1]), {JOINT: (Sequence(parts, grid),)})


def ltx(model: Any, given: Given) -> Geometry:
    """LTX: the size of the latent video in tokens beside it."""
    size = [given.get(name) for name in ("num_frames", "height", "width")]
    if not all(isinstance(n, int) for n in size):
        raise Unknown("the call of the denoiser has no num_frames, height and width")
    frames, rows, columns = (int(n) for n in size if n is not None)
    single_frame(frames)
    return Geometry((rows, columns), {IMAGE: (Sequence((Part(IMAGE, rows * columns),), (rows, columns)),)})
