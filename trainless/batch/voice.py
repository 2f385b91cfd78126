"""Who a run speaks to: what it says, and how much of it is wanted."""

from __future__ import annotations

import sys
from typing import Protocol


class Voice(Protocol):
    """``quiet``: only what went wrong is said; ``verbose``: details too."""

    @property
    def quiet(self) -> bool: ...

    def state(self, line: str) -> None:
        """What is being done now; the next line of any kind takes its place."""

    def say(self, line: str) -> None:
        """A line that stays."""

    def detail(self, line: str) -> None:
        """A line for those who want to know more."""

    def fault(self, line: str) -> None:
        """A line that is said to quiet users too."""


class Plain:
    """Lines on stderr."""

    quiet = False

    def state(self, line: str) -> None:
        pass

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def detail(self, line: str) -> None:
        pass

    fault = say
