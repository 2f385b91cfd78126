"""Rewrites the parts of the documents that come from code; a test fails when one is stale.

    python docs/generate.py           write what has changed
    python docs/generate.py --check   exit 1 and name the stale files
    python docs/generate.py --demo    put what the last `make demo` measured in the place of the stored run first

In Markdown files the text between `<!-- begin NAME -->` and `<!-- end NAME -->` is made by the function
registered under NAME below; everything else in them is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import advice
import family_tables
import picture

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def pages() -> list[Path]:
    """The Markdown files that may have generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def made() -> dict[Path, str]:
    """Every file with generated parts, as it should be now."""
    found = {}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        found[page] = BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]().rstrip()}\n{m[3]}", text)
    found[ROOT / "docs" / "img" / "seams.svg"] = picture.seams()
    found[ROOT / "trainless" / "preview" / "advice.json"] = advice.text()
    return found


def stale() -> list[Path]:
    return [f for f, text in made().items() if not f.is_file() or f.read_text(encoding="utf-8") != text]


# ---------------------------------------------------------------- small parts


def rows(head: Sequence[str], body: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """A Markdown table; ``right``: columns aligned to the right."""
    lines = [list(head), ["--:" if i in right else "---" for i in range(len(head))]]
    lines += [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: Any) -> str:
    return f"`{text}`"


# ---------------------------------------------------------------- methods


def method_table() -> str:
    import trainless

    def line(info: Any) -> list[str]:
        names = code(info.name) + "".join(f", {code(alias)}" for alias in info.aliases)
        exact = picture.docstring(info.name)["Exact"][0].split(". ")[0].rstrip(".")
        exact = re.sub(r"^(bitwise )?the identity (at )?", "", exact)
        return [names, info.summary, ", ".join(info.hosts), exact, info.source]

    head = ("method", "what it does", "library", "changes nothing at", "source")
    return rows(head, map(line, trainless.methods()))


def method_pages() -> str:
    """What each method's file says about itself, and its parameters."""
    import trainless

    titles = {"What": "What it does", "Exact": "Exact", "Differs": "Differs from the source"}
    parts = []
    for info in trainless.methods():
        parts.append(f"## {info.name}\n")
        if info.aliases:
            parts.append(f"Also called {', '.join(map(code, info.aliases))}.\n")
        for word, paragraphs in picture.docstring(info.name).items():
            said = paragraphs[0] if len(paragraphs) == 1 else "\n\n" + "\n".join(f"- {p}" for p in paragraphs)
            parts.append(f"**{titles.get(word, word)}.** {said}\n".replace("** \n", "**\n"))
        body = [
            [code(p.name), "required" if p.required else code(repr(p.default)), p.help, p.origin]
            for p in info.parameters
        ]
        if info.calibration:
            body.append([code("calibration"), "", "a file made by `trainless calibrate`", ""])
        parts.append(rows(("parameter", "default", "meaning", "default is"), body) + "\n")
    return "\n".join(parts)


# ---------------------------------------------------------------- recipes, command line, errors


def recipe_table() -> str:
    from trainless.recipes import load_recipe, packaged

    def line(name: str) -> list[str]:
        recipe = load_recipe(name)
        fits = "; ".join(map(some, recipe.fits.values())) if recipe.fits else "any"
        return [code(name), recipe.description, ", ".join(code(use.method.name) for use in recipe.uses), fits]

    return rows(("recipe", "for", "methods", "fits"), map(line, packaged()))


def some(names: Sequence[str], most: int = 8) -> str:
    rest = len(names) - most
    return (
        ", ".join(names)
        if rest < 2
        else f"{', '.join(names[:most])} and {rest} others ([families](families.md))"
    )


def cli_help() -> str:
    """``--help`` of every command, 80 columns wide."""
    import typer

    from trainless.cli import app

    parts = []

    def show(command: Any, path: str, above: Any) -> None:
        context = type(command).context_class(
            command, info_name=path.split()[-1], parent=above, terminal_width=80, max_content_width=80
        )
        parts.append(f"## {path}\n\n```\n{command.get_help(context).rstrip()}\n```\n")
        for name, child in getattr(command, "commands", {}).items():
            show(child, f"{path} {name}", context)

    show(typer.main.get_command(app), "trainless", None)
    return "\n".join(parts)


def error_table() -> str:
    import trainless

    kinds = [getattr(trainless, name) for name in trainless.__all__]
    kinds = [k for k in kinds if isinstance(k, type) and issubclass(k, Exception)]
    return rows(("error", "meaning"), ([code(k.__name__), (k.__doc__ or "").split("\n")[0]] for k in kinds))


def seam_table() -> str:
    from trainless.seams import KINDS

    used = picture.used_by()
    meanings = picture.meanings()
    return rows(
        ("seam", "what a method may do there", "used by"),
        (
            [code(kind), meanings[kind], ", ".join(map(code, used.get(kind, []))) or "none yet"]
            for kind in KINDS
        ),
    )


# Families to look at; those that turn out to dispatch are left out of the list.
SUSPECTS = (
    "bloom", "codegen", "deberta", "deberta-v2", "falcon", "gptj", "longformer", "mpt", "reformer", "swinv2",
    "xlm", "xlnet",
)  # fmt: skip


def refused() -> str:
    """The suspects that a host refuses, tried on their default configs without weights."""
    import torch
    from transformers import AutoConfig, AutoModel

    from trainless import Unsupported
    from trainless.hosts import components, find_sites

    found = []
    for kind in SUSPECTS:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(kind))
        try:
            find_sites(components(model))
        except Unsupported:
            found.append(code(kind))
    return f"  {', '.join(found)}."


