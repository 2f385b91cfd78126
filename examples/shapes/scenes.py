"""Scenes of coloured shapes: what may be asked for, how it is said, and how it is drawn.

A `Request` is what a caption says, a `Scene` is one picture of it: things with exact places. The captions
form a small closed language, so that `parse(caption(request)) == request` for every request:

    caption   = group [relation group]  |  group "at the" place  |  group "and" group ["and" group]
    group     = ("a" | "an" | "two" | "three" | "four") ["small" | "large"] colour shape["s"]
    relation  = "left of" | "right of" | "above" | "below"
    place     = "left" | "right" | "top" | "bottom" | "middle"

No size word means middle-sized. Lengths are pixels of the picture; x grows to the right, y downwards. Sizes
are relative to the shorter side, so a large circle is as large a part of a 128 x 128 picture as of a 64 x 64
one. Everything random comes from the numpy generator that is passed in.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

BACKGROUND = (0.92, 0.92, 0.92)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.55, 0.06),
    "yellow": (0.97, 0.88, 0.12),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.13, 0.32, 0.86),
    "purple": (0.56, 0.20, 0.70),
    "black": (0.09, 0.09, 0.11),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}
# Radius of a circle of each size, in 64ths of the shorter side; the gaps make sizes readable.
SIZES = {"small": (5.3, 6.3), "medium": (8.0, 9.2), "large": (11.5, 13.0)}
NUMBERS = ("a", "two", "three", "four")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# The part of the picture, x from, to, y from, to, in which a thing at this place has its centre.
PLACES = {
    "left": (0.0, 0.32, 0.4, 0.6),
    "right": (0.68, 1.0, 0.4, 0.6),
    "top": (0.4, 0.6, 0.0, 0.32),
    "bottom": (0.4, 0.6, 0.68, 1.0),
    "middle": (0.42, 0.58, 0.42, 0.58),
}
SIDE = 64  # of the pictures that the models are trained on
MOST = 4  # things in a captioned scene
GAP = 2.5  # between things, in 64ths of the shorter side


@dataclass(frozen=True)
class Group:
    """Equal things: how many, and what they are."""

    count: int
    size: str
    colour: str
    shape: str

    @property
    def kind(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Request:
    """What a caption asks for. ``relation``: of the first group to the second; ``place``: of the only thing."""

    groups: tuple[Group, ...]
    relation: str | None = None
    place: str | None = None

    @property
    def count(self) -> int:
        return sum(group.count for group in self.groups)


@dataclass(frozen=True)
class Thing:
    """One shape in a picture: centre of mass and radius in pixels (the radius that a circle of its size has)."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    height: int
    width: int
    things: tuple[Thing, ...]


# ---------------------------------------------------------------- the language


def caption(request: Request) -> str:
    """The request in words."""
    said = [_group(group) for group in request.groups]
    if request.relation:
        return f"{said[0]} {request.relation} {said[1]}"
    if request.place:
        return f"{said[0]} at the {request.place}"
    return " and ".join(said)


def _group(group: Group) -> str:
    size = "" if group.size == "medium" else f"{group.size} "
    shape = group.shape if group.count == 1 else PLURALS[group.shape]
    words = f"{size}{group.colour} {shape}"
    number = "an" if group.count == 1 and words[0] in "aeiou" else NUMBERS[group.count - 1]
    return f"{number} {words}"


def parse(text: str) -> Request:
    """The request that a caption makes. Raises ValueError with what is understood when it is none."""
    words = text.lower().replace(",", " ").split()
    foreign = unknown_words(text)
    if foreign:
        raise ValueError(f"{_quoted(foreign)} is outside the vocabulary of these scenes; known are {KNOWN}")
    reader = _Words(words, text)
    groups, relation, place = [reader.group()], None, None
    while not reader.done:
        if reader.take("and"):
            groups.append(reader.group())
        elif place is None and reader.take("at", "the"):
            place = reader.one_of(PLACES, "a place")
        else:
            relation = reader.relation()
            groups.append(reader.group())
    request = Request(tuple(groups), relation, place)
    if len({group.kind for group in groups}) < len(groups):
        raise ValueError(
            f"{text!r} names the same things twice; name each colour and shape once, with its number; known are {KNOWN}"
        )
    if len(groups) > 3 or (relation and len(groups) != 2) or (place and (relation or request.count != 1)):
        raise ValueError(
            f"{text!r} says more than these captions can: a relation joins two groups, a place goes with "
            f"one thing alone, and there are at most three groups; known are {KNOWN}"
        )
    return request


