"""Reads pictures of shapes without any model: what is there, where, and whether a caption is true of it.

The reader finds islands that differ from the background, gives each a colour by its inner pixels, and compares
how it covers its pixels with every shape of the same area at the same centre, sharp and blurred. Area and centre
of mass survive blurring, which is what makes this robust to the decoder of a latent-diffusion model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scenes import AREA, COLOURS, EXTENT, RELATIONS, SIDE, SIZES, Array, Group, Request, Thing, coverage
from scipy import ndimage

NDBool = NDArray[np.bool_]
BLURS = (0.0, 0.8, 1.3)  # standard deviations in pixels that templates are compared at
FIT = 0.42  # an island whose difference to every shape is a larger share of its area than this has no shape
EDGES = (SIZES["small"][1] + SIZES["medium"][0]) / 2, (SIZES["medium"][1] + SIZES["large"][0]) / 2
OTHER = "other"  # the shape of what is none of the shapes
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Seen(Thing):
    """A thing that was read. ``misfit``: share of its area that its shape does not explain, 0 is perfect."""

    misfit: float = 0.0


def read(image: Any, unit: float | None = None) -> list[Seen]:
    """The things in a picture, from left to right.

    image: (H, W, 3) with values 0..1, or a Pillow image. unit: pixels per 64th of the shorter side, by which
    sizes are judged; by default that of the picture. (1.0 judges a larger picture by the sizes of a 64 x 64 one.)
    """
    pixels = as_array(image)
    unit = min(pixels.shape[:2]) / SIDE if unit is None else unit
    ground = np.median(pixels.reshape(-1, 3), 0)
    seen = []
    for island, (rows, columns), colour in _islands(pixels - ground, ground):
        thing = _thing(pixels, ground, island, rows, columns, colour, unit)
        if thing is not None:
            seen.append(thing)
    return sorted(seen, key=lambda thing: (thing.x, thing.y))


def as_array(image: Any) -> Array:
    """(H, W, 3) float32, 0..1. Raises ValueError for anything that is no picture."""
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture of shape {array.shape}: (height, width, 3) was expected")
    array = array.astype(np.float32) / (255.0 if array.dtype.kind in "ui" else 1.0)
    if not np.isfinite(array).all():
        raise ValueError("a picture with NaN or infinite values")
    if array.size and array.max() > 1.5:  # decoders overshoot a little
        raise ValueError(
            f"a picture with values up to {array.max():g}: 0..1, or integers of 0..255, were expected"
        )
    return array


def _islands(difference: Array, ground: Array) -> list[tuple[NDBool, tuple[slice, slice], int]]:
    """Connected areas of one colour: mask inside its box, the box, index of the colour."""
    strength = _PALETTE - ground
    full = (strength**2).sum(1)
    full = np.where(full < 0.01, np.inf, full)  # the colour of the ground itself explains nothing on it
    # The share of each colour that explains a pixel best, and what then remains unexplained.
    share = np.clip(difference @ strength.T / full, 0, 1.3)
    rest = ((difference[:, :, None] - share[..., None] * strength) ** 2).sum(-1)
    best = rest.argmin(-1)
    solid = np.take_along_axis(share, best[..., None], -1)[..., 0]
    labels, _ = ndimage.label(solid > 0.45)
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        mask = labels[box] == number
        # Inner pixels say the colour: those of the rim are mixed with the background or with a neighbour.
        inner = mask & (solid[box] > 0.8)
        if not inner.any():
            inner = mask
        votes = Counter(best[box][inner].tolist())
        colours = [c for c, n in votes.items() if n >= max(12, 0.2 * inner.sum())]
        if len(colours) < 2:
            found.append((mask, box, votes.most_common(1)[0][0]))
            continue
        for colour in colours:  # things that touch
            parts, _ = ndimage.label(mask & (best[box] == colour))
            sizes = np.bincount(parts.ravel())[1:]
            found += [(parts == i + 1, box, colour) for i, size in enumerate(sizes) if size >= 12]
    return found


def _thing(
    pixels: Array, ground: Array, island: NDBool, rows: slice, columns: slice, colour: int, unit: float
) -> Seen | None:
    """The island as a thing, or None for a speck."""
    # Two pixels more on every side hold the soft edge.
    y0, x0 = max(rows.start - 2, 0), max(columns.start - 2, 0)
    y1, x1 = min(rows.stop + 2, pixels.shape[0]), min(columns.stop + 2, pixels.shape[1])
    near = np.zeros((y1 - y0, x1 - x0), bool)
    near[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0] = island
    near = ndimage.binary_dilation(near, iterations=2)
    strength = _PALETTE[colour] - ground
    share = (pixels[y0:y1, x0:x1] - ground) @ strength / (strength @ strength)
    share = np.where(near & (share > 0.08), np.clip(share, 0, 1), 0).astype(np.float32)
    area = float(share.sum())
    if area < 0.4 * AREA["triangle"] * (SIZES["small"][0] * unit) ** 2:
        return None
    xs, ys = np.arange(x0, x1) + np.float32(0.5), np.arange(y0, y1) + np.float32(0.5)
    x, y = float(share.sum(0) @ xs) / area, float(share.sum(1) @ ys) / area
    misfit, shape = min((_misfit(share, s, x, y, area, xs, ys), s) for s in AREA)
    radius = float(np.sqrt(area / AREA[shape]))
    size = "small" if radius < EDGES[0] * unit else "medium" if radius < EDGES[1] * unit else "large"
    return Seen(size, _NAMES[colour], shape if misfit <= FIT else OTHER, x, y, radius, misfit)


def _misfit(share: Array, shape: str, x: float, y: float, area: float, xs: Array, ys: Array) -> float:
    """Least difference between the island and the shape of the same area, as a share of the area."""
    sharp = coverage(shape, x, y, float(np.sqrt(area / AREA[shape])), xs, ys)
    return min(float(np.abs(share - _blurred(sharp, blur)).sum()) / area for blur in BLURS)


def _blurred(image: Array, sigma: float) -> Array:
    if not sigma:
        return image
    kernel = _kernel(sigma)
    return ndimage.correlate1d(
        ndimage.correlate1d(image, kernel, 0, mode="constant"), kernel, 1, mode="constant"
    )


@lru_cache
def _kernel(sigma: float) -> Array:
    reach = np.arange(-3, 4)
    weights = np.exp(-(reach**2) / (2 * sigma**2))
    return (weights / weights.sum()).astype(np.float32)


# ---------------------------------------------------------------- a caption against what was read


@dataclass(frozen=True)
class Agreement:
    """How far a picture is what a caption asks for. Shares are 0..1; None where the caption says nothing.

    things: asked things (colour and shape) that are there. colours, shapes: the same for one of both.
    sizes: of those there, the right size. count: exactly as many things as asked. groups: each asked kind is
    there exactly as often as asked. relation, place: hold for the things that are there.
    extra: things more than asked. whole: everything right.
    """

    things: float
    colours: float
    shapes: float
    sizes: float
    count: bool
    groups: bool
    relation: bool | None
    place: bool | None
    extra: int
    found: int
    whole: bool

    @property
    def repeated(self) -> bool:
        """More things than asked."""
        return self.extra > 0


def agreement(image: Any, request: Request, unit: float | None = None) -> Agreement:
    """Read a picture and hold it against a request (see `read` for ``unit``)."""
    pixels = as_array(image)
    return compare(read(pixels, unit), request, pixels.shape[0], pixels.shape[1])


def compare(seen: Sequence[Thing], request: Request, height: int, width: int) -> Agreement:
    """Hold things in a picture of this size against a request."""
    asked = Counter[tuple[str, str]]()
    for group in request.groups:
        asked[group.kind] += group.count
    there = Counter(thing.kind for thing in seen)
    things = sum((asked & there).values()) / request.count
    right = sum(_right_sizes(seen, group) for group in request.groups)
    matched = sum((asked & there).values())
    groups = all(there[kind] == n for kind, n in asked.items())
    sizes = right / matched if matched else 0.0
    relation = _relation_holds(seen, request) if request.relation else None
    place = _place_holds(seen, request, height, width) if request.place else None
    whole = (
        groups and len(seen) == request.count and sizes == 1 and relation is not False and place is not False
    )
    return Agreement(
        things=things,
        colours=_share(Counter(k[0] for k in asked.elements()), Counter(t.colour for t in seen)),
        shapes=_share(Counter(k[1] for k in asked.elements()), Counter(t.shape for t in seen)),
        sizes=sizes,
        count=len(seen) == request.count,
        groups=groups,
        relation=relation,
        place=place,
        extra=max(len(seen) - request.count, 0),
        found=len(seen),
        whole=whole,
    )  # fmt: skip


def _share(asked: Counter[str], there: Counter[str]) -> float:
    return sum((asked & there).values()) / sum(asked.values())


def _right_sizes(seen: Sequence[Thing], group: Group) -> int:
    return min(sum(t.kind == group.kind and t.size == group.size for t in seen), group.count)


def _relation_holds(seen: Sequence[Thing], request: Request) -> bool:
    """Every thing of the first group stands in the relation to every one of the second, and both are there."""
    first, second = ([t for t in seen if t.kind == group.kind] for group in request.groups)
    assert request.relation is not None
    return bool(first and second) and all(stands(a, b, request.relation) for a in first for b in second)


def stands(one: Thing, other: Thing, relation: str) -> bool:
    """Whether ``one`` is left of (right of, above, below) ``other``: that way, and hardly further aside."""
    along = RELATIONS[relation]
    way = (one.x - other.x, one.y - other.y)
    forward = way[0] * along[0] + way[1] * along[1]
    aside = abs(way[0] * along[1] + way[1] * along[0])
    return forward > 0 and forward >= 0.8 * aside


def _place_holds(seen: Sequence[Thing], request: Request, height: int, width: int) -> bool:
    there = [t for t in seen if t.kind == request.groups[0].kind]
    return bool(there) and all(where(t, height, width) == request.place for t in there)


def where(thing: Thing, height: int, width: int) -> str:
    """Which side of the picture a thing is nearest to, or "middle"."""
    x, y = thing.x / width - 0.5, thing.y / height - 0.5
    if max(abs(x), abs(y)) < 0.13:
        return "middle"
    if abs(x) >= abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def reach(thing: Thing) -> float:
    """Distance from the centre of a thing to its furthest point, in pixels."""
    return thing.radius * EXTENT.get(thing.shape, 1.3)
