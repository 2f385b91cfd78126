"""What a denoiser's own inputs say about its tokens: latent size, token grid, text length, step.

Read once per denoiser call, from the arguments of that call, never from constants: Kontext and control
pipelines append a second image, prompts have any length, sides need not be equal. Only plain integers
are kept. Nothing here waits for the device, except for one look at ``img_ids`` per set of ids, and one at the
timestep per call where a method asks for the number of the step.
"""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..seams import Site
from .base import Runtime
from .diffusers_steps import Steps

Size = tuple[int, int]
CONTEXT = "_trainless_denoiser"  # where a patched denoiser keeps its Context


@dataclass(frozen=True)
class Geometry:
    """One denoiser call. sample: latent (rows, columns). tokens: image tokens of the whole sequence,
    reference images included; None for a UNet, where they differ from level to level. text: text tokens.
    step: number of the step within its run, where somebody asks for it."""

    sample: Size | None = None
    grid: Size | None = None
    tokens: int | None = None
    text: int | None = None
    timestep: Any = None
    step: int | None = None


def product(size: Size) -> int:
    return size[0] * size[1]


def halved(size: Size, times: int, floor: bool = False) -> Size:
    """``size`` after ``times`` downsamplers: a strided convolution with padding rounds up, a pool down."""
    rows, columns = size
    for _ in range(times):
        rows, columns = (rows // 2, columns // 2) if floor else (-(-rows // 2), -(-columns // 2))
    return max(rows, 1), max(columns, 1)


def patch_of(model: nn.Module, names: Sequence[str]) -> Size | None:
    """Latent pixels per image token as (rows, columns); None for UNets, whose levels differ."""
    if "sample" in names:
        return None
    if "img_ids" in names or "img_shapes" in names:
        return 2, 2  # the pipeline packs 2×2 latent pixels into a token before the model sees them
    size = getattr(getattr(model, "config", None), "patch_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) >= 2:
        return int(size[-2]), int(size[-1])
    return None


def forward_names(model: nn.Module) -> list[str]:
    """Parameter names of the model's forward; of its class, because offloading rebinds the instance's."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


class UNetLevels:
    """How often the latent has been halved where a module of a UNet sits, read off its blocks.

    ``known`` is False for models without the usual down blocks; ``deepest`` is the last level.
    """

    def __init__(self, model: nn.Module):
        down = list(getattr(model, "down_blocks", None) or ())
        up = list(getattr(model, "up_blocks", None) or ())
        self.known = any(hasattr(block, "downsamplers") for block in down)
        steps = [bool(getattr(block, "downsamplers", None)) for block in down]
        self.down = [sum(steps[:i]) for i in range(len(steps))]
        self.deepest = sum(steps)
        rises = [bool(getattr(block, "upsamplers", None)) for block in up]
        self.up = [self.deepest - sum(rises[:i]) for i in range(len(rises))]

    def of(self, name: str) -> int | None:
        """Level of the module called ``name``, 0 at full size; None when it is not in a block."""
        head, *rest = name.split(".")
        if not self.known:
            return None
        if head == "mid_block":
            return self.deepest
        levels = {"down_blocks": self.down, "up_blocks": self.up}.get(head)
        return levels[int(rest[0])] if levels is not None and rest and rest[0].isdigit() else None


class Context:
    """Stands at a patched denoiser: the geometry of the call under way and the runs so far, one per thread.

    ``runtimes``: those of the patched sites, which say whether anybody asks for the step.
    """

    def __init__(self, model: nn.Module, runtimes: Sequence[Runtime] = ()):
        self.runtimes = runtimes
        self.names = forward_names(model)
        self.patch = patch_of(model, self.names)
        self.local = threading.local()
        self.seen: tuple[weakref.ref[Tensor], int, Size | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        raise Unsupported("a patched denoiser cannot be copied: remove the patch first, then patch each copy")

    def __reduce__(self) -> Any:
        raise Unsupported("a patched denoiser cannot be pickled: remove the patch, or use save_pretrained")

    @property
    def geometry(self) -> Geometry | None:
        return getattr(self.local, "geometry", None)

    @property
    def steps(self) -> Steps:
        if not hasattr(self.local, "steps"):
            self.local.steps = Steps()
        found: Steps = self.local.steps
        return found

    def forget(self) -> None:
        """Whatever comes next begins a run."""
        self.local.steps = Steps()

    @torch.compiler.disable(reason="trainless notes the size of the call outside compiled regions")
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        geometry = self.read({**dict(zip(self.names, args, strict=False)), **kwargs})
        # Paused patches count as well: their steps go by all the same.
        if any("step" in e.contribution.asks for runtime in self.runtimes for e in runtime.entries):
            geometry = replace(geometry, step=self.steps.at(geometry.sample, geometry.timestep))
        self.local.geometry = geometry

    @torch.compiler.disable(reason="trainless notes the size of the call outside compiled regions")
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.local.geometry = None

    def read(self, given: Mapping[str, Any]) -> Geometry:
        """The geometry that the arguments of a call state; what they do not state stays None."""
        hidden = given.get("sample", given.get("hidden_states"))
        step = given.get("timestep", given.get("timesteps"))
        text = _length(given.get("txt_ids"), -2)
        text = _length(given.get("encoder_hidden_states"), 1) if text is None else text
        if not isinstance(hidden, Tensor):
            return Geometry(text=text, timestep=step)
        if hidden.dim() >= 4:
            sample: Size = (hidden.shape[-2], hidden.shape[-1])
            if self.patch is None or "sample" in given or hidden.dim() > 4:
                return Geometry(sample=sample, text=text, timestep=step)
            tokens = (sample[0] // self.patch[0], sample[1] // self.patch[1])
            return Geometry(sample, tokens, product(tokens), text, step)
        grid = self._packed_grid(given)
        latent = None if grid is None else (grid[0] * 2, grid[1] * 2)
        return Geometry(latent, grid, _length(hidden, 1), text, step)

    def _packed_grid(self, given: Mapping[str, Any]) -> Size | None:
        """Rows and columns of the generated image in a packed sequence, from its ids or shapes."""
        shapes, ids = given.get("img_shapes"), given.get("img_ids")
        if shapes:
            first = shapes[0][0] if isinstance(shapes[0], (list, tuple)) and shapes[0] else shapes[0]
            if isinstance(first, (list, tuple)):
                return int(first[-2]), int(first[-1])
        if not isinstance(ids, Tensor) or ids.shape[-1] < 3:
            return None
        version = 0 if ids.is_inference() else ids._version  # inference tensors count no versions
        if self.seen is not None and self.seen[0]() is ids and self.seen[1] == version:
            return self.seen[2]
        # The same ids serve every step of an image: this is the one place that waits for the device.
        table = ids.reshape(-1, ids.shape[-1]) if ids.dim() == 2 else ids[0]
        grid = _row_by_row(table[table[:, 0] == table[0, 0]])
        self.seen = (weakref.ref(ids), version, grid)
        return grid


def _row_by_row(ids: Tensor) -> Size | None:
    """Rows and columns of the tokens at ``ids`` (N, 3), where they are one grid, row by row; else None.

    Pipelines make ids in the model's dtype, and bfloat16 has no odd number beyond 256: a size read off the
    largest id would be wrong for large images.
    """
    y, x = ids[:, 1], ids[:, 2]
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


def _length(tensor: Any, axis: int) -> int | None:
    return tensor.shape[axis] if isinstance(tensor, Tensor) and tensor.dim() >= 2 else None


# ---------------------------------------------------------------- one attention call inside that


def describe(site: Site, geometry: Geometry | None, lq: int, lk: int) -> dict[str, Any]:
    """Facts of an attention call with ``lq`` queries and ``lk`` keys, as far as they are known.

    Returns grid and text for the AttentionCall, and facts: ``image_tokens`` among the keys, ``sample``,
    ``timestep``, ``step``, ``level``, ``levels``, and ``grid_at``, a function from a latent size to this layer's grid.
    """
    facts: dict[str, Any] = {"levels": site.facts.get("levels", 1), "level": site.facts.get("level", 0)}
    found: dict[str, Any] = {"grid": None, "text": 0, "facts": facts}
    if geometry is None:
        return found
    facts["sample"], facts["timestep"], facts["step"] = geometry.sample, geometry.timestep, geometry.step
    patch = site.facts.get("patch")
    if patch is None:
        image, grid, facts["level"], grid_at = _in_unet(site, geometry.sample, lq, lk)
    else:
        image, grid = geometry.tokens, geometry.grid
        grid_at = _grid_of_patches(patch)
        if image is not None and not _holds_image(site, image, geometry.text, lq, lk):
            image = None
    if image is None:
        return found
    facts["grid_at"] = grid_at
    found["grid"] = grid if grid is not None and product(grid) in (image, lq) else None
    if site.role != "cross":
        facts["image_tokens"] = image
        found["text"] = lk - image
    return found


def _holds_image(site: Site, image: int, text: int | None, lq: int, lk: int) -> bool:
    """Whether these tokens are the image's; not those of a refiner over text, of a window or of a shard."""
    if site.role == "cross" or image == lq:
        return image == lq
    return image <= lk and (site.role == "joint" or (text is not None and lq == image + text))


def _in_unet(
    site: Site, sample: Size | None, lq: int, lk: int
) -> tuple[int | None, Size | None, int | None, Callable[[Size], Size]]:
    """(image tokens, grid, level, grid_at) of a call at a UNet's attention."""
    level = site.facts.get("level")
    keys = lq if site.role == "cross" else lk
    if sample is None:
        return None, None, level, _grid_of_level(level or 0, False)
    for candidate in range(12) if level is None else (level,):
        for floor in (False, True):
            grid = halved(sample, candidate, floor)
            if product(grid) == lq:
                return lq, grid, candidate, _grid_of_level(candidate, floor)
    if level is None:
        return None, None, None, _grid_of_level(0, False)
    # Fewer tokens than the level holds: they were merged or tiled. More: others stand beside the image.
    return min(keys, product(halved(sample, level))), None, level, _grid_of_level(level, False)


def _grid_of_level(level: int, floor: bool) -> Callable[[Size], Size]:
    return lambda latent: halved(latent, level, floor)


def _grid_of_patches(patch: Size) -> Callable[[Size], Size]:
    return lambda latent: (max(1, math.floor(latent[0] / patch[0])), max(1, math.floor(latent[1] / patch[1])))
