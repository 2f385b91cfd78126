"""A patch of a recipe while it is being read: what was given, where, and how layers of files merge."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import nearest
from ..patchers import Method, parameters_of
from .faults import Faults, key_text
from .text import At, RecipeSource
from .typed import arms, hints_of, plain
from .values import build, values_of
from .where import Where


@dataclass(frozen=True)
class GivenPatches:
    """One value with where it stands; ``key`` is its name in messages."""

    value: Any
    source: RecipeSource
    at: At
    key: str

    def fault(self, faults: Faults, path: At, reason: str, calibration: bool = False) -> None:
        faults.add(
            self.source, (*self.at, *path), reason, key=self.key + _inside(path), calibration=calibration
        )


def _inside(path: At) -> str:
    text = key_text(("x", *path))
    return text[1:]


@dataclass
class Draft:
    """One patch before it is built. ``given`` and ``where`` hold what was said, key by key."""

    id: str
    cls: type[Method]
    source: RecipeSource
    at: At
    key: str
    named: bool = False  # the id was written, not derived from the method
    partial: bool = False  # a base recipe could not be read, so nothing can be called missing
    given: dict[str, GivenPatches] = field(default_factory=dict)
    where: dict[str, GivenPatches] = field(default_factory=dict)

    def copy(self, **changes: Any) -> Draft:
        return dataclasses.replace(self, **{"given": dict(self.given), "where": dict(self.where), **changes})

    def merged(self, child: Draft) -> Draft:
        """This draft with a child's values on top, key by key; faults of the whole point at the child."""
        return child.copy(given={**self.given, **child.given}, where={**self.where, **child.where})

    def build(self, faults: Faults) -> Use | None:
        """The method and its Where, or None after reporting every fault."""
        values = {name: g.value for name, g in self.given.items()}
        calibration = self._calibration(values, faults)
        self._files(values, faults)
        method = build(self.cls, values, self._reporter(self.given, "with", faults))
        narrowed = {name: g.value for name, g in self.where.items()}
        where = build(Where, narrowed, self._reporter(self.where, "where", faults))
        if method is None or where is None:
            return None
        digest = hashlib.sha256(calibration.read_bytes()).hexdigest() if calibration is not None else None
        return Use(self.id, method, where, calibration, digest, frozenset(self.given))

    def _files(self, values: dict[str, Any], faults: Faults) -> None:
        """Files and folders that are parameters: made absolute, relative to the recipe that names them."""
        for name, hint in hints_of(self.cls).items():
            if name not in parameters_of(self.cls) or name == "calibration" or Path not in arms(hint):
                continue
            value = values.get(name)
            if not isinstance(value, (str, Path)) or not str(value):
                continue
            given = self.given[name]
            if "://" in str(value):
                given.fault(faults, (), f"{value!r} is a URL; download it and name it by its path")
                continue
            path = (Path(given.source.folder or Path.cwd()) / Path(value).expanduser()).absolute()
            if not path.exists():
                given.fault(faults, (), f"there is no file or folder {str(value)!r}")
            values[name] = path

    def _reporter(self, given: dict[str, GivenPatches], part: str, faults: Faults) -> Any:
        def fault(path: At, reason: str) -> None:
            if path and path[0] in given:
                given[path[0]].fault(faults, path[1:], reason)
            elif not (self.partial and reason.startswith("needs ")):
                inner = (*self.at, part) if self.source.is_file else self.at
                key = f"{self.key}.{part}" if self.source.is_file else self.key
                faults.add(self.source, inner, reason, key=".".join([key, *map(str, path)]))

        return fault

    def _calibration(self, values: dict[str, Any], faults: Faults) -> Path | None:
        """The calibration file's absolute path; taken out of ``values`` unless the method declares it."""
        declared = "calibration" in parameters_of(self.cls)
        if values.get("calibration") is None or not (declared or self.cls.calibration_of):
            if not declared and self.cls.calibration_of and "calibration" in values:
                del values["calibration"]
            return None
        given = self.given["calibration"]
        path = resolve_file(given, faults)
        for name in self.cls.calibration_sets:
            if name in self.given:
                self.given[name].fault(
                    faults,
                    (),
                    f"is given together with calibration, which says the {name} too; keep one of them",
                )
        if path is None or not declared:
            del values["calibration"]
        else:
            accepts_path = Path in getattr(hints_of(self.cls)["calibration"], "__args__", ())
            values["calibration"] = path if accepts_path else str(path)
        return path


