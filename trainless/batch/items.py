"""One prompt: its fields, what each may hold, and every fault of a line at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import did_you_mean
from .messages import kind, normalise, string
from .openai import is_openai, translate
from .pictures import Picture, picture

FIELDS = ("id", "prompt", "messages", "image", "images", "negative_prompt", "seed", "n", "params", "meta")
MAX_SEED = 2**63 - 1
MAX_SAMPLES = 100_000


@dataclass
class ItemFaults:
    """Everything that is wrong with the prompts, as ``file:line: what, and what to do``."""

    found: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def __bool__(self) -> bool:
        return bool(self.found)


@dataclass(frozen=True)
class Item:
    """A prompt as given. ``where`` is ``file:line``; ``images`` are those of ``messages`` too, in order."""

    where: str
    id: str | int | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    images: tuple[Picture, ...] = ()
    negative_prompt: str | None = None
    seed: int | None = None
    n: int = 1
    params: Mapping[str, Any] = field(default_factory=dict)
    meta: Any = None

    @property
    def shown(self) -> Any:
        """What a record says the prompt was."""
        return self.prompt if self.messages is None else self.messages


def parse(row: Any, where: str, folder: Path, faults: ItemFaults) -> Item | None:
    """An Item from one row; faults are added, and None is returned, when something is wrong with it.

    Paths of images are relative to ``folder``. Lines of an OpenAI batch file are translated first.
    """
    before = len(faults.found)
    if not isinstance(row, Mapping):
        faults.add(where, f"a prompt is an object with fields, not {kind(row)}")
        return None
    if is_openai(row):
        row = translate(row, where, faults)
    row = {name: value for name, value in row.items() if value is not None}
    for name in row:
        if name not in FIELDS:
            faults.add(where, f"unknown field {name!r}{did_you_mean(str(name), FIELDS)}")
    _identity(row, where, faults)
    _text(row, where, faults)
    so_far = len(faults.found)
    images = _images(row, where, folder, faults)
    messages = None
    if "messages" in row:
        whole = len(faults.found) == so_far
        messages, images = normalise(row["messages"], images if whole else None, folder, where, faults)
    if not isinstance(row.get("params", {}), Mapping):
        faults.add(where, f"params must be an object, not {kind(row['params'])}")
    if not _is_json(row.get("meta")):
        faults.add(where, "meta must be plain JSON data")
    if len(faults.found) > before:
        return None
    return Item(
        where=where,
        id=row.get("id"),
        prompt=row.get("prompt"),
        messages=messages,
        images=images,
        negative_prompt=row.get("negative_prompt"),
        seed=row.get("seed"),
        n=row.get("n", 1),
        params=dict(row.get("params", {})),
        meta=row.get("meta"),
    )


def _identity(row: Mapping[str, Any], where: str, faults: ItemFaults) -> None:
    name = row.get("id")
    if "id" in row and (isinstance(name, bool) or not isinstance(name, (str, int)) or name == ""):
        faults.add(where, f"id must be a string or an integer, not {kind(name)}")
    for what, low, high in (("seed", 0, MAX_SEED), ("n", 1, MAX_SAMPLES)):
        value = row.get(what, low)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            faults.add(where, f"{what} must be an integer from {low} to {high}, not {value!r}")


def _text(row: Mapping[str, Any], where: str, faults: ItemFaults) -> None:
    if "prompt" in row and "messages" in row:
        faults.add(where, "prompt and messages are both given; keep one")
    elif "prompt" not in row and "messages" not in row:
        faults.add(where, "the prompt is missing: give prompt or messages")
    for name in ("prompt", "negative_prompt"):
        if name in row:
            string(row[name], name, where, faults)


def _images(row: Mapping[str, Any], where: str, folder: Path, faults: ItemFaults) -> tuple[Picture, ...]:
    if "image" in row and "images" in row:
        faults.add(where, "image and images are both given; keep one")
        return ()
    names = [row["image"]] if "image" in row else row.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        faults.add(where, "image takes a path, and images a list of paths")
        return ()
    found = []
    for name in names:
        one = picture(name, folder)
        if isinstance(one, str):
            faults.add(where, one)
        else:
            found.append(one)
    return tuple(found)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError):
        return False
    return True
