"""One launch writes to a folder at a time.

Rank 0 holds an advisory lock on ``.lock`` while it lives; every other rank joins it and holds one on
``.lock-RRRR``. The operating system lets go of the locks of a killed process, so a lock is never stale.
``.lock`` also carries what the ranks must agree on: how much of each part file belongs to the past.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from ..errors import InputError
from .launch import Launch

NAME = ".lock"
JOIN_SECONDS = 600.0  # how long a rank waits for rank 0: it may have large weights to take the digest of
_PATIENCE = 2.0  # a held lock may be a glance of a rank that looks for rank 0, or a process about to end


class Lock:
    """The lock of this rank on ``folder``. Use ``take`` (rank 0) or ``join`` (others), then ``close``."""

    def __init__(self, folder: Path, launch: Launch):
        self.folder, self.launch = folder, launch
        self._file: int | None = None

    def take(self) -> None:
        """Rank 0: become the only writer. InputError when another launch is alive in the folder."""
        self._file = _open(self.folder / NAME)
        deadline = time.monotonic() + _PATIENCE
        while not _try(self._file):
            if time.monotonic() > deadline:
                owner = _read(self._file).get("pid")
                self.close()
                raise InputError(
                    f"{self.folder} is being written by another run (process {owner}); wait for it, stop it, "
                    "or use another folder"
                )
            time.sleep(0.05)
        os.ftruncate(self._file, 0)  # whoever looks now must not take the last launch's word for ours
        for path in self.folder.glob(NAME + "-*"):
            other = os.open(path, os.O_RDWR)
            while not _try(other):
                if time.monotonic() > deadline:
                    self.close()
                    raise InputError(
                        f"{self.folder} is still being written by a rank of another run ({path.name})"
                    )
                time.sleep(0.05)
            os.close(other)
            path.unlink(missing_ok=True)

    def publish(self, word: dict[str, Any]) -> None:
        """Rank 0: let the other ranks join, and tell them ``word``."""
        self._say({"pid": os.getpid(), "launch": self.launch.id, "word": word})

    def join(self) -> dict[str, Any]:
        """Other ranks: wait for rank 0 of the same launch; returns what it published."""
        deadline = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < deadline:
            word = self._look()
            if word is not None:
                self._file = _open(self._own)
                if not _try(self._file):
                    raise InputError(f"{self.folder}: rank {self.launch.rank} is already being written")
                self._say({"pid": os.getpid()})
                return word
            time.sleep(0.05)
        raise InputError(f"{self.folder}: rank 0 of this launch did not appear in {JOIN_SECONDS:.0f} s")

    def wait_for_all(self) -> None:
        """Rank 0: stay until every other rank has joined, which it cannot do once we are gone."""
        deadline = time.monotonic() + JOIN_SECONDS
        for rank in range(1, self.launch.world):
            while not _rank(self.folder, rank).exists():
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{self.folder}: rank {rank} of this launch did not appear in {JOIN_SECONDS:.0f} s, "
                        "so its share is missing; run again to make it"
                    )
                time.sleep(0.05)

    def finish(self) -> bool:
        """This rank is done. True when all the others are done too."""
        assert self._file is not None
        said = _read(self._file)
        self._say({**said, "finished": True})
        names = [self.folder / NAME, *(_rank(self.folder, r) for r in range(1, self.launch.world))]
        return all(_finished(name) for name in names)

    def close(self, last: bool = False) -> None:
        """Let go; the last rank also removes the files of the other ranks."""
        if last:
            for path in self.folder.glob(NAME + "-*"):
                path.unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def _own(self) -> Path:
        return _rank(self.folder, self.launch.rank)

    def _say(self, value: dict[str, Any]) -> None:
        assert self._file is not None
        data = json.dumps(value).encode()
        os.pwrite(self._file, data, 0)
        os.ftruncate(self._file, len(data))

    def _look(self) -> dict[str, Any] | None:
        """What rank 0 of our launch published, if it is there and alive."""
        try:
            file = os.open(self.folder / NAME, os.O_RDWR)
        except OSError:
            return None
        try:
            if _try(file, shared=True):
                return None  # nobody holds it: what it says is from a launch that is gone
            said = _read(file)
        finally:
            os.close(file)
        return said.get("word") if said.get("launch") == self.launch.id else None


def is_live(folder: Path) -> bool:
    """Whether some process is writing to ``folder`` now."""
    for path in folder.glob(NAME + "*"):
        file = os.open(path, os.O_RDWR)
        try:
            if not _try(file, shared=True):
                return True
        finally:
            os.close(file)
    return False


def _rank(folder: Path, rank: int) -> Path:
    return folder / f"{NAME}-{rank:04d}"


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(
            f"{path.parent} cannot be written ({error.strerror}); choose another folder"
        ) from error


def _try(file: int, shared: bool = False) -> bool:
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise InputError(
            f"the file system of the results folder has no file locks ({error.strerror}); use a local folder"
        ) from error
    return True


def _read(file: int) -> dict[str, Any]:
    try:
        said = json.loads(os.pread(file, 1 << 24, 0) or b"{}")
    except ValueError:  # half written: its owner is at it
        return {}
    return said if isinstance(said, dict) else {}


def _finished(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return bool(_read(file).get("finished"))
    finally:
        os.close(file)
