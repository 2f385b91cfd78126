"""Results as JSON lines that a killed run leaves whole, and means of them with bootstrap intervals."""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainless.bench.run import cpu_name

RESAMPLES = 4000


def file_of(text: str) -> Path:
    """The argparse type of --out. The table is written beside it as .md, so it must be another file."""
    if not text.endswith(".jsonl"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .jsonl")
    return Path(text)


def chosen(parser: argparse.ArgumentParser, names: Sequence[str], words: Sequence[str] | None) -> list[str]:
    """The names with one of the words of --only in them, all of them without words. An error where a word is in none."""
    lost = [word for word in words or () if not any(word in name for name in names)]
    if lost:
        parser.error(f"--only: {', '.join(map(repr, lost))} is part of none of these: {'; '.join(names)}")
    return [name for name in names if not words or any(word in name for word in words)]


def runs(items: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Ascending numbers as stretches (first, end) without a gap, each of ``most`` at most."""
    found: list[tuple[int, int]] = []
    for item in items:
        if found and found[-1][1] == item and item - found[-1][0] < most:
            found[-1] = (found[-1][0], item + 1)
        else:
            found.append((item, item + 1))
    return found


def records(out: Path) -> list[dict[str, Any]]:
    """What is in the file, without a last line that a kill has torn or that another run is just writing.

    Ends the program with the line where the file holds anything else.
    """
    if not out.is_file():
        return []
    found = []
    for number, line in enumerate(out.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError:
                raise SystemExit(
                    f"{out}:{number}: no record; take that line out, or give another --out"
                ) from None
    return found


def append(out: Path, record: dict[str, Any]) -> None:
    """Add a record with date, machine and threads of its measurement, in one piece: two runs may share a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({**record, "date": now, "cpu": cpu_name(), "threads": torch.get_num_threads()}) + "\n"
    with out.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            torn = file.read(1) != b"\n"
            if torn:  # by a kill: what is left of that line is no record
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())


def when(found: Sequence[dict[str, Any]], cpu: str) -> str:
    """When, where and on how many threads these records were measured; ``cpu``: where of those that do not say."""
    days = sorted({record["date"][:10] for record in found})
    places: dict[str, set[int]] = {}
    for record in found:
        places.setdefault(record.get("cpu", cpu), set()).add(record["threads"])
    where = [
        f"{name}, {' or '.join(map(str, sorted(n)))} thread{'s' if n != {1} else ''}"
        for name, n in sorted(places.items())
    ]
    return f"{' to '.join(dict.fromkeys((days[0], days[-1])))} · {' and '.join(where)}"


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
