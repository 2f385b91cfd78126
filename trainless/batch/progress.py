"""One line of progress on rank 0: a bar on a terminal, plain lines now and then elsewhere. To stderr."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

EVERY_SECONDS = 10.0


class Progress:
    """Counts finished samples. ``shown`` False (other ranks) prints nothing."""

    def __init__(self, total: int, shown: bool = True, stream: TextIO | None = None):
        self.total, self.shown, self.stream = total, shown and total > 0, stream or sys.stderr
        self.done = self.errors = 0
        self.started = self.printed = time.monotonic()
        self.bar: Any = None
        if self.shown and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, file=self.stream, unit="item", dynamic_ncols=True)

    def add(self, done: int, errors: int) -> None:
        self.done += done
        self.errors += errors
        if self.bar is not None:
            self.bar.set_postfix(errors=self.errors, refresh=False)
            self.bar.update(done)
        elif self.shown:
            now = time.monotonic()
            if now - self.printed >= EVERY_SECONDS or self.done >= self.total:
                self.printed = now
                rate = self.done / max(now - self.started, 1e-9)
                left = (self.total - self.done) / max(rate, 1e-9)
                said = f"{self.done}/{self.total} done, {self.errors} errors"
                print(f"{said}, {rate:.2f} per second, {left:.0f} s left", file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
