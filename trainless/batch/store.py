"""The folder of results: run.json, append-only parts, media, report.json. A kill at any moment loses nothing.

Only files that run.json lists are ever read, repaired or deleted; a folder without a run.json of ours
is refused unless it is empty. What others delete while a run writes is noticed: a run ends well only when all
that it made is there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .keys import Settings
from .launch import Launch
from .lock import NAME as LOCK
from .settings import differences
from .tally import tally

RUN, REPORT, MEDIA, SHEET = "run.json", "report.json", "media", "sheet.png"
FORMAT = 1
_MEDIA_FILE = re.compile(r"[0-9a-f]{32}\.png|\.[0-9a-f]{32}\.png\.tmp")


def part_name(rank: int, world: int) -> str:
    return f"part-{rank:04d}-of-{world:04d}.jsonl"


class ResultStore:
    """Results in ``folder``. Rank 0 calls ``prepare``; every rank reads ``records`` and calls ``append``."""

    def __init__(self, folder: Path, launch: Launch):
        self.folder, self.launch = folder, launch
        self.damaged: list[str] = []  # file:line of what ``records`` could not read when it was called last
        self.gone = 0  # records whose picture it did not find
        self._part: int | None = None
        self._written: set[str] = set()  # keys that this process has written

    # ------------------------------------------------------------ before a run

    def check(
        self, settings: Settings | None, overwrite: bool, about: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """The run.json that is there, or None. InputError when the folder is not ours to write to.

        settings: None when they are not known yet; about: what else run.json says, for words. Changes nothing.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"-o {self.folder}: this is a file; give a folder")
        if not self.folder.exists():
            return None
        names = {p.name for p in self.folder.iterdir() if not p.name.startswith((LOCK, f".{RUN}"))}
        if RUN not in names:
            if names:
                raise InputError(
                    f"-o {self.folder}: the folder is not empty and holds no {RUN}, so it is not ours; "
                    "use another folder"
                )
            return None
        run = self._run()
        if settings is not None and not overwrite:
            wrong = differences(run, {**(about or {}), "settings": settings.to_dict()})
            if wrong:
                raise InputError(
                    f"-o {self.folder} was made with other settings: {'; '.join(wrong)}. "
                    "Use another folder, or --overwrite to delete its results"
                )
        return run

    def prepare(self, settings: Settings, about: Mapping[str, Any], overwrite: bool) -> dict[str, int]:
        """Rank 0, under the lock: make the folder ready; returns how many bytes of each part are past."""
        run = self.check(settings, overwrite, about)
        if run is not None and overwrite:
            self._delete(run)
            run = None
        parts = list(run["parts"]) if run else []
        for rank in range(self.launch.world):
            name = part_name(rank, self.launch.world)
            if name not in parts:
                parts.append(name)
        self._write(
            RUN,
            {
                "trainless": {"format": FORMAT, "made_by": "generate"},
                **(run or {}),
                **about,
                "settings": settings.to_dict(),
                "parts": parts,
                "media": MEDIA + "/<key>.png",
                "sheet": SHEET,
                "report": REPORT,
            },
        )
        for path in (self.folder / MEDIA).glob(".*.png.tmp"):
            if _MEDIA_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)
        return {name: _repair(self.folder / name) for name in parts}

    def make(self) -> None:
        """Create the folder; InputError when that cannot be done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"-o {self.folder} cannot be created ({error.strerror})") from error

    # ------------------------------------------------------------ records

    def records(self, sizes: Mapping[str, int] | None = None) -> dict[str, dict[str, Any]]:
        """The last record of every key, in the first ``sizes`` bytes of each part (all: None).

        Damaged lines, and records of pictures that are gone, count as not done; ``damaged`` and ``gone`` say so.
        """
        names = sizes if sizes is not None else self._run()["parts"] if (self.folder / RUN).is_file() else []
        found: dict[str, dict[str, Any]] = {}
        self.damaged, self.gone = [], 0
        for name in names:
            path = self.folder / name
            if not path.is_file():
                continue
            last, damaged = _last(path, sizes[name] if sizes is not None else path.stat().st_size)
            self.damaged += [f"{path}:{number}" for number in damaged]
            for key, record in last.items():
                # Parts have no order among them: of an error and the success of its retry, the latter.
                if key not in found or record["status"] == "ok":
                    found[key] = record
        for key, record in list(found.items()):
            if record.get("file") and not (self.folder / str(record["file"])).is_file():
                self.gone += 1
                del found[key]
        return found

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records to this rank's part, down to the disk; a kill leaves at most a torn last line."""
        path = self.folder / part_name(self.launch.rank, self.launch.world)
        try:
            if self._part is None:
                self._part = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            data = b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)
            while data:
                data = data[os.write(self._part, data) :]
            os.fsync(self._part)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror}); what is there is safe, run again to go on"
            ) from error
        self._written |= {str(r["key"]) for r in records if "key" in r}
        # What is written to a deleted file goes nowhere, and no system call says so.
        if not _is_at(self._part, path):
            raise InputError(
                f"{path} was deleted or replaced while this run was writing to it, and the {len(self._written)} "
                "results of this run in it are lost; run again to make them"
            )

    def save_image(self, key: str, image: Any) -> str:
        """Write a PNG under a temporary name, then give it its own; returns its name inside the folder."""
        folder = self.folder / MEDIA
        temporary, name = folder / f".{key}.png.tmp", f"{MEDIA}/{key}.png"
        try:
            folder.mkdir(exist_ok=True)
            _save(image, temporary)
            temporary.replace(self.folder / name)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}); what is there is safe, run again to go on"
            ) from error
        return name

    # ------------------------------------------------------------ after a run

    def report(self, keys: Iterable[str], interrupted: bool) -> dict[str, Any]:
        """Count the results of ``keys`` over all parts, and write report.json."""
        report = tally(self.records(), keys, interrupted)
        report["damaged"] = self.damaged
        self._write(REPORT, report)
        return report

    def verify(self) -> None:
        """InputError unless all that this process has written is there, down to the pictures."""
        if not self._written:
            return
        there = self.records() if (self.folder / RUN).is_file() else {}
        lost = len(self._written - there.keys())
        if lost:
            raise InputError(
                f"{lost} of the {len(self._written)} results that this run has made are not in {self.folder} any "
                "more: files of it were deleted while it ran. Run again to make them"
            )

    def save_sheet(self, image: Any) -> Path:
        """Write the sheet of all pictures."""
        temporary, path = self.folder / f".{RUN}.sheet.tmp", self.folder / SHEET
        try:
            _save(image, temporary)
            temporary.replace(path)
        except OSError as error:
            raise InputError(f"-o {self.folder} cannot be written ({error.strerror})") from error
        return path

    def close(self) -> None:
        if self._part is not None:
            os.close(self._part)
            self._part = None

    # ------------------------------------------------------------ inside

    def _run(self) -> dict[str, Any]:
        try:
            run = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
            ours = run["trainless"]["made_by"] == "generate" and all(
                re.fullmatch(r"part-\d{4,}-of-\d{4,}\.jsonl", name) for name in run["parts"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"-o {self.folder}: its {RUN} was not written by trainless generate, or is damaged; "
                "use another folder"
            ) from error
        if not ours or run["trainless"]["format"] != FORMAT:
            raise InputError(f"-o {self.folder}: its {RUN} is of another kind or version; use another folder")
        return dict(run)

    def _delete(self, run: Mapping[str, Any]) -> None:
        for name in [*run["parts"], REPORT, *([SHEET] if run.get("sheet") == SHEET else [])]:
            (self.folder / name).unlink(missing_ok=True)
        media = self.folder / MEDIA
        if media.is_dir() and not media.is_symlink():
            for path in media.iterdir():
                if _MEDIA_FILE.fullmatch(path.name):
                    path.unlink()
            if not any(media.iterdir()):
                media.rmdir()

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        temporary = self.folder / f".{name}.{self.launch.rank}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(value, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
        except OSError as error:
            raise InputError(f"-o {self.folder} cannot be written ({error.strerror})") from error


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = (
        isinstance(record, dict)
        and isinstance(record.get("key"), str)
        and record.get("status") in {"ok", "error"}
    )
    return record if whole else None


def _last(path: Path, size: int) -> tuple[dict[str, dict[str, Any]], list[int]]:
    """The last record of every key in the first ``size`` bytes of a part, and the numbers of damaged lines."""
    found: dict[str, dict[str, Any]] = {}
    damaged: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            size -= len(line)
            if size < 0:
                break
            record = _record(line)
            if record is not None:
                found[record["key"]] = record
            elif line.strip() and line.endswith(
                b"\n"
            ):  # what is torn off at the end is cut when a run begins
                damaged.append(number)
    return found, damaged


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _save(image: Any, path: Path) -> None:
    """A PNG, down to the disk."""
    with path.open("wb") as file:
        image.save(file, format="PNG")
        file.flush()
        os.fsync(file.fileno())


def _repair(path: Path) -> int:
    """Cut a torn last line off, or end a whole one that lacks its line feed; returns the size."""
    if not path.is_file():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        tail, start = b"", size
        while start > 0 and b"\n" not in tail:
            step = min(1 << 16, start)
            start -= step
            file.seek(start)
            tail = file.read(step) + tail
        last = tail[tail.rfind(b"\n") + 1 :]
        if last:
            if _record(last) is not None:
                file.seek(size)
                file.write(b"\n")
                size += 1
            else:
                size -= len(last)
                file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    return size
