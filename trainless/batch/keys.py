"""What makes a result the same result: the key of each sample, and the seed that derives from it.

A key covers the content of the item (media by their bytes), which of several equal items it is, the
sample, the seed and the settings. ``id`` and ``meta`` are not in it, nor are batch size, order, number
of processes or what else is in the file: a resumed run finds its results by key alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .items import Item
from .pictures import Picture
from .settings import Settings

__all__ = ["UNKNOWN", "Job", "Settings", "jobs", "rename"]


# Stands in for settings while prompts are being checked: the model's digest takes time, and is not
# worth taking when a line is wrong.
UNKNOWN = Settings("", None, "", 0, None, None, None)


@dataclass
class Job:
    """One sample of one item. ``length`` is the prompt's tokens; ``tokens`` only for text models."""

    item: Item
    id: str | int
    sample: int
    key: str
    seed: int
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    refusal: tuple[str, str] | None = None  # error type and message, when it cannot be run
    note: str | None = None  # what the reader of its record should know

    @property
    def label(self) -> str:
        """What people call it: the id that its line gives, or the number of the line, and which sample it is."""
        name = str(self.item.id) if self.item.id is not None else self.item.where.rpartition(":")[2]
        return f"{name} ({self.sample + 1} of {self.item.n})" if self.item.n > 1 else name


def jobs(items: Iterable[Item], settings: Settings) -> list[Job]:
    """Every sample of every item with its key and seed, in order."""
    seen: Counter[str] = Counter()
    media: dict[Picture, str] = {}
    found = []
    for item in items:
        content = _content(item, media)
        occurrence = seen[content]
        seen[content] += 1
        name = item.id if item.id is not None else content[:16] + (f"-{occurrence + 1}" if occurrence else "")
        for sample in range(item.n):
            seed = settings.seed if item.seed is None else item.seed
            key = _hash({**settings.to_dict(), "seed": seed, "item": [content, occurrence, sample]})[:32]
            # The seed that an item names is used as it is; further samples need others.
            own = item.seed if item.seed is not None and sample == 0 else int(_hash(["seed", key])[:13], 16)
            found.append(Job(item, name, sample, key, own))
    return found


def rename(work: Iterable[Job], named: Iterable[Job]) -> None:
    """Give each job the key and seed of its twin."""
    for job, twin in zip(work, named, strict=True):
        job.key, job.seed = twin.key, twin.seed


def _content(item: Item, media: dict[Picture, str]) -> str:
    for picture in item.images:
        if picture not in media:
            media[picture] = hashlib.sha256(picture.read()).hexdigest()
    return _hash(
        {
            "prompt": item.prompt,
            "messages": item.messages,
            "images": [media[picture] for picture in item.images],
            "negative_prompt": item.negative_prompt,
            "params": dict(item.params),
            "seed": item.seed,
        }
    )


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
