"""Text tables within 80 columns; the last column takes what room is left and is wrapped."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

WIDTH = 80


def table(rows: Sequence[Sequence[str]], indent: int = 0, right: Sequence[int] = ()) -> str:
    """``rows`` as aligned columns. right: numbers of the columns that are aligned to the right.

    Rows may be short; a cell that does not fit at the end of its line goes on below itself.
    """
    count = max((len(row) for row in rows), default=0)
    widths = [max((len(row[i]) for row in rows if len(row) > i + 1), default=0) for i in range(count - 1)]
    lines: list[str] = []
    for row in rows:
        cells = [
            f"{cell:>{width}}" if i in right else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row[:-1], widths, strict=False))
        ]
        head = " " * indent + "".join(cell + "  " for cell in cells)
        if len(row) - 1 in right and len(row) == count:
            head += " " * (max(len(r[-1]) for r in rows if len(r) == count) - len(row[-1]))
        body = textwrap.wrap(row[-1] if row else "", max(20, WIDTH - len(head))) or [""]
        lines += [head + body[0], *(" " * len(head) + more for more in body[1:])]
    return "\n".join(line.rstrip() for line in lines)


def wrapped(text: str, indent: int = 0, hanging: int | None = None) -> str:
    """A paragraph within the width; further lines are indented by ``hanging`` (default: as the first)."""
    later = " " * (indent if hanging is None else hanging)
    return "\n".join(textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=later) or [""])


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: [0, 1, 2, 5] → "0-2, 5"."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


# ---------------------------------------------------------------- text on a terminal


def harmless(text: str) -> str:
    """Text whose control characters are written out: what a model wrote must not move a cursor."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def columns(text: str) -> int:
    """Columns of a terminal that ``text`` takes: two for wide characters, none for what stands on another."""
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.category(character) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """``text`` within ``width`` columns."""
    if columns(text) <= width:
        return text
    kept, used = [], 0
    for character in text:
        used += _width(character)
        if used > width - 1:
            break
        kept.append(character)
    return "".join(kept) + "…"


def folded(line: str, width: int, hanging: str = "") -> str:
    """A line broken at spaces where it is wider than ``width``; a word that is wider goes over it."""
    if columns(line) <= width:
        return line
    lines = [""]
    for word in line.split(" "):
        longer = (
            f"{lines[-1]} {word}"
            if lines[-1].strip() or (lines[-1] == "" and word == "")
            else lines[-1] + word
        )
        if lines[-1].strip() and columns(longer) > width:
            lines.append(hanging + word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
