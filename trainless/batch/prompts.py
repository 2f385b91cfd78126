"""Prompt files: text, JSONL, CSV, Parquet, OpenAI batch lines, a ``datasets`` name or folder, stdin.

Every fault is collected with file and line; what a model cannot use is checked by the model's runner.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models.extras import require
from ..models.hub import for_dataset
from ..models.sources import beside
from .columns import Columns
from .items import Item, ItemFaults, parse
from .openai import is_openai

SHOWN = 100  # faults printed at most; the rest is counted
_AS_JSON = ("messages", "images", "params", "meta")  # columns of a table whose cells hold JSON
_AS_INTEGER = ("seed", "n")
_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def given_prompts(texts: Sequence[str]) -> tuple[list[Item], ItemFaults]:
    """Prompts of the command line, numbered from 1."""
    faults, items = ItemFaults(), []
    for number, text in enumerate(texts, 1):
        item = parse({"id": number, "prompt": text}, f"--prompt {number}", Path.cwd(), faults)
        items += [item] if item is not None else []
    return items, faults


def read_prompts(
    spec: str, stdin: Any = None, columns: Columns | None = None
) -> tuple[list[Item], ItemFaults]:
    """The prompts of ``spec`` in order, and every fault found in them.

    InputError when the whole of it cannot be read: no such file, or not UTF-8 at all.
    """
    columns = columns or Columns()
    faults = ItemFaults()
    folder = Path.cwd()
    if spec == "-":
        data = (stdin or sys.stdin.buffer).read()
        rows = _sniffed(_decode(data, "<stdin>", faults), "<stdin>", faults, columns)
    else:
        path = Path(spec).expanduser()
        if path.is_dir():
            rows = _dataset(spec, path, columns)
        elif path.is_file():
            folder = path.parent
            rows = _file(path, spec, faults, columns)
        elif path.suffix or len(path.parts) > 2 or spec.startswith((".", "/", "~")):
            raise InputError(f"prompts {spec!r}: there is no such file or folder{_near(path)}")
        else:
            rows = _dataset(spec, None, columns)
    items: list[Item] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        if (columns.prompt or columns.keep) and isinstance(row, Mapping) and not is_openai(row):
            row = columns.fields(row, where, faults)
            if row is None:
                continue
        item = parse(row, where, folder, faults)
        if item is None:
            continue
        if item.id is not None:
            first = seen.setdefault(str(item.id), where)
            if first != where:
                faults.add(where, f"id {item.id!r} is already used at {first}")
        items.append(item)
    if not items and not faults:
        raise InputError(f"prompts {spec!r}: there is no prompt in it")
    return items, faults


def refuse(faults: ItemFaults) -> None:
    """Raise one InputError with every fault, if there is one."""
    if faults:
        rest = len(faults.found) - SHOWN
        raise InputError("\n".join([*faults.found[:SHOWN], *([f"… and {rest} more"] if rest > 0 else [])]))


Rows = Iterable[tuple[str, Any]]


def _file(path: Path, name: str, faults: ItemFaults, columns: Columns) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, name, columns)
    try:
        text = _decode(path.read_bytes(), name, faults)
    except OSError as error:
        raise InputError(f"prompts {name!r} cannot be read ({error.strerror})") from error
    if suffix == ".txt":
        return _lines(text, name, columns)
    if suffix in {".jsonl", ".ndjson"}:
        return _jsonl(text, name, faults)
    if suffix in {".csv", ".tsv"}:
        return _csv(text, name, "\t" if suffix == ".tsv" else ",", faults, columns)
    if suffix == ".json" and text.lstrip()[:1] == "[":
        raise InputError(f"prompts {name!r} is one JSON list; write one object a line, as .jsonl")
    return _sniffed(text, name, faults, columns)


def _decode(data: bytes, name: str, faults: ItemFaults) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{line}: this is not UTF-8 text; convert the file to UTF-8") from error


def _split(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines. Only line feeds end a line: other separators may stand inside a prompt."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def _sniffed(text: str, name: str, faults: ItemFaults, columns: Columns) -> Rows:
    return _jsonl(text, name, faults) if text.lstrip()[:1] == "{" else _lines(text, name, columns)


def _lines(text: str, name: str, columns: Columns) -> Rows:
    if columns.prompt is not None:
        raise InputError(f"--prompt-field {columns.prompt}: {name} holds one prompt a line, and no fields")
    for number, line in _split(text):
        yield f"{name}:{number}", {"id": number, "prompt": line}


def _jsonl(text: str, name: str, faults: ItemFaults) -> Rows:
    for number, line in _split(text):
        where = f"{name}:{number}"
        try:
            yield where, json.loads(line, object_pairs_hook=_unique, parse_constant=_constant)
        except json.JSONDecodeError as error:
            faults.add(where, f"this is not JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:
            faults.add(where, f"this is not usable JSON ({error})")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} stands twice")
        found[name] = value
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _csv(text: str, name: str, delimiter: str, faults: ItemFaults, columns: Columns) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{name}:{line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if not columns.check(header, where, faults):
                    return
            elif len(cells) != len(header):
                faults.add(where, f"{len(cells)} cells under {len(header)} columns")
            else:
                row = _cells(dict(zip(header, cells, strict=True)), where, faults)
                if row is not None:
                    yield where, row
    except csv.Error as error:
        faults.add(f"{name}:{line}", f"this is not CSV ({error})")


def _cells(cells: dict[str, str], where: str, faults: ItemFaults) -> dict[str, Any] | None:
    """Strings of a table as the types of the fields; empty cells are absent."""
    row: dict[str, Any] = {name: cell for name, cell in cells.items() if cell != ""}
    for name in row:
        try:
            if name in _AS_JSON:
                row[name] = json.loads(row[name], object_pairs_hook=_unique, parse_constant=_constant)
            elif name in _AS_INTEGER:
                row[name] = int(row[name])
        except ValueError:
            kind = "JSON" if name in _AS_JSON else "an integer"
            faults.add(where, f"column {name!r} must hold {kind}, not {row[name][:60]!r}")
            return None
    return row


def _parquet(path: Path, name: str, columns: Columns) -> Rows:
    require("pyarrow", f"reading {path.name}")
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise InputError(f"prompts {name!r} cannot be read as Parquet ({str(error)[:160]})") from error
    return _table(table.column_names, table.to_pylist(), name, columns)


def _dataset(spec: str, path: Path | None, columns: Columns) -> Rows:
    require("datasets", f"reading the prompts {spec!r}")
    import datasets

    hint = ""
    try:
        if path is not None and any((path / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        elif path is not None:
            found = datasets.load_dataset(spec)
        else:
            hint = _near(Path(spec))
            with for_dataset(spec, hint):
                found = datasets.load_dataset(spec)
    except InputError as error:
        raise InputError(f"prompts {error}") from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"prompts {spec!r}: no such file, and `datasets` cannot load it ({reason[:160]}){hint}"
        ) from error
    if isinstance(found, dict):
        if len(found) > 1 and "train" not in found:
            raise InputError(
                f"prompts {spec!r} has the splits {', '.join(found)}; save the one that is meant"
            )
        found = found["train"] if "train" in found else next(iter(found.values()))
    return _table(found.column_names, found, spec, columns)


def _near(path: Path) -> str:
    """Files of prompts beside the one that is not there."""
    return beside(path, lambda entry: entry.suffix.lower() in _SUFFIXES)


def _table(names: Sequence[str], rows: Iterable[Any], name: str, columns: Columns) -> Rows:
    faults = ItemFaults()
    columns.check(list(names), name, faults)
    refuse(faults)
    for number, cells in enumerate(rows, 1):
        row = {field: value for field, value in cells.items() if value is not None}
        for field in _AS_JSON:
            if isinstance(row.get(field), str):
                try:
                    row[field] = json.loads(row[field])
                except ValueError:
                    continue  # not JSON: the field's own check says what is wrong with a string
        if isinstance(row.get("params"), dict):
            # Columns of structs give every row every member; those that were not set are null.
            row["params"] = {key: value for key, value in row["params"].items() if value is not None}
        yield f"{name}:{number}", row
