"""From goals.yaml and the results of the benchmarks to what `trainless recommend` knows, and to tables of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

GOALS = Path(__file__).with_name("goals.yaml")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FIGURE = re.compile(r"\[\[(.+?)\]\]")


def text() -> str:
    """The JSON file that comes with the package."""
    goals = [_goal(entry) for entry in yaml.safe_load(GOALS.read_text(encoding="utf-8"))["goals"]]
    return json.dumps({"goals": goals}, indent=1, ensure_ascii=False) + "\n"


def _goal(entry: dict[str, Any]) -> dict[str, Any]:
    sources = entry["file"] if isinstance(entry["file"], list) else [entry["file"]]
    lines: dict[str, dict[str, str]] = {}
    for source in sources:
        for name, cells in _lines(source, entry.get("section")).items():
            lines.setdefault(name, cells)

    def figures(row: str) -> dict[str, str]:
        if row not in lines:
            raise SystemExit(f"goals.yaml: {entry['name']}: {row!r} is no line of {', '.join(sources)}")
        return {name: lines[row][column] for name, column in entry["columns"].items()}

    options = [
        {
            "label": option["label"],
            "what": {"use": option["use"], "with": option["with"]},
            "figures": figures(option["row"]),
            "cost": FIGURE.sub(_value, " ".join(option["cost"].split())),
        }
        for option in entry["options"]
    ]
    return {
        "name": entry["name"],
        "title": entry["title"],
        "advice": " ".join(entry["advice"].split()),
        "measured": "; ".join(dict.fromkeys(_about(source) for source in sources)),
        "baseline": figures(entry["baseline"]) if "baseline" in entry else {},
        "options": options,
    }


def _value(match: re.Match[str]) -> str:
    source, _, line = match[1].partition(" | ")
    return _lines(source, None)[line]["ratio"]


def _about(source: str) -> str:
    """Machine, model and date of a file of results."""
    claims = RESULTS / f"{source}.json"
    if claims.is_file():
        data = json.loads(claims.read_text(encoding="utf-8"))
        return f"{data['cpu']}, {data['threads']} threads, {data['date'][:10]}"
    page = (RESULTS / f"{source}.md").read_text(encoding="utf-8").splitlines()
    return next(line for line in page if line and not line.startswith("#")).replace(" · ", ", ")


def _lines(source: str, section: str | None) -> dict[str, dict[str, str]]:
    """The lines of a file of results by name: its claims, or the table of its page (in one section)."""
    claims = RESULTS / f"{source}.json"
    if claims.is_file():
        found: dict[str, dict[str, str]] = {}
        for claim in json.loads(claims.read_text(encoding="utf-8"))["claims"]:
            found.setdefault(claim["what"], {"ratio": f"{claim['value']:.3g}"})  # float32 stands first
        return found
    page = (RESULTS / f"{source}.md").read_text(encoding="utf-8")
    if section is None:
        page = page.split("\n## ", 1)[0]
    else:
        page = re.split(r"^## ", page.split(f"## {section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [
        [c.strip() for c in line.strip("| ").split(" | ")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    head, body = [c.strip("| ") for c in rows[0]], rows[2:]
    named = 2 if head[1] in ("aimed at", "what may go") else 1
    return {" ".join(row[:named]): {k: _short(v) for k, v in zip(head, row, strict=False)} for row in body}


def _short(cell: str) -> str:
    """The value of a cell without its interval and its difference."""
    return cell.split("<br>")[0].split(" [")[0]


def tables() -> str:
    """Every goal as a table."""
    parts = []
    for goal in json.loads(text())["goals"]:
        parts.append(f"## {goal['title'][0].upper()}{goal['title'][1:]}\n")
        parts.append(
            f"`trainless recommend --goal {goal['name']}`. {goal['advice']}\n\nMeasured: {goal['measured']}.\n"
        )
        parts.append(_table(goal) + "\n")
    return "\n".join(parts)


def memory() -> str:
    """The first goal's table, for the front page."""
    return _table(json.loads(text())["goals"][0])


def _table(goal: dict[str, Any]) -> str:
    columns = list(goal["options"][0]["figures"])
    lines = [["patched with", *columns, "cost"], ["---", *["--:"] * len(columns), "---"]]
    if goal["baseline"]:
        lines.append(["unpatched", *goal["baseline"].values(), ""])
    lines += [[o["label"], *o["figures"].values(), o["cost"]] for o in goal["options"]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
