"""What the command line says while it works, on stderr."""

from __future__ import annotations

import os
import shutil
import sys
import threading

from ..tables import cut, folded

PATIENCE = 5.0  # seconds until a log is told what takes so long
WIDEST = 100  # columns that a message is read at with ease


class Console:
    """Lines of a run. On a terminal what is being done stands in a line of its own, at once, until the next one.

    In a log such a line would only be noise, unless it lasts. ``level``: -1 quiet, 0, 1 verbose.
    """

    def __init__(self) -> None:
        self.level = 0
        self._held: str | None = None
        self._shown = False
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    @property
    def quiet(self) -> bool:
        return self.level < 0

    def state(self, line: str) -> None:
        """What is being done now; the next line of any kind takes its place."""
        if self.quiet or os.environ.get("RANK", "0") != "0":  # of several processes, one is enough
            return
        self.clear()
        if sys.stderr.isatty():
            with self._lock:
                width = shutil.get_terminal_size().columns
                print(cut(f"{line} …", width - 1), end="", file=sys.stderr, flush=True)
                self._shown = True
            return
        self._held = line
        self._timer = threading.Timer(PATIENCE, self._release, [line])
        self._timer.daemon = True
        self._timer.start()

    def say(self, line: str) -> None:
        """A line that stays, unless quiet."""
        self.clear()
        if not self.quiet:
            self._print(line)

    def detail(self, line: str) -> None:
        """A line for those who want to know more."""
        if self.level > 0:
            self.clear()
            self._print(line)

    def fault(self, line: str) -> None:
        """A line that is said to quiet users too."""
        self.clear()
        self._print(line)

    def clear(self) -> None:
        """Take away the line that says what is being done."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = self._held = None
            if self._shown:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
                self._shown = False

    def _release(self, line: str) -> None:
        with self._lock:
            if self._held == line:
                self._held = None
                self._print(line)

    def _print(self, line: str) -> None:
        rank = os.environ.get("RANK", "0")  # under a launcher it says which process it is from
        prefix = f"[rank {rank}] " if rank != "0" else ""
        lines = (prefix + line).split("\n")
        if sys.stderr.isatty():  # a log keeps its lines whole, for those who search it
            width = min(WIDEST, shutil.get_terminal_size().columns)
            lines = [folded(part, width, "  ") for part in lines]
        with self._lock:
            print("\n".join(lines), file=sys.stderr, flush=True)


console = Console()  # of this process: an error must find the line that it is to take the place of
