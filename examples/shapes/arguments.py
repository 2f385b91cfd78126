"""What the programs here and the benchmarks on their models accept as arguments: checked before any model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from scenes import SIDE


def positive(text: str) -> int:
    """A whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return value


def size(text: str) -> tuple[int, int]:
    """HxW as (height, width): what the autoencoder can divide and things can be drawn on."""
    try:
        height, width = (int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, such as 64x96") from None
    if height % 8 or width % 8 or min(height, width) < SIDE // 2:
        raise argparse.ArgumentTypeError(
            f"{text}: both sides must be multiples of 8 and at least {SIDE // 2}"
        )
    return height, width


def output(*endings: str) -> Callable[[str], Path]:
    """The argparse type of a file to write: one of these endings, in a folder that is there."""

    def check(text: str) -> Path:
        file = Path(text)
        if endings and file.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(endings)}")
        if not file.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {str(file.parent)!r} for {text!r}")
        return file

    return check
