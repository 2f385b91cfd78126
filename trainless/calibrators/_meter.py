"""Progress of one stage of a measurement on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

EVERY_SECONDS = 10.0


class Meter:
    """Counts ``total`` steps of ``what``, ``done`` of them found done; a context. Prints nothing unless ``shown``."""

    def __init__(
        self, what: str, total: int, done: int = 0, shown: bool = True, stream: TextIO | None = None
    ):
        self.what, self.total, self.done, self.before = what, total, done, done
        self.shown, self.stream = shown and total > done, stream or sys.stderr
        self.started = self.printed = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Meter:
        if self.shown and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.total, initial=self.done, desc=self.what, file=self.stream, dynamic_ncols=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, count: int = 1, note: str = "") -> None:
        """``count`` more steps are done; ``note`` is shown beside them."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif self.shown:
            now = time.monotonic()
            if now - self.printed >= EVERY_SECONDS or self.done >= self.total:
                self.printed = now
                left = (self.total - self.done) * (now - self.started) / max(1, self.done - self.before)
                said = f"{self.what}: {self.done}/{self.total} done, {left:.0f} s left"
                print(said + (f", {note}" if note else ""), file=self.stream, flush=True)
