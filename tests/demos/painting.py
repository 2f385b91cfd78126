"""Captions painted by a pipeline of coloured shapes, and how far the pictures are what was asked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from evaluate import ATTRIBUTES, new_requests, paint
from reader import agreement

REQUESTS = new_requests(16, seed=1)


def painted(
    pipeline: Any, height: int = 64, width: int = 64, *, steps: int = 10, number: int = 16
) -> list[Any]:
    return paint(pipeline, REQUESTS[:number], height, width, steps=steps, guidance=4.0, batch=number)


def score(images: Sequence[Any]) -> float:
    """Mean agreement with the first captions."""
    pairs = zip(images, REQUESTS[: len(images)], strict=True)
    return float(np.mean([ATTRIBUTES["agreement"](agreement(image, request)) for image, request in pairs]))