class _Words:
    """Words read from left to right."""

    def __init__(self, words: Sequence[str], text: str):
        self.words, self.text, self.at = words, text, 0

    @property
    def done(self) -> bool:
        return self.at >= len(self.words)

    def take(self, *expected: str) -> bool:
        if tuple(self.words[self.at : self.at + len(expected)]) != expected:
            return False
        self.at += len(expected)
        return True

    def one_of(self, known: Sequence[str] | dict[str, object], what: str) -> str:
        if self.done or self.words[self.at] not in known:
            found = "the end" if self.done else repr(self.words[self.at])
            raise ValueError(f"{self.text!r}: {what} was expected where {found} stands; known are {KNOWN}")
        self.at += 1
        return self.words[self.at - 1]

    def group(self) -> Group:
        count = 1 if self.take("an") else NUMBERS.index(self.one_of(NUMBERS, "a number")) + 1
        size = next((s for s in ("small", "large") if self.take(s)), "medium")
        colour = self.one_of(COLOURS, "a colour")  # type: ignore[arg-type]
        names = {(s if count == 1 else PLURALS[s]): s for s in SHAPES}
        shape = names[self.one_of(names, "a shape" if count == 1 else "shapes")]  # type: ignore[arg-type]
        return Group(count, size, colour, shape)

    def relation(self) -> str:
        for relation in RELATIONS:
            if self.take(*relation.split()):
                return relation
        raise ValueError(
            f"{self.text!r}: a relation was expected where {self.words[self.at]!r} stands; known are {KNOWN}"
        )


def vocabulary() -> list[str]:
    """Every word of a caption, in a fixed order: the tokenizers are built from it."""
    joints = ["and", "at", "the", *(word for relation in RELATIONS for word in relation.split())]
    words = [*NUMBERS, "an", "small", "large", *COLOURS, *SHAPES, *PLURALS.values(), *joints, *PLACES]
    return list(dict.fromkeys(words))


def unknown_words(text: str) -> list[str]:
    """Words of ``text`` that no caption has."""
    known = set(vocabulary())
    return [word for word in dict.fromkeys(text.lower().replace(",", " ").split()) if word not in known]


def _quoted(words: Sequence[str]) -> str:
    said = []
    for word in words:
        near = difflib.get_close_matches(word, vocabulary(), 1)
        said.append(f"{word!r} (did you mean {near[0]!r}?)" if near else repr(word))
    return ", ".join(said)


KNOWN = (
    "captions such as 'a large red circle left of two small blue squares', 'a black star at the top' or "
    f"'three green crosses and a yellow triangle'. Colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
    f"sizes: small, large or no word; relations: {', '.join(RELATIONS)}; places: {', '.join(PLACES)}"
)

# ---------------------------------------------------------------- sampling


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    """One of the choices, all as likely. (``rng.choice`` takes ten times as long.)"""
    return choices[int(rng.integers(len(choices)))]


def sample_request(rng: np.random.Generator) -> Request:
    """A random request that fits into a picture of any size."""
    kinds, shares = (
        ("one", "place", "several", "relation", "pair", "three"),
        (0.12, 0.14, 0.2, 0.3, 0.14, 0.1),
    )
    kind = kinds[int(np.searchsorted(np.cumsum(shares), rng.random() * 0.999999))]
    counts = {
        "one": (1,),
        "place": (1,),
        "several": (int(rng.integers(2, 5)),),
        "relation": (1, 1) if rng.random() < 0.7 else tuple(int(n) for n in rng.permutation([1, 2])),
        "pair": tuple(int(n) for n in rng.integers(1, 3, 2)),
        "three": (1, 1, 1),
    }[kind]
    seen: set[tuple[str, str]] = set()
    groups = []
    for count in counts:
        while True:  # a caption that names the same things twice has no single meaning
            colour, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
            if (colour, shape) not in seen:
                break
        seen.add((colour, shape))
        sizes = ("small", "medium", "large") if sum(counts) <= 2 else ("small", "medium")
        groups.append(Group(count, pick(rng, sizes), colour, shape))
    relation = pick(rng, tuple(RELATIONS)) if kind == "relation" else None
    place = pick(rng, tuple(PLACES)) if kind == "place" else None
    return Request(tuple(groups), relation, place)


def arrange(request: Request, rng: np.random.Generator, height: int = SIDE, width: int = SIDE) -> Scene:
    """A scene of ``height`` x ``width`` pixels that the caption describes.

    Things stand apart from each other and from the border. Raises ValueError when they do not fit.
    """
    unit = min(height, width) / SIDE
    wanted = [
        (group, index, unit * rng.uniform(*SIZES[group.size]))
        for index, group in enumerate(request.groups)
        for _ in range(group.count)
    ]
    # Big things first: they find room while there is some.
    wanted.sort(key=lambda want: -want[2] * EXTENT[want[0].shape])
    for _ in range(40):
        placed = _arrange_once(request, wanted, rng, height, width, unit)
        if placed is not None:
            return Scene(height, width, placed)
    raise ValueError(
        f"{caption(request)!r} does not fit into {width} x {height} pixels; ask for fewer or smaller"
    )


