"""Results as JSON lines that a killed run leaves whole, and means of them with bootstrap intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESAMPLES = 4000


def records(out: Path) -> list[dict[str, Any]]:
    """What is in the file; a line that a kill has torn is passed over, and the next one starts anew."""
    if not out.is_file():
        return []
    text = out.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        out.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def append(out: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by bootstrap over ``values``, one for each item."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(data), (RESAMPLES, len(data)), generator=generator)
    low, high = torch.quantile(
        data[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return float(data.mean()), low, high


def said(values: Sequence[float], form: str) -> str:
    """``mean [low, high]``, or a dash for no values."""
    if not values:
        return "–"
    mean, low, high = interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"
