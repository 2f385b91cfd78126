"""The command that all parts of the demo use."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def generate(model: str, prompts: Path, out: Path, *options: str) -> dict[str, dict[str, Any]]:
    """Run `trainless generate`; returns its records by id. Where it fails it says why, and the demo ends."""
    command = ["generate", model, str(prompts), "-o", str(out), "--overwrite", *options]
    print("$ trainless", " ".join(command), flush=True)
    # While the command starts nobody has hold of it yet, so a TERM waits until then.
    late: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: late.append(128 + number))
    child = subprocess.Popen([sys.executable, "-m", "trainless", *command])
    try:
        signal.signal(signal.SIGTERM, before)
        if late:
            raise SystemExit(late[0])
        code = child.wait()
    except BaseException:  # Ctrl-C or TERM: it must not go on alone and hold its folder
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise
    if code:
        raise SystemExit(code)
    lines = [line for part in sorted(out.glob("part-*.jsonl")) for line in part.open(encoding="utf-8")]
    return {str(record["id"]): record for record in map(json.loads, lines)}
