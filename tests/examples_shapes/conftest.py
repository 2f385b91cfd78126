"""The scripts of examples/shapes import each other as scripts do: from their own folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples" / "shapes")]

import torch  # noqa: E402
from tiny_runs import SCORED, train  # noqa: E402


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(folder of checkpoints, folder of the export) of an uninterrupted run of a script; made when first asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            train(kind, folder / "out", "--export", str(folder / "model"), *SCORED[kind])
            made[kind] = (folder / "out", folder / "model")
        return made[kind]

    return get


@pytest.fixture(scope="module")
def killed() -> Iterator[Callable[[str, Path, int], int]]:
    """Train in a process that dies halfway through its n-th file; the signal that ended it."""
    program = subprocess.Popen(
        [sys.executable, HERE / "tiny_runs.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdin and program.stdout

    def kill(kind: str, out: Path, number: int) -> int:
        print(json.dumps({"kind": kind, "out": str(out), "number": number}), file=program.stdin, flush=True)
        return int(program.stdout.readline())

    yield kill
    program.stdin.close()
    assert program.wait(60) == 0
    program.stdout.close()
