"""What a measurement has done so far, on disk, so that a stop at any moment loses one step at most.

A JSONL file beside the output: the first line holds the settings, each further line one finished step.
A file made with other settings is refused; a torn last line is cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

FORMAT = "trainless calibration progress 1"
_BEGINS = b'{"format": ' + json.dumps(FORMAT).encode()


class ResumeJournal:
    """Finished steps by key. Without a path they are kept in memory only.

    As a context it closes the file; ``finish`` deletes it, when the output holds everything.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self.path, self.steps = path, dict[str, Any]()
        self.settings = json.loads(json.dumps(dict(settings)))
        self._file: int | None = None
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                raise InputError(
                    f"{path}: cannot be written ({error.strerror}); choose another place for -o"
                ) from error
            except InputError:
                self.__exit__()
                raise

    def __contains__(self, key: str) -> bool:
        return key in self.steps

    def __getitem__(self, key: str) -> Any:
        return self.steps[key]

    def add(self, steps: Mapping[str, Any]) -> None:
        """Record finished steps, down to the disk."""
        self.steps.update(steps)
        self._write({"key": key, "value": value} for key, value in steps.items())

    def finish(self) -> None:
        """Delete the file."""
        self.__exit__()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> ResumeJournal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # ------------------------------------------------------------------ the file

    def _open(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._lock(path)
        with path.open("rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        lines = [_line(text) for text in data[:whole].splitlines()]
        if lines:
            self._check(path, lines[0])
        elif not (data.startswith(_BEGINS) or _BEGINS.startswith(data)):
            raise InputError(f"{path}: not a progress file of ours; choose another name for -o")
        os.ftruncate(self._file, whole)
        os.lseek(self._file, 0, os.SEEK_END)
        if not lines:
            self._write([{"format": FORMAT, "settings": self.settings}])
        # A damaged line in between counts as a step that was not done.
        self.steps = {
            line["key"]: line["value"] for line in lines[1:] if line and {"key", "value"} <= set(line)
        }

    def _check(self, path: Path, head: dict[str, Any] | None) -> None:
        if head is None or head.get("format") != FORMAT or not isinstance(head.get("settings"), dict):
            raise InputError(f"{path}: not a progress file of ours; choose another name for -o")
        was = head["settings"]
        names = [*self.settings, *(name for name in was if name not in self.settings)]
        wrong = [
            f"{name} was {was.get(name)!r}, is {self.settings.get(name)!r}"
            for name in names
            if was.get(name) != self.settings.get(name)
        ]
        if wrong:
            raise InputError(
                f"{path} was begun with other settings: {'; '.join(wrong)}. "
                "Go on with those, choose another -o, or delete it to begin anew"
            )

    def _lock(self, path: Path) -> None:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
            except BlockingIOError:
                raise InputError(
                    f"{path}: another process is at work on it; wait, or choose another -o"
                ) from None
            except OSError:
                return  # a file system without locks

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self._file is None:
            return
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); run again to go on"
            ) from error


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
