"""Where labelled rows come from: a JSONL file, what `datasets` loads, or Python; and the list of their faults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..batch.items import ItemFaults
from ..batch.prompts import _decode, _jsonl, refuse
from ..errors import InputError, did_you_mean
from ..models.extras import require
from ..models.hub import for_dataset

Rows = Iterable[tuple[str, Any]]


@dataclass
class Grouped(ItemFaults):
    """Faults; the same one on many lines is said once."""

    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, where: str, what: str) -> None:
        super().add(where, what)
        self.places.setdefault(what, []).append(where)

    def raise_all(self) -> None:
        said = [
            f"{places[0]}: {what}" + (f" (and {len(places) - 1} more like it)" if len(places) > 1 else "")
            for what, places in self.places.items()
        ]
        refuse(ItemFaults(said))


def rows_of(data: Any, split: str, subset: str | None, faults: Grouped) -> tuple[str, Rows]:
    """(what the data is called, its rows): each row with its ``file:line``, not yet checked."""
    if isinstance(data, (str, Path)):
        path = Path(data).expanduser()
        if path.is_file():
            return str(data), _file(path, str(data), faults)
        name = str(data)
        if not path.is_dir() and (
            path.suffix in (".jsonl", ".json", ".csv") or name.startswith((".", "/", "~"))
        ):
            raise InputError(f"data {name!r}: there is no such file or folder")
        source = f"{name}[{subset}]:{split}" if subset else f"{name}:{split}"
        return source, _dataset(_load(name, path, split, subset), split, source)
    if hasattr(data, "column_names"):
        return f"datasets.{type(data).__name__}", _dataset(data, split, "data")
    if isinstance(data, Sequence):
        return "rows given in Python", ((f"data[{i}]", row) for i, row in enumerate(data))
    raise InputError(
        f"data: give a JSONL file, a datasets name or folder, or a list of mappings; got {type(data).__name__}"
    )


def _file(path: Path, name: str, faults: Grouped) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() in (".csv", ".tsv", ".parquet", ".txt"):
        raise InputError(f"data {name!r}: labelled data is JSONL, or what `datasets` loads; convert the file")
    try:
        text = _decode(path.read_bytes(), name, faults)
    except OSError as error:
        raise InputError(f"data {name!r} cannot be read ({error.strerror})") from error
    yield from _jsonl(text, name, faults)


def _load(name: str, path: Path, split: str, subset: str | None) -> Any:
    require("datasets", f"reading the data {name!r}")
    import datasets

    try:
        if any((path / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
            return datasets.load_from_disk(str(path))
        if path.exists():
            return datasets.load_dataset(name, subset, split=split)
        with for_dataset(name, ""):
            return datasets.load_dataset(name, subset, split=split)
    except InputError as error:
        raise InputError(f"data {error}") from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"data {name!r}: no such file, and `datasets` cannot load it ({reason[:160]})"
        ) from error


def _dataset(found: Any, split: str, source: str) -> Rows:
    if isinstance(found, Mapping):
        if split not in found:
            raise InputError(f"{source}: no split {split!r}{did_you_mean(split, found)}")
        found = found[split]
    return ((f"{source}:{i}", row) for i, row in enumerate(found, 1))
