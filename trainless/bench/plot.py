"""The plot of a bench: how much each quantity changed under the patch."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import BenchResult

CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # words stay readable where they cross a line


def plot(result: BenchResult, path: Path) -> None:
    """Bars of patched over unpatched with the range over repeats, and the quantities that have no ratio as text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .result import shown

    rows = [row for row in result.rows if row.ratio is not None]
    figure = Figure(figsize=(8, 1.4 + 0.55 * max(len(rows), 1)), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        ratio = row.ratio or 0.0
        low, high = row.spread or (ratio, ratio)
        error = [[max(0.0, ratio - low)], [max(0.0, high - ratio)]]
        axes.barh(i, ratio, color="#3b6ea5", xerr=error, error_kw={"ecolor": "#333333", "capsize": 3})
        said = f"{shown(row.unpatched or 0.0, row.unit)} → {shown(row.patched, row.unit)}"
        axes.text(max(ratio, high) + 0.03, i, said, va="center", fontsize=8, bbox=CLEAR)
    axes.axvline(1.0, color="#888888", linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max([1.0, *(max(row.ratio or 0, (row.spread or (0, 0))[1]) for row in rows)]))
    axes.set_xlabel("patched / unpatched")
    beside = "   ".join(f"{r.name}: {shown(r.patched, r.unit)}" for r in result.rows if r.ratio is None)
    title = "\n".join([f"{result.recipe} on {result.model}", *textwrap.wrap(beside, 90)])
    axes.set_title(title, fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))
