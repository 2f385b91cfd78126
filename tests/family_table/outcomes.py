"""How the outcome of one method on one family is written.

``exact``; ``passes over: why (n of m layers)``, exact on the others; ``refused: why``, when patching; ``not built: why``.
``fault: what`` is none of these: something that was accepted does not hold.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

FAULT = "fault"


def one_line(text: Any, longest: int = 400) -> str:
    """A message without line ends, addresses and places of files, so that it reads the same on every machine."""
    line = re.sub(r"\s+", " ", str(text)).strip()
    line = re.sub(r"0x[0-9a-f]{6,}", "0x…", line)
    line = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "…/", line)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def said(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)


def refused(method: str, error: BaseException) -> str:
    return "refused: " + one_line(str(error).removeprefix(f"{method}: "))


def fault(what: Any) -> str:
    return f"{FAULT}: {one_line(what, 200)}"


def passed(skipped: Mapping[Any, str], candidates: int) -> str:
    """Of a method that holds wherever it acts; skipped: site -> why it is left alone."""
    if not skipped:
        return "exact"
    counted = Counter(one_line(reason) for reason in skipped.values())
    whys = [f"{reason} ({n} of {candidates} layers)" for reason, n in sorted(counted.items())]
    return "passes over: " + "; ".join(whys)
