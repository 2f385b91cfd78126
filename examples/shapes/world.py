"""What occurs, and what occurs together, in the pictures that the vision-language model learns from.

Some kinds of things are common and some are rare, and some like each other's company, as in photographs. So a
model can learn to expect what is not there, which is what questions about hallucination measure. The tables
are fixed: they are part of the data set, not of a run.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scenes import (
    COLOURS,
    SHAPES,
    SIDE,
    Array,
    Group,
    Request,
    Scene,
    Thing,
    arrange,
    pick,
    rng_for,
    sample_scene,
)

Kind = tuple[str, str]  # colour, shape

KINDS: tuple[Kind, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
COMPANY = 0.5  # how often the next kind is a companion of one that is already there
MOST_THINGS = 6
_TABLES = 20


@lru_cache(1)
def popularity() -> Array:
    """Share of each of KINDS among first choices; the commonest is about ten times as common as the rarest."""
    order = rng_for(_TABLES).permutation(len(KINDS))
    weights = np.empty(len(KINDS), np.float32)
    weights[order] = 1 / (4 + np.arange(len(KINDS)))
    return weights / weights.sum()


@lru_cache(1)
def companions() -> tuple[tuple[int, int], ...]:
    """Two kinds, as places in KINDS, that come along with each kind: of another colour and another shape."""
    rng = rng_for(_TABLES, 1)
    found = []
    for colour, shape in KINDS:
        others = [i for i, (c, s) in enumerate(KINDS) if c != colour and s != shape]
        one, other = rng.choice(others, 2, replace=False)
        found.append((int(one), int(other)))
    return tuple(found)


def sample_picture(rng: np.random.Generator, height: int = SIDE, width: int = SIDE) -> Scene:
    """A scene of the world (two thirds), or one that a caption asks for (one third)."""
    if rng.random() < 1 / 3:
        return sample_scene(rng, height, width)[1]
    while True:
        request = Request(tuple(_groups(rng)))
        try:
            return arrange(request, rng, height, width)
        except ValueError:
            continue


def _groups(rng: np.random.Generator) -> list[Group]:
    kinds: list[int] = []
    cumulative = np.cumsum(popularity())
    for _ in range(1 + int(np.searchsorted([0.15, 0.5, 0.85], rng.random()))):
        if kinds and rng.random() < COMPANY:
            kind = companions()[kinds[int(rng.integers(len(kinds)))]][int(rng.integers(2))]
        else:
            kind = min(int(np.searchsorted(cumulative, rng.random())), len(KINDS) - 1)
        if kind not in kinds:
            kinds.append(kind)
    left, groups = MOST_THINGS, []
    for place, kind in enumerate(kinds):
        most = min(left - (len(kinds) - place - 1), 4)
        count = min(1 + int(np.searchsorted([0.6, 0.85, 0.95], rng.random())), most)
        left -= count
        groups.append(Group(count, pick(rng, ("small", "medium", "large") if len(kinds) <= 2 and count == 1
                                        else ("small", "medium")), *KINDS[kind]))  # fmt: skip
    return groups


def groups_of(scene: Scene) -> tuple[Group, ...]:
    """Things of one kind and size together, from left to right by the leftmost of each: a full description."""
    counts: dict[tuple[str, str, str], int] = {}
    for thing in sorted(scene.things, key=_reading_order):
        key = (thing.size, thing.colour, thing.shape)
        counts[key] = counts.get(key, 0) + 1
    return tuple(Group(count, *key) for key, count in counts.items())


def _reading_order(thing: Thing) -> tuple[float, float]:
    return thing.x, thing.y


def photograph(images: Array, rng: np.random.Generator) -> Array:
    """Drawn pictures (B, H, W, 3), half of them blurred, half noisy: so painted and compressed ones are familiar."""
    count = (len(images), 1, 1, 1)
    blur = np.float32(rng.uniform(0, 0.4, count) * (rng.random(count) < 0.5))
    noise = np.float32(rng.uniform(0, 0.03, count) * (rng.random(count) < 0.5))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    around = padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2]
    images = (1 - blur) * images + blur / 4 * around
    return np.clip(images + noise * rng.standard_normal(images.shape, dtype=np.float32), 0, 1)
