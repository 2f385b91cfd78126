"""The first two seconds of the command: what needs no torch does not wait for it, and Ctrl-C ends it in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
HEAVY = "torch", "transformers", "numpy", "diffusers"
QUICK = [
    "--help",
    "--version",
    *(f"{name} --help" for name in ("generate", "methods", "explain", "calibrate", "bench", "doctor")),
    "recipes --help",
    "recipes check --help",
]


def test_help_and_version_import_nothing_heavy():
    program = (
        "import sys\nfrom trainless.cli import main\n"
        f"for line in {QUICK!r}:\n    try:\n        main(line.split())\n    except SystemExit as ended:\n"
        f"        assert not ended.code\n    found = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    assert not found, (line, found)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENV, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_package_has_its_exports_without_importing_them_first():
    program = (
        "import sys, trainless\nassert 'torch' not in sys.modules\nassert set(trainless.__all__) <= set(dir(trainless))\n"
        "assert trainless.InputError.__name__ == 'InputError' and 'torch' not in sys.modules\n"
        "import trainless.patch.api\nfrom trainless.patch.api import unpatch as same\nfrom trainless import *\n"
        # One of the exports has the name of the folder that it comes from.
        "assert trainless.patch is patch and patch.__module__ == 'trainless.patch.api' and unpatch is same\n"
        "assert all(getattr(trainless, name) is not None for name in trainless.__all__)\n"
        "try:\n    trainless.nonsense\nexcept AttributeError as error:\n    assert 'nonsense' in str(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENV, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="looks at what a process has loaded in /proc"
)
@pytest.mark.parametrize("moment", ["_ctypes", "libtorch", "_torch_docs"])
def test_ctrl_c_while_everything_is_imported_is_one_line(tmp_path, moment):
    (tmp_path / "p.txt").write_text("a prompt\n")
    command = [sys.executable, "-m", "trainless", "generate", "nowhere/at/all", "p.txt", "-o", "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENV) as running:
        maps, deadline = Path(f"/proc/{running.pid}/maps"), time.monotonic() + 60
        wanted = "libtorch" if moment == "_torch_docs" else moment
        while wanted not in maps.read_text() and time.monotonic() < deadline:
            assert running.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.005)
        if moment == "_torch_docs":  # some way into it
            time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        said = running.stderr.read()
        code = running.wait(60)
    assert code == 130 and said == "interrupted\n"
