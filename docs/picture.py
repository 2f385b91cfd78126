"""The picture of the seams, drawn from the code: the order of the engine and the methods at each seam."""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

# The order in which the engine goes through one attention call; each stop holds one or more kinds.
STOPS = (
    ("before the softmax", ("position", "keys", "scale", "pattern")),
    ("softmax, looked at", ("observe", "form", "mass")),
    ("after it", ("gain", "kv")),
    ("beside attention", ("around", "input", "weights", "logits")),
)
WORDS = ("What", "Source", "Seams", "Exact", "Costs", "Differs")
BOX, GAP, LEFT, TOP, HIGH = 150, 14, 24, 64, 62
FONT = "font-family='ui-sans-serif, Helvetica, Arial, sans-serif'"


def docstring(method: str) -> dict[str, list[str]]:
    """The header of a method's file: word → its paragraphs (list items under Differs one by one)."""
    from trainless.patchers import get
    from trainless.preview.listing import header

    text = sys.modules[get(method).__module__].__doc__ or ""
    twice = [w for w in WORDS if len(re.findall(rf"^{w}  ", text, re.MULTILINE)) > 1]
    if twice:
        raise SystemExit(f"{method}: its file's header says {twice[0]} twice")
    found = header(get(method))
    missing = [w for w in WORDS if not found.get(w)]
    if missing:
        raise SystemExit(f"{method}: its file's header says nothing under {', '.join(missing)}")
    return found


def used_by() -> dict[str, list[str]]:
    """Seam → the methods whose header names it; what stands in parentheses there is explanation."""
    from trainless.patchers import known
    from trainless.seams import KINDS

    found: dict[str, list[str]] = {}
    for name in known():
        said = re.sub(r"\([^)]*\)", "", " ".join(docstring(name)["Seams"]))
        for kind in KINDS:
            if re.search(rf"\b{kind}\b", said):
                found.setdefault(kind, []).append(name)
    return found


def meanings() -> dict[str, str]:
    """Seam → what a method may do there: the comments in the list of kinds."""
    import trainless.seams.kinds

    source = Path(trainless.seams.kinds.__file__).read_text(encoding="utf-8")
    block = source[source.index("KINDS = (") : source.index("STATISTICS")]
    return {kind: said.split(":")[0] for kind, said in re.findall(r'"(\w+)",  # (.+)', block)}


def seams() -> str:
    """The whole picture as SVG."""
    from trainless.seams import KINDS

    drawn = [kind for _, kinds in STOPS for kind in kinds]
    if sorted(drawn) != sorted(KINDS):
        raise SystemExit(f"docs/picture.py: STOPS does not hold the seams {set(drawn) ^ set(KINDS)}")
    used, said = used_by(), meanings()
    widest = max(len(kinds) for _, kinds in STOPS)
    width = LEFT * 2 + 150 + widest * (BOX + GAP)
    height = TOP + len(STOPS) * (HIGH + 34) + 10
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
        text(LEFT, 30, "One attention call on its way through the plan of its site", 17, weight=600),
        text(
            LEFT,
            50,
            "seams from top to bottom in the order of the engine; filled: used by a method of this version",
            12,
            "#555",
        ),
    ]
    for row, (title, kinds) in enumerate(STOPS):
        y = TOP + row * (HIGH + 34) + 12
        parts.append(text(LEFT, y + HIGH / 2 + 4, title, 13, "#333", weight=600))
        if row + 1 < len(STOPS) - 1:
            x = LEFT + 150 + BOX / 2
            parts.append(f"<path d='M{x} {y + HIGH + 4} v20 m-5 -7 l5 7 l5 -7' stroke='#888' fill='none'/>")
        for column, kind in enumerate(kinds):
            x = LEFT + 150 + column * (BOX + GAP)
            names = used.get(kind, [])
            fill, edge = ("#e3eefb", "#3b74b5") if names else ("#f7f7f7", "#bbbbbb")
            parts.append(
                f"<g><title>{escape(said[kind])}</title>"
                f"<rect x='{x}' y='{y}' width='{BOX}' height='{HIGH}' rx='6' fill='{fill}' stroke='{edge}'/>"
                + text(x + 10, y + 22, kind, 14, weight=600)
                + "".join(
                    text(x + 10, y + 39 + 15 * i, line, 11, "#234") for i, line in enumerate(pack(names))
                )
                + "</g>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, size: int, fill: str = "#111", weight: int = 400) -> str:
    look = f"{FONT} font-size='{size}' font-weight='{weight}' fill='{fill}'"
    return f"<text x='{x:g}' y='{y:g}' {look}>{escape(words)}</text>"


def pack(names: list[str], room: int = 23) -> list[str]:
    """Names in at most two lines of a box; more are counted."""
    lines = [""]
    for i, name in enumerate(names):
        joined = f"{lines[-1]}, {name}" if lines[-1] else name
        if len(joined) <= room:
            lines[-1] = joined
        elif len(lines) < 2:
            lines.append(name)
        else:
            lines[-1] = f"{lines[-1]} +{len(names) - i}"
            break
    return [line for line in lines if line]
