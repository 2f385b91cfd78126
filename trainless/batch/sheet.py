"""All pictures of a run at a glance: one sheet, in the order of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST = 64  # pictures on the sheet
LEAST, LARGEST = 96, 192  # pixels of a picture's square: as many as the largest has, within these
GAP, WORDS = 8, 30  # pixels between them, and for the words below


def contact_sheet(entries: Sequence[tuple[str, Path]]) -> Any:
    """A PIL image of the first pictures with the words that belong to each. entries: (words, file)."""
    from PIL import Image, ImageDraw, ImageFont

    shown = entries[:MOST]
    across = max(1, min(len(shown), 8, round(len(shown) ** 0.5 + 0.49)))
    down = -(-len(shown) // across)
    side = LEAST
    for _, file in shown:
        with Image.open(file) as picture:
            side = min(LARGEST, max(side, *picture.size))
    cell, tall = side + GAP, side + WORDS + GAP
    sheet = Image.new("RGB", (across * cell + GAP, down * tall + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    narrow = not isinstance(
        font, ImageFont.FreeTypeFont
    )  # a Pillow without FreeType writes Latin letters only
    for i, (words, file) in enumerate(shown):
        left, top = GAP + i % across * cell, GAP + i // across * tall
        with Image.open(file) as picture:
            small = picture.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
        words = words.encode("latin-1", "replace").decode("latin-1") if narrow else words
        for line, text in enumerate(_lines(words, side, draw, font)):
            draw.text((left, top + side + 2 + 13 * line), text, fill="black", font=font)
    return sheet


def _lines(words: str, side: int, draw: Any, font: Any) -> list[str]:
    """The words in two lines of a square's width, cut where they are too many."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > side:
            if len(lines) == 2:
                lines[-1] += " …"
                break
            lines.append(word)
        else:
            lines[-1] = longer
    return [_cut(line, side, draw, font) for line in lines]


def _cut(line: str, side: int, draw: Any, font: Any) -> str:
    if draw.textlength(line, font=font) <= side:
        return line
    while line and draw.textlength(line + "…", font=font) > side:
        line = line[:-1]
    return line + "…"
