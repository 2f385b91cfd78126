"""Part of the demo: captions painted at the trained size and at a larger one, without and with entropy scaling.

A rule-based reader says how much of each caption its picture shows. All pictures are put on one sheet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from command import generate
from evaluate import ATTRIBUTES
from PIL import Image
from reader import agreement
from scenes import parse

MODEL = "demo:shapes"
CAPTIONS = (
    "a large red circle left of a small blue square",
    "three green stars",
    "a yellow triangle above a purple cross",
    "a black star at the top",
    "two orange squares and a blue circle",
    "a large purple triangle",
    "a small red cross right of a green circle",
    "two blue triangles below a yellow star",
)
RUNS = (("64x64", ()), ("96x96", ()), ("96x96", ("entropy",)))
SETTINGS = {"guidance_scale": 4.0}


def show(out: Path, limit: int = 1000) -> str:
    """Run the part; results go into ``out``. Returns what is to be read at the end."""
    out.mkdir(parents=True, exist_ok=True)
    prompts = out / "prompts.jsonl"
    captions = CAPTIONS[:limit]
    lines = [{"id": f"{i}", "prompt": text, "seed": i, "params": SETTINGS} for i, text in enumerate(captions)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows, strips = [], []
    for size, patches in RUNS:
        name = "-".join([size, *patches])
        more = [word for patch in patches for word in ("--patch", patch)]
        options = ("--size", size, "--steps", "20", "--batch-size", "8", *more)
        records = generate(MODEL, prompts, out / name, *options)
        images = [Image.open(out / name / records[line["id"]]["file"]) for line in lines]
        strips.append(images)
        rows.append((size, "+".join(patches) or "unpatched", *scores(images, captions)))
    sheet(strips).save(out / "sheet.png")
    found = {"model": MODEL, "captions": list(captions), "rows": rows}
    (out / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return f"{table(found)}\n\npictures in {out / 'sheet.png'} (a row for each line above)"


def scores(images: list[Any], captions: tuple[str, ...]) -> tuple[float, float]:
    """Mean agreement with the captions, and how many things a picture has more than asked."""
    read = [
        agreement(np.asarray(image, np.float32) / 255, parse(text))
        for image, text in zip(images, captions, strict=True)
    ]
    return (
        float(np.mean([ATTRIBUTES["agreement"](a) for a in read])),
        float(np.mean([a.extra for a in read])),
    )


def sheet(strips: list[list[Any]], gap: int = 4) -> Image.Image:
    """Rows of pictures under each other."""
    width = max(sum(image.width + gap for image in strip) for strip in strips)
    page = Image.new("RGB", (width, sum(strip[0].height + gap for strip in strips)), "white")
    top = 0
    for strip in strips:
        for i, image in enumerate(strip):
            page.paste(image, (i * (image.width + gap), top))
        top += strip[0].height + gap
    return page


def table(found: dict[str, Any]) -> str:
    """What came out, at most 80 columns wide."""
    lines = [f"{found['model']}: {len(found['captions'])} captions, trained at 64x64", ""]
    lines.append(f"{'size':<10}{'patched with':<18}{'agreement':>12}{'things too many':>20}")
    for size, name, agreed, extra in found["rows"]:
        lines.append(f"{size:<10}{name:<18}{agreed:>12.0%}{extra:>20.1f}")
    return "\n".join(lines)