def _arrange_once(
    request: Request,
    wanted: Sequence[tuple[Group, int, float]],
    rng: np.random.Generator,
    height: int,
    width: int,
    unit: float,
) -> tuple[Thing, ...] | None:
    things: list[Thing] = []
    owners: list[int] = []
    left, right, top, bottom = PLACES[request.place] if request.place else (0.0, 1.0, 0.0, 1.0)
    for group, owner, radius in wanted:
        reach = radius * EXTENT[group.shape]
        border = reach + 1.0 * unit
        low = np.array([max(left * width, border), max(top * height, border)])
        high = np.array([min(right * width, width - border), min(bottom * height, height - border)])
        if (low > high).any():
            low, high = np.minimum(low, (low + high) / 2), np.maximum(high, (low + high) / 2)
        spots = rng.uniform(low, high, (48, 2))
        free = np.ones(len(spots), bool)
        for other, whose in zip(things, owners, strict=True):
            away = spots - (other.x, other.y)
            free &= np.hypot(*away.T) >= reach + other.radius * EXTENT[other.shape] + GAP * unit
            if request.relation and whose != owner:
                along = np.array(RELATIONS[request.relation]) * (1 if owner == 0 else -1)
                forward, aside = away @ along, np.abs(away @ along[::-1])
                free &= forward >= aside * 1.15
        if not free.any():
            return None
        x, y = spots[int(np.argmax(free))]
        things.append(Thing(group.size, group.colour, group.shape, float(x), float(y), radius))
        owners.append(owner)
    return tuple(things)


def sample_scene(rng: np.random.Generator, height: int = SIDE, width: int = SIDE) -> tuple[Request, Scene]:
    """A random captioned scene."""
    while True:
        request = sample_request(rng)
        try:
            return request, arrange(request, rng, height, width)
        except ValueError:
            continue  # rare: four middle-sized crosses in an unlucky order


# ---------------------------------------------------------------- drawing


def _regular(radii: Sequence[float], start: float) -> Array:
    """Corners at equal angles with radii in turn; the first one at ``start`` (radians, y downwards)."""
    angles = start + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32) * np.float32(radii)[:, None]


def _cross(arm: float, half: float) -> Array:
    quarter = [(half, -half), (arm, -half), (arm, half), (half, half)]
    points, turned = [], quarter
    for _ in range(4):
        points += turned[1:3] + turned[3:]
        turned = [(-y, x) for x, y in turned]
    return np.array(points, np.float32)


# Corners around the centre of mass for a thing of radius 1; a circle has none.
CORNERS: dict[str, Array | None] = {
    "circle": None,
    "square": _regular([math.sqrt(math.pi / 2)] * 4, math.pi / 4),
    "triangle": _regular([1.3] * 3, -math.pi / 2),
    "star": _regular([1.4, 0.63] * 5, -math.pi / 2),
    "cross": _cross(1.12, 0.38),
}


def _area(corners: Array | None) -> float:
    if corners is None:
        return math.pi
    x, y = corners.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


AREA = {shape: _area(corners) for shape, corners in CORNERS.items()}  # of a thing of radius 1
EXTENT = {s: 1.0 if c is None else float(np.hypot(*c.T).max()) for s, c in CORNERS.items()}


def coverage(shape: str, x: float, y: float, radius: float, xs: Array, ys: Array) -> Array:
    """How much of each pixel the shape covers, 0..1, from the distance of the pixel's centre to the outline.

    xs (W,), ys (H,): coordinates of the centres of pixels. Returns (H, W).
    """
    px, py = np.meshgrid((xs - x).astype(np.float32), (ys - y).astype(np.float32))
    corners = CORNERS[shape]
    if corners is None:
        outside = np.hypot(px, py) - radius
    else:
        outside = _polygon_distance(px, py, corners * np.float32(radius))
    return np.clip(0.5 - outside, 0, 1).astype(np.float32)


def _polygon_distance(px: Array, py: Array, corners: Array) -> Array:
    """Signed distance to the outline of a polygon, negative inside."""
    nearest = np.full(px.shape, np.inf, np.float32)
    inside = np.zeros(px.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = px - ax, py - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        if ey != 0:  # a ray to the right crosses this side
            crosses = (ay > py) != (by > py)
            inside ^= crosses & (px < ax + ex * (py - ay) / ey)
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance)


def draw(scene: Scene) -> Array:
    """The picture, (height, width, 3), values 0..1."""
    image = np.empty((scene.height, scene.width, 3), np.float32)
    image[:] = BACKGROUND
    for thing in scene.things:
        reach = thing.radius * EXTENT[thing.shape] + 2
        x0, x1 = max(int(thing.x - reach), 0), min(int(thing.x + reach) + 1, scene.width)
        y0, y1 = max(int(thing.y - reach), 0), min(int(thing.y + reach) + 1, scene.height)
        xs, ys = np.arange(x0, x1) + np.float32(0.5), np.arange(y0, y1) + np.float32(0.5)
        part = coverage(thing.shape, thing.x, thing.y, thing.radius, xs, ys)[..., None]
        box = image[y0:y1, x0:x1]
        box += part * (np.float32(COLOURS[thing.colour]) - box)
    return image


def rng_for(*numbers: int) -> np.random.Generator:
    """The generator that belongs to these numbers, such as seed, stage and step: no state to save."""
    return np.random.default_rng(np.random.SeedSequence(numbers))
