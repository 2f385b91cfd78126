"""``python -m trainless`` is the command ``trainless``. Ctrl-C ends it in one line from its first moment on."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line; see ``trainless.cli``."""
    # Before the command line is imported, and long before torch: a KeyboardInterrupt in the middle of an import
    # comes out as pages of traceback, as another error, or not at all.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from .cli import main as command

    command()


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once. What is on disk is whole at any moment; work that wants to finish has a handler of its own."""
    try:
        sys.stdout.flush()
    except (OSError, RuntimeError, ValueError):  # nobody reads it, or it was being written to
        pass
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
