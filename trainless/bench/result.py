"""What ``bench`` found: rows of unpatched against patched, as a table, as data and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..batch.counts import Counts, acted, idle
from ..errors import InputError
from ..models.extras import installed
from ..patch.report import size
from ..tables import table, wrapped
from ..verify import Verification

MADE_BY = "trainless bench"


@dataclass(frozen=True)
class ResultRow:
    """One measured quantity. unpatched is None where only the difference means something (KL, agreement).

    unit: "tokens/s", "s", "bytes", "nats", "share" or "". samples: what each repeat measured, in pairs.
    """

    name: str
    unit: str
    unpatched: float | None
    patched: float
    samples: tuple[tuple[float, float], ...] = ()

    @property
    def ratio(self) -> float | None:
        """Patched over unpatched."""
        return self.patched / self.unpatched if self.unpatched else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lowest and highest ratio among the repeats."""
        ratios = [b / a for a, b in self.samples if a]
        return (min(ratios), max(ratios)) if ratios else None

    @classmethod
    def of(cls, name: str, unit: str, unpatched: Sequence[float], patched: Sequence[float]) -> ResultRow:
        """Medians of repeats, pair by pair."""
        pairs = tuple(zip(unpatched, patched, strict=True))
        return cls(name, unit, median(unpatched), median(patched), pairs)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "ratio": self.ratio, "spread": self.spread}


@dataclass(frozen=True)
class BenchResult:
    """The answer of ``bench``. withheld: why there are no rows, when ``verify`` found the patch wanting.

    counts: of every method, the calls of one patched run, and on how many of them it acted.
    """

    model: str
    recipe: str
    about: dict[str, Any]  # settings, machine, versions
    verification: Verification
    rows: tuple[ResultRow, ...] = ()
    notes: tuple[str, ...] = field(default=())
    counts: Counts = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether the patch changed nothing, so that both sides are the unpatched model."""
        return idle(self.counts)

    @property
    def withheld(self) -> str | None:
        if self.verification:
            return None
        failed = ", ".join(f"{c.subject}: {c.name}" for c in self.verification.failed)
        return f"verify failed ({failed}), so no number of this patch means anything"

    def to_dict(self) -> dict[str, Any]:
        return {
            "made_by": MADE_BY,
            "model": self.model,
            "recipe": self.recipe,
            **self.about,
            "withheld": self.withheld,
            "verification": self.verification.to_dict(),
            "counts": self.counts,
            "idle": self.idle,
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        head = wrapped(f"{self.recipe} on {self.model}", 0, 2)
        if self.withheld:
            return "\n".join(
                [head, wrapped(f"Numbers withheld: {self.withheld}.", 0, 2), str(self.verification)]
            )
        said = [wrapped(acted(self.counts), 2, 4)] if self.counts else []
        if self.idle:
            claim = (
                "The patch changed nothing in this run, so that there is nothing to compare: both sides are the "
                "unpatched model. Give more --tokens, or other values with --set."
            )
            return "\n".join(
                [head, *said, wrapped(claim, 2, 2), *(wrapped(note, 2, 4) for note in self.notes)]
            )
        rows = [["", "unpatched", "patched", "ratio", "range of ratios"]]
        for row in self.rows:
            ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
            spread = "" if row.spread is None else f"{row.spread[0]:.3f}-{row.spread[1]:.3f}"
            before = "" if row.unpatched is None else shown(row.unpatched, row.unit)
            rows.append([row.name, before, shown(row.patched, row.unit), ratio, spread])
        notes = [wrapped(note, 2, 4) for note in self.notes]
        still = [name for name, entry in self.counts.items() if not entry["acted"]]
        notes += [wrapped(f"{', '.join(still)} changed nothing in this run", 2, 4)] if still else []
        return "\n".join([head, table(rows, indent=2, right=(1, 2, 3, 4)), *said, *notes])

    def save(self, folder: Path) -> list[Path]:
        """Write bench.json and, when there is anything to plot and matplotlib is there, bench.png."""
        folder.mkdir(parents=True, exist_ok=True)
        data, picture = folder / "bench.json", folder / "bench.png"
        data.write_text(json.dumps(self.to_dict(), indent=2, default=str) + "\n", encoding="utf-8")
        if self.withheld or self.idle or not installed("matplotlib"):
            picture.unlink(missing_ok=True)  # of an earlier run, and not true any more
            return [data]
        from .plot import plot

        plot(self, picture)
        return [data, picture]


def shown(value: float, unit: str) -> str:
    """A value with its unit, for people."""
    if unit == "bytes":
        return size(value)
    if unit == "share":
        return f"{100 * value:.3g} %"
    return f"{value:.4g}" + (f" {unit}" if unit == "s" else "")


def check_folder(folder: Path) -> None:
    """InputError unless results can be written to ``folder`` without touching what is not ours."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for bench.json and bench.png")
    old = folder / "bench.json"
    if old.exists():
        try:
            ours = json.loads(old.read_text(encoding="utf-8")).get("made_by") == MADE_BY
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise InputError(
                f"{old} was not written by {MADE_BY} and would be overwritten; give another folder"
            )
    elif (folder / "bench.png").exists():
        raise InputError(
            f"{folder / 'bench.png'} is somebody else's and would be overwritten; give another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".trainless-bench"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
