"""The vocabulary: parts of a token sequence, what a call of a denoiser says of them, what is declared per class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ....seams import ImageTokens

Size = tuple[int, int]  # rows, columns
At = Callable[[Size], Size]
Given = Mapping[str, Any]  # the arguments of a denoiser's call, by name

# What the tokens of an attention layer are. The keys of the first three kinds hold image tokens.
IMAGE = "image"  # the image's, with reference images beside it where the class puts them there
JOINT = "joint"  # image and text in one sequence
OBJECTS = "objects"  # the image's, and boxes that guide it
CROSS = "cross"  # the image's as queries, others as keys
TEXT = "text"
REFERENCE = "reference"
FRAMES = "frames"
OWN = "own"  # what the class works on, where that is no image: sound, embeddings, residues
ROLES = {
    IMAGE: "self", JOINT: "joint", OBJECTS: "self", CROSS: "cross", TEXT: "self", REFERENCE: "self", FRAMES: "self",
    OWN: "self",
}  # fmt: skip
WITHOUT_IMAGE = {
    TEXT: "its tokens are text only, before text meets the image",
    REFERENCE: "its tokens are reference images only",
    FRAMES: "its tokens are frames, not image tokens",
    CROSS: "its keys are not image tokens",
}


SELF_AND_CROSS = {"*.attn1": IMAGE, "*.attn2": CROSS}
DOUBLE_AND_SINGLE = {"transformer_blocks.*": JOINT, "single_transformer_blocks.*": JOINT}


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def holds_no_image(holds: str | None) -> str | None:
    """Why no image token can be told in a layer whose tokens are of that kind, or None."""
    return WITHOUT_IMAGE.get(holds or "")


def undeclared(family: str) -> str:
    return f"which tokens of a {family} are the image's is not declared for this class"


class Unknown(Exception):
    """A call does not say what its tokens are; the text says why, to follow on "is not known: "."""


class Unseen(Unknown):
    """What the tokens are lies in a tensor's values, and a call that is being traced has none."""


def product(size: Size) -> int:
    return size[0] * size[1]


@dataclass(frozen=True)
class Part:
    """So many tokens of one kind. ``rows``: whether they are queries as well as keys."""

    what: str
    tokens: int
    rows: bool = True


@dataclass(frozen=True, eq=False)
class Sequence:
    """The keys of an attention call, part by part; those of the generated image are the part called "image".

    grid: rows and columns of one image, None where its tokens do not lie row by row. grids: how many of them the
    part holds (layers of a layered image). starts: (B,) first image token where the rows of a batch differ. at: a
    latent size -> the grid, where that is another for each layer.
    """

    parts: tuple[Part, ...]
    grid: Size | None = None
    grids: int = 1
    starts: Tensor | None = None
    at: At | None = None

    @property
    def keys(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def rows(self) -> int:
        return sum(part.tokens for part in self.parts if part.rows)

    def image(self, at: At) -> ImageTokens:
        """Where the image stands; ``at`` is used unless the sequence has one of its own."""
        first = row = 0
        for part in self.parts:
            if part.what == IMAGE:
                starts = (first, row) if self.starts is None else (self.starts, self.starts)
                return ImageTokens(part.tokens, self.at or at, self.grid, self.grids, *starts)
            first, row = first + part.tokens, row + part.tokens * part.rows
        return ImageTokens(0, self.at or at)

    def __str__(self) -> str:
        named = ", ".join(f"{p.tokens} {p.what}{'' if p.rows else ' (keys only)'}" for p in self.parts)
        return f"{self.keys} keys for {self.rows} rows ({named})"


@dataclass(frozen=True, eq=False)
class Geometry:
    """What one call of a denoiser says. sample: latent (rows, columns).

    sequences: by what a layer's tokens are, the sequences that its attention calls may have. pyramid: the same as a
    function of that and the level, for UNets. why: why nothing more is known, when that is so. scaled: the model
    itself scales its logits with the number of tokens in this call, and how to stop that. step: number of the step
    within its run, where somebody asks for it.
    """

    sample: Size | None = None
    sequences: Mapping[str, tuple[Sequence, ...]] = field(default_factory=dict)
    pyramid: Callable[[str, int], tuple[Sequence, ...]] | None = None
    why: str | None = None
    scaled: str | None = None
    timestep: Any = None
    step: int | None = None

    def of(self, kind: str, level: int) -> tuple[Sequence, ...]:
        """The sequences that an attention call of a layer of that kind, at that level, may have."""
        return self.pyramid(kind, level) if self.pyramid is not None else self.sequences.get(kind, ())


Read = Callable[[Any, Given], Geometry]
KindOf = Callable[[Any, str, nn.Module], str | None]


@dataclass(frozen=True, eq=False)
class Layout:
    """What is declared about one class.

    name: module and qualified name. read: a call's arguments -> Geometry; None for a class in which no image tokens
    are known, ``why`` says why. sites: glob on a layer's name inside the model -> what its tokens are,
    the first that matches; or a function of the model, the name and the module. patch: latent pixels per token, None
    in a UNet. levels: the level of a layer by its name, for UNets. streams: text and image are put together by the
    attention processor, so its class decides on the order. several: an attention layer calls attention several times,
    over parts of the sequence. frames: a video class, of which one frame is an image. linear: its own attention to
    the image has no softmax. examples: where ``sites`` is a function, names of layers as it would read them.
    """

    name: str
    read: Read | None = None
    sites: Mapping[str, str] | KindOf = field(default_factory=dict)
    patch: Callable[[Any], Size] | None = None
    levels: Callable[[Any], Callable[[str], int | None]] | None = None
    streams: bool = False
    several: bool = False
    frames: bool = False
    linear: bool = False
    examples: Mapping[str, str] = field(default_factory=dict)
    why: str | None = None

    @property
    def family(self) -> str:
        return self.name.rpartition(".")[2]
