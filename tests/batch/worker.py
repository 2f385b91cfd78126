"""A process that has everything imported and forks a real ``trainless`` for each line of JSON on stdin.

Imports take seconds and killing takes milliseconds: forking makes it cheap to kill many processes at
many moments. Line: {"args": [...], "log": file, "delay": seconds before SIGKILL, or null, "until":
[file, bytes], "signal" when the file is that long, or null}; it answers with {"code": exit status,
negative for a signal}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    import torch  # noqa: F401
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama
    import transformers.models.llava.modeling_llava  # noqa: F401

    import trainless.batch.vision  # noqa: F401
    from trainless.cli import main as command

    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1), os.dup2(log, 2)
            try:
                command(order["args"])
            except SystemExit as ended:
                os._exit(ended.code or 0)
            os._exit(99)
        if order["delay"] is not None:
            time.sleep(order["delay"])
            os.kill(pid, signal.SIGKILL)
        if order["until"] is not None:
            part, size = Path(order["until"][0]), order["until"][1]
            deadline = time.monotonic() + 60
            while not (part.exists() and part.stat().st_size > size) and time.monotonic() < deadline:
                time.sleep(0.002)
            os.kill(pid, order["signal"])
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
