"""Ctrl-C while results are being made: finish what is in hand, then stop. A second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

# A launcher passes Ctrl-C on to processes that the terminal has already told: not a second wish.
ECHO_SECONDS = 1.0


class Interrupt:
    """Context manager; ``signal`` is the signal that asked to stop, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._when = number, now
            print("stopping after the batch in hand (again: at once)", file=sys.stderr, flush=True)
        elif number == signal.SIGINT and now - self._when > ECHO_SECONDS:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or 0)
