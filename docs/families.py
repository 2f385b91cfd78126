"""Makes docs/families/*.jsonl: what each method does on each family of the installed libraries, by running it.

    python docs/families.py                     everything; a run that was stopped goes on where it was
    python docs/families.py --group decoders    one group: decoders, denoisers, vision
    python docs/families.py --only llama phi3   these families, in the place of their lines
    python docs/families.py --check             write nothing; exit 1 and print the lines that would change

Families that need a package which is not installed (timm, with torchvision) keep the lines that they have.
The code that tries a family is in tests/family_table; `python docs/generate.py` makes docs/families.md of the files.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "families"
UNDERWAY = ROOT / "out" / "families"
GROUPS = {"decoders": "transformers", "denoisers": "diffusers", "vision": "transformers"}
Line = dict[str, Any]


def maker(group: str) -> Any:
    """The module with ``names()`` and ``line(name)``."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module(f"family_table.{group}")


def missing(group: str, name: str) -> str | None:
    """The package without which a family cannot be tried on this machine; its stored line is then left as it is."""
    lacks = getattr(maker(group), "missing", None)
    return None if lacks is None else lacks(name)


def versions(group: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in (GROUPS[group], "torch")}


def read(file: Path) -> tuple[Line, dict[str, Line]]:
    """The head of a file and its lines by family; nothing of a file that is not there."""
    if not file.is_file():
        return {}, {}
    head, *lines = [
        json.loads(text) for text in file.read_text(encoding="utf-8").splitlines() if text.strip()
    ]
    return head, {line["family"]: line for line in lines}


def stored(group: str) -> tuple[Line, dict[str, Line]]:
    return read(FOLDER / f"{group}.jsonl")


def written(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False)


def made(group: str, name: str, old: dict[str, Line]) -> Line:
    """The line of today, or the stored one where a package is missing."""
    package = missing(group, name)
    if package is None or name not in old:
        return maker(group).line(name)  # type: ignore[no-any-return]
    print(f"{group}: {name} is left as it is: {package} is not installed", file=sys.stderr, flush=True)
    return old[name]


def write(group: str, lines: Iterable[Line]) -> None:
    FOLDER.mkdir(exist_ok=True)
    texts = [written(line) for line in sorted(lines, key=lambda line: line["family"])]
    text = "\n".join([written({"versions": versions(group)}), *texts]) + "\n"
    (FOLDER / f"{group}.jsonl").write_text(text, encoding="utf-8")


def make(group: str) -> None:
    """Every family of a group; each is stored as soon as it is made."""
    tried, (_, old) = maker(group), stored(group)
    UNDERWAY.mkdir(parents=True, exist_ok=True)
    file = UNDERWAY / f"{group}.jsonl"
    head, done = read(file)
    if head.get("versions") != versions(group):
        done = {}
        file.write_text(written({"versions": versions(group)}) + "\n", encoding="utf-8")
    for name in tried.names():
        if name in done:
            continue
        done[name] = made(group, name, old)
        with file.open("a", encoding="utf-8") as out:
            out.write(written(done[name]) + "\n")
        print(f"{group}: {name}", file=sys.stderr, flush=True)
    write(group, [done[name] for name in tried.names()])
    file.unlink()


def changed(group: str, names: Iterable[str]) -> list[str]:
    """The stored lines and those of now, as a difference."""
    _, old = stored(group)
    found: list[str] = []
    for name in names:
        now, before = written(made(group, name, old)), written(old[name]) if name in old else ""
        if now != before:
            found += [text for text in difflib.ndiff([before], [now]) if text[0] in "-+" and text[2:].strip()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", choices=GROUPS, action="append", help="this group; may be repeated")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a line would change")
    said = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet()
    groups = said.group or list(GROUPS)
    chosen = {
        group: [n for n in maker(group).names() if said.only is None or n in said.only] for group in groups
    }
    if unknown := set(said.only or ()) - {name for names in chosen.values() for name in names}:
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    if said.check:
        found = [text for group, names in chosen.items() for text in changed(group, names)]
        print("\n".join(found) or "nothing would change")
        sys.exit(bool(found))
    for group, names in chosen.items():
        if said.only is None:
            make(group)
        elif names:
            old = stored(group)[1]
            lines = {n: line for n, line in old.items() if n in maker(group).names()}
            lines |= {name: made(group, name, old) for name in names}
            write(group, lines.values())


def quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
