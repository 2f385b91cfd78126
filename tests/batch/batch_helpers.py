"""Fixtures and readers for tests that run the whole command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    ENV.pop(_name, None)


class Worker:
    """Starts real runs in forks of one process; see worker.py."""

    def __init__(self, folder: Path):
        self.log = folder / "log"
        file = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV
        )
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, *args, delay=None, until=None, signal=signal.SIGINT) -> int:
        order = {"args": [str(a) for a in args], "log": str(self.log), "delay": delay, "until": until}
        order["signal"] = int(signal)
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["code"]


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    made = Worker(tmp_path_factory.mktemp("worker"))
    yield made
    made.process.stdin.close()
    made.process.wait(20)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    from tiny_models import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run ``trainless ARGUMENTS`` in this process: (exit code, stdout, stderr). The folder is tmp_path."""
    from trainless.cli import main

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code or 0, out, err

    return call


def records(folder) -> list[dict]:
    return [json.loads(line) for part in sorted(Path(folder).glob("part-*.jsonl")) for line in part.open()]


def results(folder) -> dict:
    """What was made, by key: everything of a record but the time it took."""
    return {r["key"]: {k: v for k, v in r.items() if k != "seconds"} for r in records(folder)}


def write_lines(path, rows) -> Path:
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
