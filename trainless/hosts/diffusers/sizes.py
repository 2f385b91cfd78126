"""At what size a denoiser was trained, and how pixels become what it is given; checked before anybody relies on it.

What ``diffusers_size_table`` declares is compared, for the very size in question, with the latents that the
pipeline's own code makes at that size. They are made on the meta device: it costs nothing and draws no numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ...errors import InputError, Unsupported
from .size_table import (
    PER_LATENT,
    PER_TOKEN,
    STATE_THEIR_SIZE,
    autoencoder_factor,
    is_listed,
    module_function,
    patch_side,
    row_of,
)

Size = tuple[int, int]
UNETS = (
    diffusers.UNet2DConditionModel, diffusers.UNet2DModel, diffusers.Kandinsky3UNet, diffusers.UNetMotionModel,
    diffusers.DreamLiteUNetModel, diffusers.UNetSpatioTemporalConditionModel, diffusers.UNet3DConditionModel,
    diffusers.I2VGenXLUNet,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is known about the sizes of one denoiser.

    patch: latents per token as (rows, columns), None in a UNet, whose tokens are latents on their level. All sizes
    that come out are latents as the host counts them: of a transformer, tokens times ``patch``.
    """

    denoiser: Any
    pipeline: Any = None
    patch: Size | None = None

    @property
    def name(self) -> str:
        return type(self.denoiser if self.pipeline is None else self.pipeline).__name__

    # ------------------------------------------------------------------ what methods ask

    def trained(self) -> Size:
        """The size of training in latents, (rows, columns); InputError or Unsupported, by name, where none is sure."""
        if self.pipeline is None:
            size = self._stated()
            if size is None:
                raise InputError(self._gives_no_size())
            return size
        pixels = self.default()
        if pixels is None:
            raise InputError(self._gives_no_size())
        return self.latents(pixels)

    def latents(self, pixels: Size, per_latent: int | None = None) -> Size:
        """Latents of an image of ``pixels`` (height, width); Unsupported, by name, where that is not known.

        per_latent: pixels along one side of a latent, as the user says; for a denoiser that does not say it itself,
        InputError where it is known and another.
        """
        counted = self.counted(pixels)
        if per_latent is not None:
            said = self._said(pixels, per_latent)
            if counted is not None and counted != said:
                raise InputError(
                    f"pixels_per_latent={per_latent}: {_text(pixels)} pixels would be {_text(said)} {self._unit}, and a "
                    f"{self.name} makes {_text(counted)} of them; leave it out"
                )
            counted = said
        if counted is None:
            raise Unsupported(self._pixels_unknown(pixels))
        found = self.painted(pixels)
        if found is not None and found != _as_found(counted, found):
            raise Unsupported(
                f"{self.name}: {_text(pixels)} pixels are {_text(counted)} {self._unit} by what is known of this "
                f"class, and {_text(found)} by its own code in diffusers {diffusers.__version__}; give another "
                "trained=, or leave the method out"
            )
        if min(counted) < 1:
            raise InputError(
                f"trained={_text(pixels)}: give pixels; one of the {self._unit} of {self.name} is more than that"
            )
        if self._in_latents:
            return counted
        if self.patch is None:
            raise Unsupported(f"{self.name}: how many latents are in one of its image tokens is not known")
        return counted[0] * self.patch[0], counted[1] * self.patch[1]

    def check(self) -> str | None:
        """None when the pipeline's own default size has as many image tokens as are counted; else what is wrong."""
        try:
            self.trained()
        except (InputError, Unsupported) as error:
            return str(error)
        return None

    # ------------------------------------------------------------------ the two ways of counting

    def default(self) -> Size | None:
        """(height, width) in pixels that the pipeline makes when it is not told; None where that is not known."""
        row = None if self.pipeline is None else row_of(self.pipeline)
        if row is None or row.default is None:
            return None
        found = self._asked(row.default)
        if found is None:
            return None
        height, width = found
        whole = isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0
        return (height, width) if whole else None

    def counted(self, pixels: Size) -> Size | None:
        """Tokens along each side (latents, in a UNet) as declared for the class; None for an unknown one."""
        row = None if self.pipeline is None else row_of(self.pipeline)
        if row is not None:
            rows, columns = (self._asked(row.count, side) for side in pixels)
            return rows, columns
        side = self._bare()
        return None if side is None else (pixels[0] // side, pixels[1] // side)

    def painted(self, pixels: Size) -> Sequence[int] | None:
        """What the pipeline's own code makes of ``pixels``: (rows, columns), or (tokens,) in one row.

        None where a class has no such code that could be run by itself.
        """
        row = None if self.pipeline is None else row_of(self.pipeline)
        if row is None or not row.observe:
            return None
        try:
            shape = _observed(self.pipeline, row.observe, pixels)
        except Exception as error:
            raise Unsupported(
                f"{self.name}: how many {self._unit} {_text(pixels)} pixels are cannot be checked, its own code "
                f"raises {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            ) from error
        if len(shape) == 3:
            return (shape[1],)
        rows, columns = (shape[axis] for axis in row.axes) if len(shape) > 2 else shape
        side = 1 if self._in_latents else patch_side(self.denoiser)
        return rows // side, columns // side

    def _asked(self, what: Callable[..., Any], *given: Any) -> Any:
        """What a row says of this pipeline; Unsupported where its parts are not what the class has them for."""
        try:
            return what(self.pipeline, self.denoiser, *given)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise Unsupported(
                f"{self.name}: its parts do not say how its pixels are counted ({type(error).__name__}: {error}); load "
                "those that the pipeline was made with"
            ) from error

    def _said(self, pixels: Size, per_latent: int) -> Size:
        side = per_latent * (1 if self._in_latents else patch_side(self.denoiser))
        return pixels[0] // side, pixels[1] // side

    def _bare(self) -> int | None:
        """Pixels along one side of a token (a latent, in a UNet) where no pipeline of a known class says it."""
        if is_listed(self.denoiser, PER_TOKEN):
            return PER_TOKEN[type(self.denoiser).__name__]
        if is_listed(self.denoiser, PER_LATENT):
            side = 1 if self._in_latents else patch_side(self.denoiser)
            return PER_LATENT[type(self.denoiser).__name__] * side
        # A UNet works on the latents of the autoencoder beside it, whatever the pipeline is called.
        return autoencoder_factor(self.pipeline) if isinstance(self.denoiser, UNETS) else None

    def _stated(self) -> Size | None:
        if not is_listed(self.denoiser, STATE_THEIR_SIZE):
            return None
        return latent_size(getattr(self.denoiser.config, "sample_size", None))

    # ------------------------------------------------------------------ what is said

    @property
    def _in_latents(self) -> bool:
        row = None if self.pipeline is None else row_of(self.pipeline)
        return isinstance(self.denoiser, UNETS) if row is None else row.in_latents

    @property
    def _unit(self) -> str:
        return "latents" if self._in_latents else "image tokens"

    def _gives_no_size(self) -> str:
        return (
            f"{self.name} does not say at what size it was trained; "
            "give trained= in pixels, such as trained=1024 or trained=(768, 1344)"
        )

    def _pixels_unknown(self, pixels: Size) -> str:
        if self.pipeline is None:
            return (
                f"how many pixels a latent of a {self.name} is depends on the autoencoder that it works with, so "
                f"{_text(pixels)} pixels cannot be counted; patch the pipeline instead of its denoiser, or give "
                "pixels_per_latent (8 with the autoencoders of Stable Diffusion)"
            )
        return (
            f"how a {self.name} counts pixels is not known (it is none of the pipelines of diffusers that are "
            f"listed), so {_text(pixels)} pixels cannot be counted; patch the denoiser alone, without trained= if "
            "its config states its size, or use a pipeline that diffusers has"
        )


def latent_size(size: Any) -> Size | None:
    """A config's sample_size, an int or (rows, columns), as (rows, columns); None when it says nothing."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size):
        return size[0], size[1]
    return None


def size_facts(pipeline: Any, denoiser: nn.Module, patch: Size | None) -> dict[str, Any]:
    """Facts for the sites of a denoiser: ``sizes``; ``trained_latent`` (rows, columns) or None; for those who want to
    show it ``vae_scale``, the pixels per latent at that size, or None."""
    sizes = Sizes(denoiser, pipeline, patch)
    scale: float | None = None
    try:
        latent: Size | None = sizes.trained()
        pixels = sizes.default()
        if latent is not None and pixels is not None:
            scale = pixels[0] / latent[0] if pixels[0] % latent[0] else pixels[0] // latent[0]
    except (InputError, Unsupported):
        latent = None
    return {"sizes": sizes, "trained_latent": latent, "vae_scale": scale}


def _as_found(counted: Size, found: Sequence[int]) -> Sequence[int]:
    return (counted[0] * counted[1],) if len(found) == 1 else counted


def _text(size: Sequence[int]) -> str:
    return "×".join(map(str, size))


def _observed(pipeline: Any, observe: str, pixels: Size) -> Sequence[int]:
    """Shape of the latents that the code named ``observe`` makes for this pipeline at ``pixels``."""
    beside = module_function(type(pipeline), observe)
    if beside is not None and not isinstance(beside, type):  # Kandinsky's own rounding, to latents
        factor = getattr(pipeline, "movq_scale_factor", 8)
        rows, columns = beside(*pixels, factor)
        return int(rows), int(columns)
    kind = getattr(diffusers, observe)
    make = getattr(kind, "prepare_latents", None) or kind.prepare_intermediate_images
    values: dict[str, Any] = {
        "batch_size": 1, "num_images_per_prompt": 1, "num_channels_latents": 4, "num_latents_channels": 4,
        "num_channels": 4, "height": pixels[0], "width": pixels[1], "dtype": torch.float32,
        "device": torch.device("meta"), "generator": None, "latents": None, "images": None, "image": None,
        "num_frames": 1, "video_length": 1,
        "scheduler": pipeline.scheduler, "patch_size": getattr(_denoiser_config(pipeline), "patch_size", None),
    }  # fmt: skip
    takes = inspect.signature(make).parameters
    given = {name: values[name] for name in takes if name in values}
    with torch.device("meta"):  # for ids and grids that it makes beside the latents, of whatever size
        made = make(pipeline, **given)
    while not isinstance(made, Tensor):
        made = made[0]
    return tuple(made.shape)


def _denoiser_config(pipeline: Any) -> Any:
    return getattr(getattr(pipeline, "transformer", None), "config", None)