def resolve_file(given: GivenPatches, faults: Faults) -> Path | None:
    """The existing file that ``given`` names, relative to its recipe; None after a fault."""
    value = given.value
    if not isinstance(value, (str, Path)) or not str(value):
        given.fault(faults, (), f"must be the path of a calibration file; got {value!r}")
        return None
    if "://" in str(value):
        given.fault(faults, (), f"{value!r} is a URL; download the file and name it by its path")
        return None
    path = (Path(given.source.folder or Path.cwd()) / value).absolute()
    if not path.is_file():
        given.fault(
            faults,
            (),
            f"no calibration file {str(value)!r}; `trainless calibrate` makes one",
            calibration=True,
        )
        return None
    return path


@dataclass(frozen=True)
class Use:
    """One patch of a resolved recipe.

    calibration: the absolute path of its file, if it has one, with the SHA-256 of the contents. given:
    the parameters that were written down; with a calibration, some of the others come from its file.
    """

    id: str
    method: Method
    where: Where
    calibration: Path | None = None
    calibration_digest: str | None = None
    given: frozenset[str] = frozenset()

    @property
    def from_calibration(self) -> frozenset[str]:
        """The parameters that the calibration file decides."""
        if self.calibration is None:
            return frozenset()
        groups = (group for group in self.method.calibration_settings if not self.given & set(group))
        return frozenset(self.method.calibration_sets).union(*groups)

    def resolved(self) -> dict[str, Any]:
        """Plain data with every parameter, defaults included, but for those that a calibration file decides."""
        values = {k: v for k, v in values_of(self.method).items() if k not in self.from_calibration}
        if self.calibration is not None:
            values["calibration"] = str(self.calibration)
        data: dict[str, Any] = {"use": self.method.name, "id": self.id, "with": values}
        if self.where:
            data["where"] = plain(self.where.given())
        return data

    def fingerprint(self) -> dict[str, Any]:
        """What decides the results: like ``resolved``, with the contents of files for their paths."""
        data = self.resolved()
        del data["id"]
        if self.calibration is not None:
            data["with"]["calibration"] = self.calibration_digest
        for name in data["with"]:
            if name != "calibration" and isinstance(path := getattr(self.method, name), Path):
                data["with"][name] = contents_digest(path)
        return data


def contents_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files; read again when they change."""
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.is_file())
    return _digest(path.is_dir(), tuple((f, f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@functools.lru_cache(maxsize=32)
def _digest(named: bool, stamps: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.sha256()
    for path, _, _ in stamps:
        with path.open("rb") as file:
            inside = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name if named else ''}:{inside};".encode())
    return total.hexdigest()


def separate(drafts: list[Draft]) -> list[Draft]:
    """Give every draft its own id: ``h2o`` twice becomes ``h2o-1`` and ``h2o-2``.

    An id that was written is kept when its only twins have theirs from the method's name.
    """
    result: list[Draft] = []
    taken = {d.id for d in drafts}
    for draft in drafts:
        twins = [d for d in drafts if d.id == draft.id and d is not draft]
        if twins and not (draft.named and not any(d.named for d in twins)):
            number = next(n for n in itertools.count(1) if f"{draft.id}-{n}" not in taken)
            draft = draft.copy(id=f"{draft.id}-{number}")
            taken.add(draft.id)
        result.append(draft)
    return result


def find(drafts: list[Draft], name: str, cls: type[Method] | None) -> Draft | str:
    """The draft that ``name`` means (an id, or a method in use), or why there is none."""
    exact = [d for d in drafts if d.id == name]
    if exact:
        return exact[0]
    same = [d for d in drafts if cls is not None and d.cls is cls]
    if len(same) == 1:
        return same[0]
    ids = [d.id for d in drafts]
    if same:
        return f"{name!r} is used {len(same)} times; name one by its id: {', '.join(d.id for d in same)}"
    if cls is not None:
        return f"method {cls.name!r} is not in use here; in use: {', '.join(ids)}"
    close = nearest(name, ids)
    return f"{name!r} is not in use here; " + (
        f"did you mean {close!r}?" if close else f"in use: {', '.join(ids)}"
    )
