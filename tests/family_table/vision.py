"""Vision-language models: every class that transformers lists for text from images, on prompts of text.

Those that take no prompt without an image are given one; nothing of it stands in the prompt.
"""

from __future__ import annotations

from typing import Any

from oracle import vision_whole
from oracle import vision_zoo as zoo

from .language import line_of


def names() -> list[str]:
    return zoo.kinds()


def line(kind: str) -> dict[str, Any]:
    return line_of(kind, zoo.build, lambda model, batch: zoo.given(kind, model, batch))


def missing(kind: str) -> str | None:
    """The package without which this family cannot be tried here."""
    return vision_whole.missing(kind)
