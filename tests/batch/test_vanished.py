"""What others do to a folder of results while it is written, or between two runs, is never passed over in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from batch_helpers import records

ARGS = ("--max-new-tokens", 2, "--batch-size", 1)
PART = Path("out/part-0000-of-0001.jsonl")


@pytest.fixture
def go(run, llama):
    Path("p.txt").write_text("one\ntwo two\nthree three three\n")
    return lambda *more: run("generate", llama, "p.txt", "-o", "out", *ARGS, *more)


def during_batch(monkeypatch, number, act):
    """Do something to the folder in the middle of a batch."""
    from trainless.batch.text import TextEngine

    sound, seen = TextEngine.generate, []

    def generate(self, batch):
        seen.append(len(batch))
        if len(seen) == number:
            act()
        return sound(self, batch)

    monkeypatch.setattr(TextEngine, "generate", generate)


def replaced():
    shutil.rmtree("out")
    Path("out").mkdir()


@pytest.mark.parametrize(
    "act",
    [lambda: shutil.rmtree("out"), lambda: PART.unlink(), replaced, lambda: Path("out").rename("elsewhere")],
)
@pytest.mark.parametrize("number", [2, 3])
def test_a_folder_that_goes_while_it_is_written(go, monkeypatch, act, number):
    during_batch(monkeypatch, number, act)
    code, _, err = go()
    assert code == 1 and "3 ok" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "deleted or replaced" in line and f"the {number} results of this run in it are lost" in line


@pytest.mark.parametrize("act", [lambda: shutil.rmtree("out"), replaced])
def test_a_folder_that_goes_before_the_first_result(go, monkeypatch, act):
    during_batch(monkeypatch, 1, act)
    code, _, err = go()
    assert code == 1 and "3 ok" not in err
    assert "cannot be written" in err or "3 of the 3 results that this run has made are not in out" in err


def test_results_that_go_after_the_last_of_them(go, monkeypatch):
    from trainless.batch.store import ResultStore

    sound = ResultStore.verify

    def verify(self):
        lines = PART.read_bytes().splitlines(keepends=True)
        PART.write_bytes(lines[0])
        sound(self)

    monkeypatch.setattr(ResultStore, "verify", verify)
    code, _, err = go()
    assert code == 1 and "2 of the 3 results that this run has made are not in out" in err
    monkeypatch.setattr(ResultStore, "verify", sound)
    code, _, err = go()
    assert code == 0 and "1 of 3 results are already" in err and len(records("out")) == 3


def test_a_damaged_line_is_named_and_its_result_made_again(go):
    assert go()[0] == 0
    lines = PART.read_bytes().splitlines()
    gone = json.loads(lines[1])["key"]
    PART.write_bytes(b"\n".join([lines[0], lines[1][:-9], b"", lines[2]]) + b"\n")
    code, _, err = go()
    assert code == 0 and f"{PART}:2: this line is damaged" in err and f"{PART}:3" not in err
    assert err.count("is damaged") == 1
    made = [
        json.loads(line)
        for line in PART.read_bytes().splitlines()
        if line.endswith(b"}") and line[:1] == b"{"
    ]
    assert [r["key"] for r in made].count(gone) == 1
    assert json.loads(Path("out/report.json").read_text())["damaged"] == [f"{PART}:2"]


@pytest.mark.parametrize(
    "line", [b"[1]", b'{"key": 5, "status": "ok"}', b'{"status": "ok"}', b"\xff\xfe", b"\0\0\0"]
)
def test_every_kind_of_damage_is_named(go, line):
    assert go()[0] == 0
    lines = PART.read_bytes().splitlines()
    PART.write_bytes(b"\n".join([line, *lines]) + b"\n")
    code, _, err = go()
    assert code == 0 and f"{PART}:1: this line is damaged" in err and "3 of 3 results are already" in err


def test_a_torn_last_line_is_repaired_without_a_word(go):
    assert go()[0] == 0
    PART.write_bytes(PART.read_bytes()[:-30])
    code, _, err = go()
    assert code == 0 and "damaged" not in err and len(records("out")) == 3


def test_pictures_that_are_gone_are_made_again(run, tmp_path):
    pytest.importorskip("diffusers")
    from tiny_models import save_stable_diffusion

    save_stable_diffusion(tmp_path / "sd")
    Path("p.txt").write_text("a cat\na dog\n")
    args = ("generate", "sd", "p.txt", "-o", "out", "--steps", 1, "--size", "16x16")
    assert run(*args)[0] == 0
    first = Path("out", records("out")[0]["file"])
    before = first.read_bytes()
    first.unlink()
    code, _, err = run(*args)
    assert code == 0 and "1 pictures are gone from out; they are made again" in err
    assert first.read_bytes() == before and json.loads(Path("out/report.json").read_text())["ok"] == 2


def test_settings_are_told_apart_in_words(run, llama, tmp_path):
    Path("p.txt").write_text("one\n")
    base = ("generate", llama, "p.txt", "-o", "out", *ARGS)
    h2o = ("--patch", "h2o", "--set", "h2o.heavy=4", "--set")
    assert run(*base, *h2o, "h2o.recent=4")[0] == 0
    said = {
        (*h2o, "h2o.recent=5"): "recipe was h2o(recent=4), is h2o(recent=5)",
        (): "recipe was h2o, is none",
        ("--patch", "head_gain", "--set", "head_gain.gain=0.5"): "recipe was h2o, is head_gain",
    }
    for more, wanted in said.items():
        code, _, err = run(*base, *more)
        assert code == 1 and wanted in err
        assert not [word for word in err.split() if len(word) >= 32 and word.isalnum()], "no digests"
    from tiny_models import save_llama

    save_llama(tmp_path / "other", seed=1)
    code, _, err = run("generate", "other", "p.txt", "-o", "out", *ARGS, *h2o, "h2o.recent=4")
    assert code == 1 and f"model was {llama}, is other" in err
    assert run("generate", "other", "p.txt", "-o", "o2", *ARGS)[0] == 0
    save_llama(tmp_path / "other", seed=2)
    code, _, err = run("generate", "other", "p.txt", "-o", "o2", *ARGS)
    assert code == 1 and "model was other, whose files have changed since" in err
    code, _, err = run("generate", "other", "p.txt", "-o", "o2", *ARGS, "--dtype", "bfloat16")
    assert code == 1 and "--dtype was 'float32', is 'bfloat16'" in err
