"""Plain prompts as conversations: what is sent, that it is a setting, and that sending them raw is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from batch_helpers import records, write_lines

TWO = ("--max-new-tokens", 2)


@pytest.fixture
def sent(run, llama):
    """Run prompts; the tokens that each was sent as, by id."""

    def call(*more, out="out"):
        code, _, err = run("generate", llama, "p.jsonl", "-o", out, *TWO, *more)
        assert code == 0, err
        return {r["id"]: r["tokens_in"] for r in records(out)}, err

    return call


ROWS = [
    {"id": "plain", "prompt": "hi"},
    {"id": "chat", "messages": [{"role": "user", "content": "hi"}]},
    {"id": "own", "messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]},
]


def test_plain_prompts_are_sent_as_a_users_message(sent):
    write_lines("p.jsonl", ROWS)
    found, err = sent()
    assert found == {
        "plain": 2,
        "chat": len("<user>hi\n<assistant>"),
        "own": len("<system>own\n<user>hi\n<assistant>"),
    }
    assert "has a chat template, and 1 plain prompt is sent without it" in err and "--chat" in err
    found, err = sent("--chat", out="chat")
    assert found["plain"] == found["chat"] and "sent without it" not in err
    texts = {r["id"]: r["text"] for r in records("chat")}
    assert texts["plain"] == texts["chat"]
    assert {r["id"]: r["prompt"] for r in records("chat")}["plain"] == "hi", "the record says what was given"


def test_a_system_message_goes_before_all_that_have_none(sent):
    write_lines("p.jsonl", ROWS)
    found, _ = sent("--system", "be brief")
    assert found["plain"] == found["chat"] == len("<system>be brief\n<user>hi\n<assistant>")
    assert found["own"] == len("<system>own\n<user>hi\n<assistant>")


def test_both_are_settings_and_the_keys_of_plain_runs_stay(run, llama):
    write_lines("p.jsonl", ROWS[:1])
    base = ("generate", llama, "p.jsonl", "-o", "out", *TWO)
    assert run(*base)[0] == 0
    (plain,) = records("out")
    assert not {"chat", "system"} & set(json.loads(Path("out/run.json").read_text())["settings"])
    for more, said in (
        (["--chat"], "--chat was off, is on"),
        (["--system", "x"], "--system was not given, is 'x'"),
    ):
        code, _, err = run(*base, *more)
        assert code == 1 and said in err
    assert run(*base, "--overwrite", "--system", "x")[0] == 0
    (chat,) = records("out")
    assert chat["key"] != plain["key"]
    code, _, err = run(*base, "--system", "y")
    assert code == 1 and "--system was 'x', is 'y'" in err and "--chat" not in err
    code, _, err = run(*base)
    assert code == 1 and "--chat was on, is off" in err and "--system was 'x', is not given" in err


def test_a_model_without_a_template_cannot_chat(run, tmp_path):
    from tiny_models import save_llama

    save_llama(tmp_path / "plain", chat=False)
    Path("p.txt").write_text("one\ntwo\n")
    for option in (["--chat"], ["--system", "x"]):
        code, _, err = run("generate", "plain", "p.txt", "-o", "out", *option)
        assert code == 1 and err.count("no chat template") == 1 and len(err.splitlines()) == 1
    code, _, err = run("generate", "plain", "p.txt", "-o", "out", *TWO)
    assert code == 0 and "template" not in err


def test_a_template_that_refuses_a_system_message_names_the_line(run, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "strict")
    strict = (folder / "chat_template.jinja").read_text().replace("'refused'", "'system'")
    (folder / "chat_template.jinja").write_text(strict)
    Path("p.txt").write_text("one\n")
    code, _, err = run("generate", "strict", "p.txt", "-o", "out", "--system", "x")
    assert code == 1 and "p.txt:1: the chat template refuses this prompt" in err and "unknown role" in err


def test_images_go_first_or_where_their_placeholder_stands(run, tmp_path):
    pytest.importorskip("PIL")
    from vlm_folders import save_llava, save_picture

    folder = save_llava(tmp_path / "llava")
    save_picture(tmp_path / "a.png", 1)
    save_picture(tmp_path / "b.png", 2)
    image = {"type": "image"}
    rows = [
        {"id": "first", "prompt": "what?", "images": ["a.png", "b.png"]},
        {"id": "same", "images": ["a.png", "b.png"],
         "messages": [{"role": "user", "content": [image, image, {"type": "text", "text": "what?"}]}]},
        {"id": "placed", "prompt": "is <image> like <image>?", "images": ["a.png", "b.png"]},
        {"id": "bare", "prompt": "hi"},
    ]  # fmt: skip
    write_lines("p.jsonl", rows)
    code, _, err = run("generate", folder, "p.jsonl", "-o", "out", *TWO, "--system", "s", "--batch-size", 1)
    assert code == 0, err
    found = {r["id"]: r for r in records("out")}
    assert (
        found["first"]["text"] == found["same"]["text"]
        and found["first"]["tokens_in"] == found["same"]["tokens_in"]
    )
    around = len("<system>s\n<user>\n<assistant>")
    assert found["first"]["tokens_in"] == around + 5 * 2 + len("what?")
    assert found["placed"]["tokens_in"] == around + 5 * 2 + len("is  like ?")
    assert found["bare"]["tokens_in"] == around + len("hi")
    write_lines("q.jsonl", [{"prompt": "<image> and <image>", "image": "a.png"}])
    code, _, err = run("generate", folder, "q.jsonl", "-o", "o2", "--chat")
    assert code == 1 and "q.jsonl:1: " in err


def test_pictures_have_no_chat(run, tmp_path):
    pytest.importorskip("diffusers")
    from tiny_models import save_stable_diffusion

    save_stable_diffusion(tmp_path / "sd")
    Path("p.txt").write_text("a cat\n")
    for option in (["--chat"], ["--system", "x"]):
        code, _, err = run("generate", "sd", "p.txt", "-o", "out", *option)
        assert code == 2 and option[0] in err
