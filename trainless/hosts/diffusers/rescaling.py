"""Pipelines that paint another size than the one they are asked for: declared by class, and seen at the call.

A method that goes by the size of the image then meets the size of training, and does nothing. Only the pipeline's
own call knows what was asked for, and it cannot be wrapped: Python looks ``__call__`` up on the class. So the hook at
the denoiser looks for that call among those under way, and reads its arguments there.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import diffusers
import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from ...errors import TrainlessError
from ...seams import Lease
from .geometry import CONTEXT
from .sizes import Sizes

Size = tuple[int, int]
ASKED = "_trainless_asked"  # where a patched denoiser of a pipeline keeps its Asked


@dataclass(frozen=True)
class Rescaling:
    """What a pipeline class does with a size. said: in words. switch: the argument that stops it, "" when none does.

    paints: (height, width, pixels per latent) -> what becomes of it, where that follows from nothing else.
    """

    said: str
    switch: str = ""
    paints: Callable[[int, int, int], Size] | None = None


def _about_default(height: int, width: int, scale: int) -> Size:
    """HiDream: to the area of 128 × 128 latents, and down to whole tokens."""
    factor, token = math.sqrt((128 * scale) ** 2 / (width * height)), scale * 2
    return int(height * factor // token * token), int(width * factor // token * token)


KANDINSKY5 = ((1024, 1024), (1408, 640), (640, 1408), (1280, 768), (768, 1280), (1152, 896), (896, 1152))


def _nearest(height: int, width: int, scale: int) -> Size:
    """Kandinsky 5: one of its list, (height, width), by the ratio of the sides."""
    if (height, width) in KANDINSKY5:
        return height, width
    return min(KANDINSKY5, key=lambda size: abs(size[1] / size[0] - width / height))


_AREA = Rescaling("scales every size to the area max_area, 1024 × 1024 by default", "max_area=height * width")
_BINS = Rescaling("paints the nearest of a list of sizes and stretches it", "use_resolution_binning=False")

RESCALING: Mapping[str, Rescaling] = {
    **dict.fromkeys(("FluxKontextPipeline", "FluxKontextInpaintPipeline"), _AREA),
    "HiDreamImagePipeline": Rescaling(
        "scales every size to an area of about 1024 × 1024", paints=_about_default
    ),
    **dict.fromkeys(
        ("Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"),
        Rescaling("paints one of seven sizes, whatever it is asked for", paints=_nearest),
    ),
    **dict.fromkeys(
        (
            "PixArtAlphaPipeline", "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline", "SanaPipeline",
            "SanaPAGPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaControlNetPipeline",
            "HunyuanDiTPipeline", "HunyuanDiTPAGPipeline", "HunyuanDiTControlNetPipeline", "PRXPipeline",
            "PRXPixelPipeline",
        ),
        _BINS,
    ),
}  # fmt: skip


def rescaling_of(kind: type) -> Rescaling | None:
    """What is declared about a pipeline class, or about the one that it extends."""
    for cls in kind.__mro__:
        if cls.__name__ in RESCALING and getattr(diffusers, cls.__name__, None) is cls:
            return RESCALING[cls.__name__]
    return None


def declared(pipeline: Any) -> str | None:
    """A sentence about what this pipeline does with sizes, or None when it paints what it is asked for."""
    found = rescaling_of(type(pipeline))
    return None if found is None else f"{type(pipeline).__name__} {found.said}; {_fix(found)}"


def _fix(found: Rescaling | None) -> str:
    if found is None:
        return "give it a size that it paints as it is, or what switches that off"
    if found.switch:
        return f"call it with {found.switch}"
    return "no argument of its call switches that off, so give it a size that it leaves as it is"


class AskedSize:
    """Stands at a denoiser of a patched pipeline: sizes that the pipeline was asked for, beside what it painted."""

    def __init__(self, pipeline: Any, sizes: Sizes):
        self.pipeline, self.sizes = weakref.ref(pipeline), sizes
        self.code = _code(type(pipeline))
        self.alike = 0
        self.others: Counter[tuple[Size, Size, Size]] = Counter()  # asked (pixels), expected and painted
        self.expected: dict[Size, Size | None] = {}
        self.leases: list[Lease] = []  # of patches that go by the size

    def __deepcopy__(self, memo: dict[int, Any]) -> AskedSize:
        return self

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # taken off since the call began, see ``gate``
            return
        if torch.compiler.is_compiling():
            return  # the callers of compiled code are not seen; what is declared is said all the same
        _uncompiled(self, module)

    # Around the module that is compiled itself this runs outside of the graph, and is no graph of its own.
    skip_code(before.__code__)

    def _see(self, module: nn.Module) -> None:
        asked = self.asked()
        context = vars(module).get(CONTEXT)
        geometry = None if context is None else context.geometry
        if asked is None or geometry is None or geometry.sample is None:
            return
        if asked not in self.expected:
            self.expected[asked] = self._latents(asked)
        expected = self.expected[asked]
        if expected is None:
            return
        painted = geometry.sample
        rows, columns = self.sizes.patch or (1, 1)
        if (painted[0] // rows * rows, painted[1] // columns * columns) == expected:
            self.alike += 1
        else:
            self.others[asked, expected, painted] += 1
            if any(lease.active for lease in self.leases) and sum(self.others.values()) == 1:
                warnings.warn(f"{self.notes()[0]}. Said once; later ones are in report()", stacklevel=2)

    def _latents(self, asked: Size) -> Size | None:
        try:
            return self.sizes.latents(asked)
        except TrainlessError:
            return None

    def asked(self) -> Size | None:
        """(height, width) that the pipeline's call under way was given, both of them; None when it was not."""
        pipeline = self.pipeline()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and pipeline is not None:
            if frame.f_code is self.code and frame.f_locals.get("self") is pipeline:
                given = _arguments(frame.f_back, type(pipeline), pipeline)
                sides = given.get("height"), given.get("width")
                whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides)
                return sides if whole else None  # type: ignore[return-value]
            frame = frame.f_back
        return None

    def notes(self) -> list[str]:
        """What was painted at another size than asked; before any call was seen, what is declared."""
        pipeline = self.pipeline()
        if pipeline is None:
            return []
        name, found = type(pipeline).__name__, rescaling_of(type(pipeline))
        said = [
            f"{name} was asked for {_text(asked)} pixels, which are {_text(expected)} latents, and gave its denoiser "
            f"{_text(painted)} ({count} calls); {_fix(found)}"
            for (asked, expected, painted), count in self.others.items()
        ]
        told = declared(pipeline)
        return said if said or self.alike or told is None else [told]


_uncompiled = torch.compiler.disable(
    AskedSize._see, reason="trainless notes the size of the call outside compiled regions"
)


def _code(kind: type) -> CodeType | None:
    """The code of a pipeline's own ``__call__``, below decorators."""
    call = kind.__call__
    while hasattr(call, "__wrapped__"):
        call = call.__wrapped__
    code = getattr(call, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _arguments(frame: FrameType | None, kind: type, pipeline: Any) -> dict[str, Any]:
    """The arguments that a decorator of ``__call__`` passes on: the call's own names change on its way.

    Every pipeline's call stands below ``torch.no_grad``; without that nothing is read.
    """
    found = {} if frame is None else frame.f_locals
    args, kwargs = found.get("args"), found.get("kwargs")
    if not (isinstance(args, tuple) and isinstance(kwargs, dict) and args and args[0] is pipeline):
        return {}
    try:
        return dict(inspect.signature(kind.__call__).bind_partial(*args, **kwargs).arguments)
    except TypeError:
        return {}


def _text(size: Size) -> str:
    return f"{size[0]}×{size[1]}"
