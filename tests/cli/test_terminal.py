"""What a user sees of a run: answers on stdout, everything else on stderr, as much of it as was asked for."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest

from trainless.cli.console import Console
from trainless.tables import columns, cut, folded, harmless

ARGS = ("--max-new-tokens", 3)


@pytest.fixture
def file():
    rows = [{"prompt": "one"}, {"prompt": "x" * 200}, {"id": "third", "prompt": "three", "n": 2}]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "p.jsonl"


# ---------------------------------------------------------------- prompts on the command line


def test_a_prompt_is_answered_on_the_terminal(run, llama, tmp_path):
    code, out, err = run("generate", llama, "--prompt", "a prompt", *ARGS, "-q")
    assert code == 0 and err == "" and out.endswith("\n")
    assert not [p for p in Path().iterdir() if p.name != "models"], "nothing is written"
    Path("p.txt").write_text("a prompt\n")
    assert run("generate", llama, "p.txt", "-o", "out", *ARGS)[0] == 0
    (record,) = [json.loads(line) for line in Path("out/part-0000-of-0001.jsonl").open()]
    assert out == record["text"] + "\n"


def test_several_answers_stand_under_their_prompts_in_order(run, llama):
    given = ("--prompt", "a much longer prompt than the other", "--prompt", "b\nc", "--prompt", "d" * 100)
    code, out, err = run("generate", llama, *given, *ARGS, "--limit", 3)
    assert code == 0 and "3 ok, 0 errors of 3" in err and "results in" not in err
    heads = [line for line in out.splitlines() if line.startswith("[")]
    assert heads[:2] == ["[1] a much longer prompt than the other", "[2] b c"] and max(map(len, heads)) == 80
    single = {text: run("generate", llama, "--prompt", text, *ARGS, "-q")[1] for text in given[1::2]}
    assert all(answer.rstrip("\n") in out for answer in single.values())


def test_with_a_folder_they_are_kept_too(run, llama):
    code, out, err = run("generate", llama, "--prompt", "x", "-o", "out", *ARGS)
    assert code == 0 and out.strip() and "results in out (part-0000-of-0001.jsonl)" in err
    code, again, err = run("generate", llama, "--prompt", "x", "-o", "out", *ARGS)
    assert again == out and "1 of 1 results are already" in err


def test_a_prompt_that_cannot_be_answered_says_why_even_to_quiet_users(run, llama):
    code, out, err = run("generate", llama, "--prompt", "x" * 200, *ARGS, "-q")
    assert code == 3 and out == ""
    assert err.startswith("failed: 1: PromptTooLong: ") and "nothing worked" in err
    code, _, err = run("generate", llama, "--prompt", "", *ARGS)
    assert code == 1 and err == "error: --prompt 1: the prompt is empty\n"


def test_pictures_need_a_folder_and_are_named(run, tmp_path):
    pytest.importorskip("diffusers")
    from PIL import Image
    from tiny_models import save_stable_diffusion

    save_stable_diffusion(tmp_path / "sd")
    small = ("--steps", 1, "--size", "16x16")
    code, _, err = run("generate", "sd", "--prompt", "a cat", *small)
    assert code == 2 and "-o DIR" in err
    code, out, err = run("generate", "sd", "--prompt", "a cat", "--prompt", "二匹", *small, "-o", "out")
    assert code == 0 and "sheet.png" in err
    files = [line for line in out.splitlines() if line.endswith(".png")]
    assert len(files) == 2 and all(Path(file).is_file() for file in files)
    with Image.open("out/sheet.png") as sheet:
        assert sheet.width >= 2 * 96 and sheet.height >= 96
    Path("out/mine.png").write_text("mine")
    assert run("generate", "sd", "--prompt", "a cat", *small, "-o", "out", "--overwrite", "--dry-run")[0] == 0
    assert Path("out/sheet.png").exists()
    assert run("generate", "sd", "--prompt", "x" * 200, *small, "-o", "out", "--overwrite")[0] == 3
    assert not Path("out/sheet.png").exists() and Path("out/mine.png").exists()


def test_a_sheet_holds_the_first_pictures_and_their_words(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from trainless.batch.sheet import MOST, contact_sheet

    image.new("RGB", (300, 150), "red").save(tmp_path / "red.png")
    sheet = contact_sheet([("a word " * 40, tmp_path / "red.png")] * (MOST + 5))
    assert sheet.width == 8 * (192 + 8) + 8 and sheet.height == 8 * (192 + 30 + 8) + 8
    pixels = sheet.load()
    assert pixels[100, 100] == (255, 0, 0) and pixels[100, 10] == (255, 255, 255), (
        "as wide as it is, not stretched"
    )
    assert min(pixels[x, y][1] for x in range(8, 200) for y in range(202, 230)) < 100, "words below"


# ---------------------------------------------------------------- results of a file


def test_results_are_shown_in_the_order_of_the_file_by_their_lines(run, llama, file):
    code, out, err = run("generate", llama, file, "-o", "out", *ARGS)
    assert code == 3 and out == ""
    shown = [line.split()[0] for line in err.splitlines() if line.startswith("  ")]
    assert shown == ["1", "2", "third", "third"]
    assert "failed: 2: PromptTooLong: 200 prompt tokens and 3 new tokens" in err
    assert "3 prompts from p.jsonl" in err and "4 texts of at most 3 new tokens" in err
    assert "nothing worked" not in err and "results in out (part-0000-of-0001.jsonl)" in err
    assert max(map(len, (line for line in err.splitlines() if line.startswith("  ")))) <= 80


def test_many_results_are_not_all_shown_and_kinds_of_errors_are_counted(run, llama):
    Path("p.txt").write_text("".join(f"{'x' * 130}{i}\n" for i in range(9)))
    code, _, err = run("generate", llama, "p.txt", "-o", "out", *ARGS)
    assert code == 3 and "… and 4 more" in err
    assert err.count("PromptTooLong: 13") == 1 and "failed: 1 and 8 more: PromptTooLong" in err
    assert "nothing worked: every item that was run has failed" in err


def test_quiet_and_verbose(run, llama, file):
    code, out, err = run("generate", llama, file, "-o", "out", *ARGS, "-q")
    assert code == 3 and out == "" and len(err.splitlines()) == 1 and err.startswith("failed: 2: ")
    args = ("generate", llama, "--prompt", "x", *ARGS, "--patch", "head_gain", "--set", "head_gain.gain=0.5")
    plain, verbose = run(*args)[2], run(*args, "-v")[2]
    assert "loaded in" in verbose and "sites    2/2" in verbose and "loaded in" not in plain
    assert "head_gain acted on 6 of 6 calls" in plain and "acted" not in run(*args, "-q")[2]


def test_types_and_devices(run, llama):
    Path("p.txt").write_text("a prompt\n")
    base = ("generate", llama, "p.txt", *ARGS)
    code, _, err = run(*base, "-o", "out", "--dtype", "bfloat16", "--device", "cpu")
    assert code == 0 and "bfloat16 on cpu" in err
    assert json.loads(Path("out/run.json").read_text())["settings"]["dtype"] == "bfloat16"
    for more, said in (("--dtype", "int8"), "float32, bfloat16"), (("--device", "tpu:3"), "there is: cpu"):
        code, _, err = run(*base, "-o", "o2", *more)
        assert code == 2 and said in err and not Path("o2").exists()


def test_the_type_is_that_of_the_weights(llama):
    import torch

    from trainless.models import load

    for dtype in (torch.bfloat16, torch.float64):
        found = {p.dtype for p in load(str(llama), dtype, "cpu").model.parameters()}
        assert found == {dtype}


# ---------------------------------------------------------------- lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_at_once_what_is_being_done_and_takes_it_away(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console()
    console.state("checking")
    assert stream.getvalue() == "checking …"
    console.say("done")
    assert stream.getvalue() == "checking …\r\x1b[Kdone\n"
    console.state("loading")
    console.clear()
    assert stream.getvalue().endswith("loading …\r\x1b[K")


def test_a_log_is_told_only_of_what_lasts(monkeypatch):
    monkeypatch.setattr("trainless.cli.console.PATIENCE", 0.05)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console()
    console.state("short")
    console.say("a line")
    console.state("long")
    time.sleep(0.3)
    console.detail("for others")
    console.fault("the end")
    assert stream.getvalue() == "a line\nlong\nthe end\n"


def test_an_error_takes_the_place_of_what_was_being_done(run, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    run("generate", "nowhere/at/all", "--prompt", "x")
    said = stream.getvalue()
    assert (
        said.startswith("starting: nowhere/at/all …\r\x1b[K")
        and "\x1b[Kerror: model 'nowhere/at/all'" in said
    )


def test_what_a_model_writes_cannot_move_the_cursor():
    assert harmless("a\x1b[2Jb\x07\r\n\tc\u4e00") == "a\\x1b[2Jb\\x07\\r\n\tc\u4e00"


def test_wide_and_combining_characters_are_counted_as_a_terminal_does():
    assert columns("日本") == 4 and columns("e\u0301") == 1 and columns("a") == 1
    assert cut("日本語の文", 7) == "日本語…" and cut("short", 7) == "short"


@pytest.mark.parametrize(
    "text",
    ["one two three four", "  indented words here", "日本 語の 文字 です", "x" * 30 + " y", "a  b   c    d"],
)
def test_lines_are_folded_at_spaces_and_lose_nothing(text):
    lines = folded(text, 10).split("\n")
    assert all(columns(line) <= 10 or " " not in line.strip() for line in lines) and len(lines) > 1
    assert "".join(text.split()) == "".join("".join(lines).split())
    assert folded(text, 100) == text


def test_messages_fit_a_terminal_and_stay_whole_in_a_log(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for stream, count in ((Terminal(), 4), (io.StringIO(), 1)):
        monkeypatch.setattr(sys, "stderr", stream)
        Console().say("word " * 25)
        lines = stream.getvalue().splitlines()
        assert len(lines) == count and (count == 1 or max(map(len, lines)) <= 40)


def test_other_ranks_do_not_say_what_they_are_doing(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", "1")
    console = Console()
    console.state("checking")
    console.fault("went wrong")
    assert stream.getvalue() == "[rank 1] went wrong\n"
