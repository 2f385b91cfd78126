"""Training runs of a few seconds, and, run as a program, such runs that are killed.

As a program it has everything imported and forks for each line of JSON on stdin: {"kind": …, "out": folder, "number":
n} trains until halfway through the writing of its n-th file; the answer is the signal that ended it. A process of its
own, since one in which a gradient was computed by several threads cannot be forked to compute more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))
import train_pipeline
import train_vlm

STAGES = {
    "pipeline": ["vae.pt", "layout.pt", "unet.pt"],
    "dit": ["vae.pt", "layout-transformer.pt", "transformer.pt"],
    "vlm": ["tower.pt", "answers.pt"],
}
SCORED = {
    "pipeline": ["--score-prompts", "2"], "dit": ["--score-prompts", "2"], "vlm": ["--score-pictures", "2"]
}  # fmt: skip
_MAINS: dict[str, Callable[[list[str]], None]] = {
    "pipeline": train_pipeline.main, "dit": train_pipeline.main, "vlm": train_vlm.main
}  # fmt: skip
_MORE: dict[str, list[str]] = {"pipeline": [], "dit": ["--denoiser", "transformer"], "vlm": []}


def train(kind: str, out: Path, *more: str) -> None:
    common = ["--tiny", "--dtype", "float32", "--save-seconds", "0", "--out", str(out)]
    _MAINS[kind]([*common, *_MORE[kind], *more])


def killed_while_saving(kind: str, out: Path, number: int) -> int:
    """Train in a process of its own that dies halfway through its ``number``-th file; the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            save, count = torch.save, 0

            def half(content: Any, stream: Any) -> None:
                nonlocal count
                count += 1
                save(content, stream)
                if count == number:
                    stream.truncate(stream.tell() // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

            torch.save = half  # type: ignore[assignment]
            train(kind, out)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        print(killed_while_saving(asked["kind"], Path(asked["out"]), asked["number"]), flush=True)
