"""CLEAR: in an image transformer each image token attends to a disc around it, and to the text.

What     Image token i sees image token j where (y_i - y_j)² + (x_i - x_j)² < r², strictly, on the layer's own
         grid, cut off at the borders; every token sees the text, and text sees everything, and so it is with all
         that stands beside the generated image: reference images, registers, padding that is attended to.
         Softmax, scale, rotation and projections stay. ``pool`` = f adds one key and value for each f × f patch of image
         keys and values (a weighted sum, 1/f² each without weights), which image tokens see and text does not.
Source   "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", its code and weights.
Seams    pattern: the disc, as a window on the call's grid. keys: the pooled patches. weights: the distilled
         projections, in the published names, all of them or none.
Exact    bitwise the identity where the radius is larger than the grid's diagonal, without pool and weights,
         and in the dense steps and layers. What the base model held comes back bitwise with the removal.
Costs    r = 8 leaves 193 image keys per token, 16 leaves 793, 32 leaves 3205, and all of the text. Memory is
         linear. With pool the pairs are N²/f² again. Other methods that want statistics or edits at the
         same layer, and masks, take the way of a predicate: exact, but as slow as dense attention.
Differs  Text length and grid come from each call and not from constants, so sizes and pipelines mix. Keys of
         the weights are checked strictly. Layers and first steps that stay dense are ours. Nothing of its
         high-resolution recipe is in here: attention as sharp as in training is `entropy`, which counts the
         keys that the disc leaves; the base of the rotation is the model's own.

What it does not do. A radius of 8 needs its distilled weights, and gives repetitive patterns with them
unless it is pooled as well. Nobody has published a quality figure for any radius without weights. On our small
demo models, trained densely on grids of 16, every radius that cuts off much of the grid costs agreement with
the prompt (docs/measured.md), so compare your own images, dense first steps on and off, before you rely on it.
An image of several layers on one grid each, and tokens that do not lie row by row, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, Unsupported
from ..kernels import Window2d
from ..seams import (
    AttentionCall,
    Contribution,
    ExtraKeys,
    Keys,
    Pairs,
    Pattern,
    Site,
    State,
    Statistics,
    Weights,
)
from ..seams.layers import check_layers, layer_numbers
from ._distilled import Distilled, check_keys, check_plain, distilled, shape_at
from .base import Method, option, register

LEAST = 16  # the smallest radius that is not refused without weights
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
POOLING = "processor.spatial_weight"  # how published files call the weights of the patches, per layer


@register
@dataclass(frozen=True)
class Clear(Method):
    """Attend to a disc around each image token in the self- and joint attention of a denoiser.

    Raises InputError for a radius under 16 without weights (unless ``force``), for weights that do not fit
    the model key by key, and for layers that do not exist; at a call Unsupported where the image's grid is
    not known, InputError where ``pool`` does not divide it.
    """

    name: ClassVar[str] = "clear"
    summary: ClassVar[str] = "image tokens attend to a disc around them and to the text"
    source: ClassVar[str] = "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up"
    parts: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    roles: ClassVar[frozenset[str]] = frozenset({"self", "joint"})
    hosts: ClassVar[frozenset[str]] = frozenset({"diffusers"})
    by_size: ClassVar[bool] = True
    identity: ClassVar[dict[str, Any]] = {"radius": 1 << 20, "weights": None, "pool": None}

    radius: int = option(16, help="image tokens nearer than this are seen", origin="published", low=1)
    weights: Path | None = option(
        None, help="distilled weights, a safetensors file or a folder of them; made for one radius and pool"
    )
    pool: int | None = option(
        None, help="side of the patches whose means every image token sees as well; published: 4", low=1
    )
    dense_steps: int = option(0, help="so many first steps of a run stay dense", low=0)
    dense_layers: tuple[int | str, ...] = option(
        (), help="layers that stay dense and keep their weights: numbers, slices or globs on module names"
    )
    force: bool = option(False, help="allow a radius under 16 without weights")

    def check(self) -> None:
        if self.radius < LEAST and self.weights is None and not self.force:
            raise InputError(
                f"radius={self.radius}: under {LEAST} an image falls apart unless the model has the weights that "
                "were distilled for that radius; give weights=, a larger radius, or force=True to see it"
            )
        for given in self.dense_layers:
            if isinstance(given, str) and _is_slice(given):
                check_layers(given, "dense_layers")

    def refuses(self, site: Site) -> str | None:
        reason = site.facts.get("no_images")
        return None if reason is None else str(reason)

    # ------------------------------------------------------------------ which layers

    def validate(self, sites: Sequence[Site]) -> None:
        for given in self.dense_layers:
            if not any(_names(given, site) for site in sites):
                last = max(site.layer for site in sites)
                raise InputError(
                    f"dense_layers: {given!r} is none of the {len(sites)} layers, 0 to {last}, the first of "
                    f"which is {sites[0].name!r}"
                )
        if self.weights is not None:
            check_plain(sites, PROJECTIONS, self.name)
            source = distilled(self.weights, self.name)
            if self.pool is None and any(key.endswith(POOLING) for key in source.shapes):
                raise InputError(
                    "weights: these were distilled with pooled patches; give pool= as well (published: 4)"
                )
            expected = {key: shape_at(site, name) for site in sites for name, key in _keys(site).items()}
            if self.pool is not None:
                shape = (1, 1, 1, self.pool, 1, self.pool, 1)
                expected |= {f"{_local(site)}.{POOLING}": shape for site in sites}
            check_keys(source, expected, self.name)

    def wants_layer(self, site: Site) -> bool:
        return not any(_names(given, site) for given in self.dense_layers)

    # ------------------------------------------------------------------ what happens there

    def contribute(self, site: Site) -> list[Contribution]:
        asks = frozenset({"step"}) if self.dense_steps else frozenset()

        def pattern(call: AttentionCall, statistics: Statistics, state: State) -> Window2d | Pairs | None:
            found = self._image(call)
            if found is None or Window2d(found.grid, self.radius).everything:
                return None
            return _disc(call, found, self.radius)

        given: list[Contribution] = [Pattern(pattern, asks=asks, traceable=True)]
        source = None if self.weights is None else distilled(self.weights, self.name)
        if self.pool is not None:
            weight = _pooling(source, site, self.pool)

            def pooled(call: AttentionCall, statistics: Statistics, state: State) -> ExtraKeys | None:
                found = self._image(call)
                return None if found is None else _patches(call, found, weight)

            given.append(Keys(pooled, asks=asks, traceable=True))
        if source is not None:
            given.append(Weights(source.under(_keys(site))))
        return given

    def _image(self, call: AttentionCall) -> OnGrid | None:
        """The image that this call restricts; None in a dense step, and where it holds nothing of the image."""
        where = call.site.name if call.site is not None else "this attention"
        if self.dense_steps:
            step = call.facts.get("step")
            if step is None:
                raise Unsupported(
                    f"clear: {where} was called without a timestep, so dense_steps={self.dense_steps} cannot be "
                    "counted; call the denoiser, or use dense_steps=0"
                )
            if step < self.dense_steps:
                return None
        image = call.image
        if image is None:
            raise Unsupported(
                f"clear: which of the {call.key.shape[2]} tokens at {where} are the image's is not known: "
                f"{call.facts.get('no_images', 'nobody says so')}; leave the layer out with dense_layers, or remove the "
                "patch"
            )
        if not image.tokens:
            return None
        if image.grid is None or image.grids > 1:
            many = (
                f"lie on {image.grids} grids, one for each layer of the image"
                if image.grids > 1
                else "do not lie row by row"
            )
            raise Unsupported(
                f"clear: the {image.tokens} image tokens at {where} {many}, so there is no disc around each; remove the "
                "patch for such calls"
            )
        return OnGrid(image.grid, image.first, image.row)


@dataclass(frozen=True, eq=False)
class OnGrid:
    """An image in a call: its grid, its first key and its first query; (B,) where rows of the batch differ."""

    grid: tuple[int, int]
    first: int | Tensor
    row: int | Tensor

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


def _disc(call: AttentionCall, image: OnGrid, radius: int) -> Window2d | Pairs:
    """The disc: as a window where all else stands on one side of the image, as a predicate elsewhere."""
    lq, lk = call.query.shape[2], call.key.shape[2]
    first, row, beside = image.first, image.row, lk - image.tokens
    if isinstance(first, int) and lq == lk and first in (0, beside):
        return Window2d(image.grid, radius, text=beside, text_first=bool(first))
    window = Window2d(image.grid, radius)

    def visible(q: Tensor, k: Tensor) -> Tensor:
        # Rows are numbered as if the last of them stood at the last key.
        q_place, k_place = q - (lk - lq) - _column(row, q), k - _column(first, k)
        return window.visible(q_place, k_place)

    return Pairs(visible, batch=len(first) if isinstance(first, Tensor) else 1)


def _column(number: int | Tensor, like: Tensor) -> int | Tensor:
    """``number`` to subtract from places (rows, columns); (B, 1, 1, 1) where it differs from row to row."""
    return number.to(like.device).view(-1, 1, 1, 1) if isinstance(number, Tensor) else number


# ---------------------------------------------------------------- pooled patches


def _pooling(source: Distilled | None, site: Site, pool: int) -> Tensor:
    """(pool, pool): how much each token of a patch counts; the mean where nothing was learned."""
    if source is None:
        return torch.full((pool, pool), 1 / pool**2)
    return source[f"{_local(site)}.{POOLING}"].reshape(pool, pool)


def _patches(call: AttentionCall, image: OnGrid, weight: Tensor) -> ExtraKeys:
    """A key and a value for each patch of the image, seen by the image's rows alone."""
    (rows, columns), side = image.grid, weight.shape[0]
    if rows % side or columns % side:
        raise InputError(
            f"pool={side}: patches of {side} × {side} do not tile this grid of {rows} × {columns} tokens; "
            "choose a size that they divide, or another pool"
        )
    first, row = image.first, image.row
    if isinstance(first, Tensor) or isinstance(row, Tensor):
        raise Unsupported(
            "clear: the image begins at another token in each row of this batch, where patches cannot be pooled; use "
            "prompts of one length, or no pool"
        )
    factors = weight.to(call.statistics_dtype).tolist()

    def pooled(tokens: Tensor) -> Tensor:
        own = tokens[:, :, first : first + image.tokens]
        patches = own.unflatten(2, (rows // side, side, columns // side, side))
        total: Tensor | None = None
        for y, x in ((y, x) for y in range(side) for x in range(side)):
            part = patches[:, :, :, y, :, x].to(call.statistics_dtype) * factors[y][x]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.flatten(2, 3).to(tokens.dtype)

    return ExtraKeys(pooled(call.key), pooled(call.value), rows=(row, row + image.tokens))


# ---------------------------------------------------------------- names


def _is_slice(text: str) -> bool:
    return re.fullmatch(r"[\s\d:-]+", text) is not None


def _names(given: int | str, site: Site) -> bool:
    """Whether an item of ``dense_layers`` means this site; layers are counted within a role."""
    if isinstance(given, str) and not _is_slice(given):
        return fnmatchcase(site.name, given) or fnmatchcase(_local(site), given)
    if isinstance(given, int) and not -site.layers <= given < site.layers:
        return False
    return site.layer in layer_numbers(given, site.layers, "dense_layers")


def _local(site: Site) -> str:
    """The site's name inside its denoiser, which is how published weights call it."""
    model = site.facts["denoiser"]
    return next((name for name, module in model.named_modules() if module is site.module), site.name)


def _keys(site: Site) -> Mapping[str, str]:
    """The site's parameters that are distilled, each with its key in the published weights."""
    names = [f"{layer}.{kind}" for layer in PROJECTIONS for kind in ("weight", "bias")]
    local = _local(site)
    return {name: f"{local}.{name}" for name in names if shape_at(site, name) is not None}
