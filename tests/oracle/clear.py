"""CLEAR: image tokens of a denoiser see a disc around them and all text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .entropy import DenoiserOracle, EntropyOracle, factor, halved, install_denoiser, unet_level
from .windows import disc, grid, with_text


class Clear(DenoiserOracle):
    """In every self-attention and joint attention layer, query i sees key j if one of them is text or if
    (y_i - y_j)² + (x_i - x_j)² < radius² (strictly). Softmax, scale, rotation and projections stay.

    With ``pool`` = f, each f × f patch of image keys (after rotation) and of image values also stands as one
    more key and value, the sum weighted by ``weights[layer name]`` (f, f), 1/f² where none is given.
    Image queries see all of these; text queries see none of them, and all the others.

    Settled here where sources differ:
    - Coordinates are the layer's own grid: FLUX from columns 1 and 2 of ``img_ids``; UNet the sample's sides
      halved, rounding up, down to the layer's level; the others the sample's sides over the patch.
    - Distance is by (y, x) alone: tokens of a second image (column 0 of ``img_ids``) at the same place are
      at distance 0. ``across=False`` hides other images altogether.
    - FLUX holds text first, SD3 the image first; layers without text have the disc alone. Cross-attention is
      left alone. Pooled tokens come last. Pooling needs a grid of rows whose sides f divides, one image.
    - ``dense_layers`` (names) and the first ``dense_steps`` steps of a run stay dense, without pooled tokens. A
      step begins with a change of timestep, a run when it rises.
    - ``trained`` (height, width in pixels) adds entropy scaling where the pattern is local: the logits of each
      query times sqrt(ln n / ln T), n the keys that this query sees, pooled ones included, and T the
      layer's tokens at the trained size with the live text. Calls that stay dense are scaled by all keys.
    """

    def __init__(
        self,
        radius: float = 16,
        pool: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
        dense_steps: int = 0,
        dense_layers: Collection[str] = (),
        across: bool = True,
        trained: tuple[int, int] | None = None,
    ) -> None:
        self.trained = trained
        self.radius, self.pool, self.weights = radius, pool, weights or {}
        self.dense_steps, self.dense_layers, self.across = dense_steps, set(dense_layers), across
        self.step, self.time = -1, float("-inf")
        self.seen: dict[str, list[Tensor]] = {}  # per layer and call, the mask; dense calls are left out

    def begin(self, model: nn.Module, given: dict[str, Any]) -> None:
        self.model: Any = model
        self.given = given
        time = float(torch.as_tensor(given["timestep"]).flatten()[0])
        if self.step < 0 or time > self.time:
            self.step = 0
        elif time < self.time:
            self.step += 1
        self.time = time

    def dense(self, name: str) -> bool:
        return self.step < self.dense_steps or name in self.dense_layers

    def sides(self, name: str) -> tuple[int, int]:
        """Height and width of the layer's grid."""
        kind = type(self.model).__name__
        if kind == "FluxTransformer2DModel":
            where = self.given["img_ids"][:, 1:].long()
            height, width = (where.amax(dim=0) - where.amin(dim=0) + 1).tolist()
            return height, width
        sample = self.given["sample" if kind == "UNet2DConditionModel" else "hidden_states"]
        height, width = sample.shape[-2:]
        if kind == "UNet2DConditionModel":
            level = unet_level(name, len(self.model.config.block_out_channels))
            return halved(height, level), halved(width, level)
        return height // self.model.config.patch_size, width // self.model.config.patch_size

    def apply(self, name: str, logits: Tensor, image: int, text: int) -> Tensor:
        if self.dense(name):
            every = torch.ones(image + text, image + text, dtype=torch.bool)
            return self.scaled(name, logits, every, text)
        first = type(self.model).__name__ == "FluxTransformer2DModel"
        if first:
            ids = self.given["img_ids"]
            seen = disc(ids[:, 1:], self.radius)
            if not self.across:
                seen &= ids[:, None, 0] == ids[None, :, 0]
        else:
            seen = disc(grid(*self.sides(name)), self.radius)
        assert seen.shape[0] == image, f"{name}: a grid of {seen.shape[0]} for {image} tokens"
        seen = with_text(seen, text, first)
        if self.pool:
            of_image = torch.ones(image + text, 1, dtype=torch.bool)
            of_image[slice(0, text) if first else slice(image, None)] = False
            pooled = image // self.pool**2
            seen = torch.cat([seen, of_image.expand(-1, pooled)], dim=1)
        self.seen.setdefault(name, []).append(seen)
        return self.scaled(name, logits, seen, text).masked_fill(~seen, -torch.inf)

    def scaled(self, name: str, logits: Tensor, seen: Tensor, text: int) -> Tensor:
        """The logits times each query's own factor, where a trained size is given."""
        if self.trained is None:
            return logits
        usual = EntropyOracle(self.model, self.trained).trained(name) + text
        factors = [factor(n, usual) for n in seen.sum(dim=1).tolist()]
        return logits * torch.tensor(factors, dtype=logits.dtype)[:, None]

    def keys(self, name: str, key: Tensor, value: Tensor, image: int, text: int) -> tuple[Tensor, Tensor]:
        if not self.pool or self.dense(name):
            return key, value
        f, (height, width) = self.pool, self.sides(name)
        if height % f or width % f or height * width != image:
            raise ValueError(f"{name}: patches of {f} × {f} do not tile {image} tokens, {height} × {width}")
        weight = self.weights.get(name, torch.full((f, f), 1 / f**2)).to(key).reshape(f, f)
        first = type(self.model).__name__ == "FluxTransformer2DModel"
        part = slice(text, None) if first else slice(0, image)

        def pooled(x: Tensor) -> Tensor:
            patches = x[:, :, part].unflatten(2, (height // f, f, width // f, f))
            return torch.einsum("bhyuxvd,uv->bhyxd", patches, weight).flatten(2, 3)

        return torch.cat([key, pooled(key)], dim=2), torch.cat([value, pooled(value)], dim=2)


@contextmanager
def install_clear(model: nn.Module, oracle: Clear) -> Iterator[Clear]:
    """Run a stock float64 denoiser through dense attention with CLEAR's pattern; restored on exit."""
    with install_denoiser(model, oracle):
        yield oracle
