"""Where and how a benchmark was run, and its results as JSON and Markdown under benchmarks/results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trainless.bench.run import cpu_name

RESULTS = Path(__file__).parent / "results"


@dataclass
class Claim:
    """One ratio that was measured, pair by pair, and what it is held against.

    low, high: bounds that the median must keep, or None. withheld: why there is no number.
    """

    what: str
    dtype: str
    ratios: list[float] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    note: str = ""
    withheld: str = ""

    @property
    def value(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Two of the ratios between which the true median lies with 95 % certainty, whatever their distribution.

        From the binomial distribution of how many ratios are below it; None for fewer than six.
        """
        ordered, n = sorted(self.ratios), len(self.ratios)
        below, skipped = 0.0, -1
        while below <= 0.025 and skipped < n:
            skipped += 1
            below += comb(n, skipped) / 2**n
        return (ordered[skipped - 1], ordered[n - skipped]) if skipped > 0 else None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "withheld"
        if self.low is None and self.high is None:
            return ""
        kept = (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)
        return "kept" if kept else "missed"

    def cells(self) -> list[str]:
        if self.value is None:
            return [self.what, self.dtype, "withheld", "", "", "", self.withheld]
        bounds = [
            f"≥ {self.low:.3f}" if self.low is not None else "",
            f"≤ {self.high:.3f}" if self.high is not None else "",
        ]
        target = " and ".join(b for b in bounds if b)
        spread = f"{min(self.ratios):.3f} to {max(self.ratios):.3f}"
        if self.interval is not None:
            spread += f", median {self.interval[0]:.3f} to {self.interval[1]:.3f}"
        return [self.what, self.dtype, f"{self.value:.3f}", spread, target, self.verdict, self.note]


def about() -> dict[str, Any]:
    """Date, machine, versions and command of this run."""
    versions = {"python": platform.python_version()}
    for name in ("trainless", "torch", "transformers", "diffusers", "numba"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", str(Path(sys.argv[0])), *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def queued(device: torch.device) -> int:
    """Calls that are timed together: on a GPU the launches of the next ones hide behind the work of the first."""
    return 10 if device.type == "cuda" else 1


def named(name: str, facts: dict[str, Any], suffix: str) -> Path:
    """``name-<cpu>`` with this suffix in benchmarks/results."""
    slug = re.sub(r"[^a-z0-9]+", "-", facts["cpu"].lower()).strip("-")
    return RESULTS / f"{name}-{slug}{suffix}"


def write(
    name: str, title: str, facts: dict[str, Any], claims: Sequence[Claim], notes: Sequence[str]
) -> list[Path]:
    """``name-<cpu>.json`` and ``.md`` in benchmarks/results, whatever was there before."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    data, page = named(name, facts, ".json"), named(name, facts, ".md")
    found = [{**asdict(c), "value": c.value, "verdict": c.verdict} for c in claims]
    data.write_text(
        json.dumps({**facts, "claims": found, "notes": list(notes)}, indent=2) + "\n", encoding="utf-8"
    )
    page.write_text("\n".join(_markdown(title, facts, claims, notes)) + "\n", encoding="utf-8")
    return [data, page]


def _markdown(title: str, facts: dict[str, Any], claims: Sequence[Claim], notes: Sequence[str]) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"{facts['date']} · {facts['cpu']}, {facts['threads']} threads, load {facts['load_before']} before · {versions}",
        "",
        f"`{facts['command']}`",
        "",
        "| what | dtype | ratio (median) | range | target | | note |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(claim.cells()) + " |" for claim in claims]
    return [*lines, "", *(f"- {note}" for note in notes)]
