"""What commands list: as JSON too, one method, the recipes of a model, near names, `--where`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _json(run, *arguments):
    code, out, err = run(*arguments, "--json")
    return code, json.loads(out), err


def test_every_listing_is_json_too(run, llama):
    from trainless.patchers import known
    from trainless.recipes import packaged

    code, found, _ = _json(run, "methods")
    assert code == 0 and {one["name"] for one in found} == set(known())
    code, found, _ = _json(run, "methods", llama)
    assert found[0]["fits"] and found[0]["sites"] == 2
    code, found, _ = _json(run, "recipes", "list")
    assert [one["name"] for one in found] == packaged() and all(one["methods"] for one in found)
    code, found, _ = _json(run, "recipes", "show", "llama/kvquant")
    assert found["patches"][0]["use"] == "kvquant"
    code, found, _ = _json(run, "recipes", "show", "llama/kvquant", "--origin")
    assert {"path", "value", "source", "note"} == set(found[0])
    code, found, _ = _json(run, "explain", llama, "--patch", "h2o")
    assert code == 0 and found["ok"] and found["methods"][0]["sites"] == 2
    code, found, _ = _json(run, "explain", llama, "--patch", "entropy")
    assert code == 1 and found["problems"][0]["kind"] == "NoMatch"
    code, found, _ = _json(run, "doctor")
    assert code == 0 and {one["package"] for one in found["versions"]} >= {"torch"} and found["kernels"]


def test_one_method(run):
    code, out, _ = run("methods", "tempscale")
    assert code == 0 and out.startswith("attn_temperature (also tempscale")
    code, out, _ = run("methods", "h2o")
    assert code == 0 and out.startswith("h2o\n") and "streaming" not in out.split("costs")[0]
    assert max(map(len, out.splitlines())) <= 80
    for word in ("identity", "exact", "costs", "the sampled rows against", "heavy=0.1", "(published)"):
        assert word in out
    code, found, _ = _json(run, "methods", "h2o")
    assert found["name"] == "h2o" and found["costs"].startswith("the sampled rows against the keys")
    code, _, err = run("methods", "h3o")
    assert code == 1 and "did you mean the method 'h2o'?" in err


def test_recipes_of_a_model(run, llama):
    code, out, _ = run("recipes", "list", llama)
    assert code == 0 and "llama/kvquant" in out and "qwen3/kvquant" not in out and "sdxl" not in out
    assert "llama/dormant-head: not as it stands: heads" in out.replace("\n", " ").replace("  ", " ")
    code, found, _ = _json(run, "recipes", "list", llama)
    problems = {one["name"]: one["problem"] for one in found}
    assert problems["llama/kvquant"] is None and "layer" in problems["llama/dormant-head"]


@pytest.mark.parametrize("command", ["explain", "bench", "generate"])
def test_where_on_the_command_line(run, llama, command):
    more = {
        "explain": (),
        "bench": ("--tokens", "8", "--new-tokens", "2"),
        "generate": ("p.txt", "-o", "out"),
    }
    Path("p.txt").write_text("w1 w2\n")
    options = (*more[command], "--patch", "h2o")
    code, out, err = run(command, llama, *options, "--where", "h2o.layers=1:")
    assert code == 0 and "h2o.where.layers = 1:" in err
    if command == "explain":
        assert "1/2, layers 1" in out
    if command == "generate":
        used = json.loads(Path("out/run.json").read_text())["recipe"]["patches"][0]
        assert used["where"] == {"layers": "1:"}
    for bad in ("h2o.layers", "layers=1:"):
        assert run(command, llama, *options, "--where", bad)[0] == 2
    code, _, err = run(command, llama, *options, "--where", "h2o.layer=1:")
    assert code == 1 and "did you mean 'layers'?" in err
    assert run(command, llama, *more[command], "--where", "h2o.layers=1:")[0] == 2


def test_bench_without_matplotlib_writes_the_numbers(run, llama, monkeypatch):
    import trainless.bench.result as result
    import trainless.models.extras as extras

    there = extras.installed
    for module in (extras, result):
        monkeypatch.setattr(module, "installed", lambda name: name != "matplotlib" and there(name))
    small = ("--tokens", "8", "--new-tokens", "2", "--patch", "attn_temperature")
    code, out, err = run("bench", llama, *small, "-o", "out", "--json")
    assert code == 0 and "no plot: matplotlib is not installed" in err
    assert json.loads(out)["rows"] == json.loads(Path("out/bench.json").read_text())["rows"]
    assert [p.name for p in Path("out").iterdir()] == ["bench.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_completion():
    asked = {**os.environ, "_TRAINLESS_COMPLETE": "complete_bash"}

    def words(line: str) -> list[str]:
        given = {**asked, "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - (line[-1] != " "))}
        done = subprocess.run(
            [sys.executable, "-m", "trainless"],
            env=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout.split()

    assert words("trainless ex") == ["explain"]
    assert words("trainless explain m --patch kv") == ["kvquant", "kvzip"]
    assert "llama/kvquant" in words("trainless explain m --recipe llama/kv")
