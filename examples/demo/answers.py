"""Part of the demo: questions about pictures, answered without and with a packed cache.

The pictures are drawn here, so every right answer is known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from command import generate
from PIL import Image
from questions import DESCRIBE, Question, parse_answer, sample_questions
from scenes import draw, rng_for
from world import sample_picture

MODEL = "demo:shapes-vlm"
PICTURES, QUESTIONS, SEED = 8, 4, 5
# Prompts are short, so nothing is left out of packing.
RUNS = ((), ("--patch", "kvquant", "--set", "kvquant.residual=0", "--set", "kvquant.group=16"))


def show(out: Path, limit: int = 1000) -> str:
    """Run the part; results go into ``out``. Returns what is to be read at the end."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    rng = rng_for(SEED)
    asked: dict[str, Question] = {}
    lines = []
    for i in range(min(PICTURES, limit)):
        scene = sample_picture(rng)
        file = Path("pictures") / f"{i}.png"
        Image.fromarray(np.round(draw(scene) * 255).astype(np.uint8)).save(out / file)
        for j, question in enumerate(sample_questions(scene, rng, QUESTIONS)):
            asked[f"{i}-{j}"] = question
            lines.append(_line(f"{i}-{j}", file, question.text))
        lines.append(_line(f"{i}-caption", file, DESCRIBE))
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = []
    for options in RUNS:
        name = options[1] if options else "unpatched"
        records = generate(
            MODEL, prompts, out / name, "--batch-size", "16", "--max-new-tokens", "32", *options
        )
        right = sum(parse_answer(q, records[i]["text"]) == q.answer for i, q in asked.items())
        rows.append((name, right, records["0-caption"]["text"]))
    found = {"model": MODEL, "pictures": min(PICTURES, limit), "questions": len(asked), "rows": rows}
    (out / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return f"{table(found)}\n\nanswers in {out}, the pictures in {out / 'pictures'}"


def _line(name: str, file: Path, text: str) -> dict[str, Any]:
    content = [{"type": "image", "image": str(file)}, {"type": "text", "text": text}]
    return {"id": name, "messages": [{"role": "user", "content": content}]}


def table(found: dict[str, Any]) -> str:
    """What came out, at most 80 columns wide."""
    head = f"{found['model']}: {found['questions']} questions about {found['pictures']} pictures"
    lines = [head, "", f"{'patched with':<14}{'right':>12}    what it says of the first picture"]
    for name, right, said in found["rows"]:
        said = said if len(said) <= 48 else said[:47] + "…"
        lines.append(f"{name:<14}{right:>5} of {found['questions']:>3}    {said}")
    return "\n".join(lines)
