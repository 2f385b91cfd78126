"""A file of scenes that are sampled and drawn once, so that training does not wait for them."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scenes import COLOURS, SHAPES, SIDE, SIZES, Array, Scene, Thing, draw, rng_for
from tqdm import tqdm
from training import Unusable, damaged
from world import MOST_THINGS, sample_picture

_POOL = 30  # what random numbers are for
_NAMES = (tuple(SIZES), tuple(COLOURS), SHAPES)


class Pool:
    """``number`` scenes of 64 x 64 pixels, made with ``seed`` and kept in ``file``: 12 KB each.

    Raises Unusable when the file holds other ones, or is damaged.
    """

    def __init__(self, file: Path, number: int, seed: int):
        if not file.exists():
            _make(file, number, seed)
        try:
            content = np.load(file)
            content.files  # noqa: B018 — an empty file fails here, a torn one above
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise damaged(file, error) from error
        with content as found:
            if (int(found["seed"]), len(found["counts"])) != (seed, number):
                raise Unusable(
                    f"{file} holds {len(found['counts'])} scenes of seed {found['seed']}; delete it"
                )
            self._pixels, self._counts = found["pixels"], found["counts"]
            self._names, self._places = found["names"], found["places"]
            self.seconds = float(found["seconds"])  # that making it took

    def __len__(self) -> int:
        return len(self._counts)

    def images(self, chosen: NDArray[np.int64]) -> Array:
        """Pictures (B, 64, 64, 3), values 0..1."""
        return self._pixels[chosen].astype(np.float32) / np.float32(255)

    def scene(self, index: int) -> Scene:
        things = []
        for n in range(self._counts[index]):
            names = [known[i] for known, i in zip(_NAMES, self._names[index, n], strict=True)]
            x, y, radius = (float(v) for v in self._places[index, n])
            things.append(Thing(*names, x, y, radius))
        return Scene(SIDE, SIDE, tuple(things))


def _make(file: Path, number: int, seed: int) -> None:
    began = time.monotonic()
    pixels = np.zeros((number, SIDE, SIDE, 3), np.uint8)
    counts = np.zeros(number, np.int64)
    names = np.zeros((number, MOST_THINGS, 3), np.int64)
    places = np.zeros((number, MOST_THINGS, 3), np.float32)
    rng = rng_for(seed, _POOL)
    for i in tqdm(range(number), desc="pool", dynamic_ncols=True):
        scene = sample_picture(rng)
        pixels[i] = np.round(draw(scene) * 255)
        counts[i] = len(scene.things)
        for n, thing in enumerate(scene.things):
            said = (thing.size, thing.colour, thing.shape)
            names[i, n] = [known.index(word) for known, word in zip(_NAMES, said, strict=True)]
            places[i, n] = thing.x, thing.y, thing.radius
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    with new.open("wb") as stream:
        np.savez(
            stream,
            pixels=pixels,
            counts=counts,
            names=names,
            places=places,
            seed=np.int64(seed),
            seconds=np.float64(time.monotonic() - began),
        )
    new.replace(file)
