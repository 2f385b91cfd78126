"""The tables of docs/families.md, from docs/families/*.jsonl."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "families"
RULE, IDENTITY, PART, REFUSED, ABSENT, FAULT = "●", "○", "◐", "✕", "–", "!"
# The sites that a message names are those of the tiny model.
SITES = (
    (re.compile(r"nothing to patch in \S+: all \d+ candidate sites are refused, e\.g\. \S+: "), ""),
    (
        re.compile(r"nothing to patch in \S+: looked for (\w+) attention among \d+ attention sites \(.*?\)"),
        r"none of its attention is \1 attention",
    ),
)
CLASS = re.compile(
    r"\b(?:[A-Z]\w*?)(Attention\w*|Model\w*|For[A-Z]\w+|UNet\w*|Transformer\w*|Adapter|ControlNet\w*)\b"
)


def read(group: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """(versions, lines) of a group; ({}, []) before it was made."""
    file = FOLDER / f"{group}.jsonl"
    if not file.is_file():
        return {}, []
    head, *lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    return head["versions"], lines


def table(group: str) -> str:
    """One row for each family that was built, one column for each method, notes, and what was not built."""
    versions, lines = read(group)
    if not lines:
        return "Not made yet: run `python docs/families.py`."
    built = [line for line in lines if "methods" in line]
    methods = list(dict.fromkeys(method for line in built for method in line["methods"]))
    notes: dict[str, int] = {}
    body = [
        [
            f"`{line['family']}`",
            *(cell(line, line["methods"].get(method, ""), method, notes) for method in methods),
        ]
        for line in built
    ]
    head = ["", *(f"`{method}`" for method in methods)]
    text = [f"{', '.join(f'{name} {version}' for name, version in versions.items())}: {counts(lines)}.", ""]
    text += [row(head), row(["---", *[":-:"] * len(methods)]), *map(row, body), ""]
    text += [f"{number}. {note}" for note, number in notes.items()]
    otherwise = [f"- `{line['family']}` {_plain(line['run'], line)}" for line in built if "run" in line]
    if otherwise:
        text += ["", "Not tried by their own `generate`:", "", *otherwise]
    absent: dict[str, list[str]] = {}
    for line in lines:
        if "not built" in line:
            absent.setdefault(_plain(line["not built"], line), []).append(f"`{line['family']}`")
    if absent:
        text += ["", "Not built:", "", *(f"- {', '.join(names)}: {why}" for why, names in absent.items())]
    return "\n".join(text)


def counts(lines: list[dict[str, Any]]) -> str:
    kinds = Counter("not built" if "not built" in line else _kind(line) for line in lines)
    return f"{len(lines)} families; " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


def _kind(line: dict[str, Any]) -> str:
    said = {outcome.partition(":")[0] for outcome in line["methods"].values()}
    if said == {"refused"}:
        return "refused by every method"
    if "not built" in said:
        return "not built"
    return "with every method" if "refused" not in said else "with some methods"


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def cell(line: dict[str, Any], outcome: str, method: str, notes: dict[str, int]) -> str:
    """An outcome in a sign and the number of its note."""
    word, _, reason = outcome.partition(": ")
    if word == "exact" and not reason:
        return IDENTITY if method in line.get("by identity", ()) else RULE
    sign = {"passes over": PART, "refused": REFUSED, "not built": ABSENT, "fault": FAULT}.get(
        word.split(" /")[0], RULE
    )
    if not outcome or (word == "not built" and "no tiny model" in reason):
        return ABSENT
    text = _plain(outcome if " / " in outcome else f"{word}: {reason}", line)
    return f"{sign} {notes.setdefault(text, len(notes) + 1)}"


def _plain(text: str, line: dict[str, Any]) -> str:
    """A reason without the names of one family, so that families that share it share a note."""
    for pattern, instead in SITES:
        text = pattern.sub(instead, text)
    if line.get("class") == line["family"]:  # a denoiser, which is called by its class
        return text.replace(f"a {line['family']}", "it").replace(line["family"], "it")
    return CLASS.sub(r"…\1", text.replace(f"{line['family']}: ", "")).replace("<", "&lt;")


BLOCKS = {f"families-{group}": partial(table, group) for group in ("decoders", "denoisers", "vision")}