# ---------------------------------------------------------------- measurements


def take_demo(run: Path) -> None:
    """Store a run of `make demo`; raises where a part of it was not run."""
    found = {
        name: json.loads((run / name / "summary.json").read_text(encoding="utf-8"))
        for name in ("texts", "pictures", "answers")
    }
    (RESULTS / "demo.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def demo_table() -> str:
    """The tables of `make demo`, from the run that is stored with the other results."""
    sys.path[:0] = [str(ROOT / "examples" / "demo"), str(ROOT / "examples" / "shapes")]
    import answers
    import pictures
    import texts

    found = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    tables = [part.table(found[name]) for name, part in
              (("texts", texts), ("pictures", pictures), ("answers", answers)) if name in found]  # fmt: skip
    return "```\n{}\n```".format("\n\n\n".join(tables))


def measurements() -> str:
    """Every file of results: the page that its script wrote, or else its values as tables."""
    parts = []
    for file in sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*.jsonl")]):
        if file.stem == "demo":
            parts.append(f"### make demo\n\n{demo_table()}\n")
            continue
        page = file.with_suffix(".md")
        if page.is_file():
            parts.append(
                re.sub(r"^#", "###", page.read_text(encoding="utf-8").rstrip(), flags=re.MULTILINE) + "\n"
            )
            continue
        if file.suffix == ".jsonl":  # a run that has not come to its page
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        parts.append(f"### {file.stem}\n")
        single, tables = flatten(data if isinstance(data, dict) else {"rows": data})
        if single:
            parts.append(rows(("what", "value"), ([k, shown(v)] for k, v in single), right=(1,)) + "\n")
        for name, records in tables:
            head = list(dict.fromkeys(key for record in records for key in record))
            parts.append(
                (f"{name}:\n\n" if name != "rows" else "")
                + rows(head, ([shown(r.get(k, "")) for k in head] for r in records))
                + "\n"
            )
    return "\n".join(parts) if parts else "No results are stored yet: run `make bench`."


def flatten(
    data: dict[str, Any], prefix: str = ""
) -> tuple[list[tuple[str, Any]], list[tuple[str, list[dict[str, Any]]]]]:
    """Nested mappings as `a: b` names with single values, and the lists of records found on the way."""
    single: list[tuple[str, Any]] = []
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    for key, value in data.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, dict):
            more, deeper = flatten(value, f"{name}: ")
            single, tables = single + more, tables + deeper
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            tables.append((name, [dict(flatten(v)[0]) for v in value]))
        else:
            single.append((name, value))
    return single, tables


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": method_table,
    "method-pages": method_pages,
    "recipes": recipe_table,
    "cli": cli_help,
    "errors": error_table,
    "seams": seam_table,
    "refused": refused,
    "demo": demo_table,
    "measurements": measurements,
    "goals": advice.tables,
    "goal-memory": advice.memory,
    **family_tables.BLOCKS,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is stale")
    one.add_argument("--demo", action="store_true", help="take the run in out/demo, of all parts, first")
    said = parser.parse_args()
    if said.demo:
        take_demo(ROOT / "out" / "demo")
    old = stale()
    if said.check:
        print("\n".join(f"stale: {file.relative_to(ROOT)}" for file in old) or "nothing is stale")
        sys.exit(bool(old))
    for file, text in made().items():
        if file in old:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
