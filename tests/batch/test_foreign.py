"""Words outside a model's closed vocabulary are said before the run and in the record; sizes must divide."""

from __future__ import annotations

import json
import shutil

import pytest
from batch_helpers import records, write_lines

from trainless.errors import InputError
from trainless.models import describe
from trainless.models.vocabulary import Vocabulary

KNOWS = "captions such as 'a red cat'"
ARGS = ("--steps", 1, "--size", "16x16")


@pytest.fixture(scope="session")
def diffusion(tmp_path_factory):
    pytest.importorskip("diffusers")
    from tiny_models import save_stable_diffusion

    return save_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd")


def with_words(folder, target, words=("a", "red", "cat"), **more):
    shutil.copytree(folder, target)
    found = {"words": list(words), "knows": KNOWS, **more}
    (target / "closed_vocabulary.json").write_text(json.dumps(found), encoding="utf-8")
    return target


def test_foreign_words_are_said_once_and_in_each_record(run, diffusion, tmp_path):
    folder = with_words(diffusion, tmp_path / "closed")
    rows = [
        {"id": "known", "prompt": "A red  RED\ncat"},
        {"id": "foreign", "prompt": "a cad on a table"},
        {"id": "negative", "prompt": "a cat", "negative_prompt": "rust", "n": 2},
    ]
    write_lines("p.jsonl", rows)
    code, _, err = run("generate", folder, "p.jsonl", "-o", "out", *ARGS)
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "was not trained on" in line]
    assert line.startswith("2 prompts have words that") and KNOWS in line
    assert "p.jsonl:2, p.jsonl:3" in line and "'cad' (did you mean 'cat'?), 'on', 'table'" in line
    notes = {(r["id"], r["sample"]): r.get("note") for r in records("out")}
    assert notes["known", 0] is None and "'cad'" in notes["foreign", 0] and KNOWS in notes["foreign", 0]
    assert "rust" in notes["negative", 0] and notes["negative", 1] == notes["negative", 0]
    assert all(r["status"] == "ok" for r in records("out")), "they are run all the same"


def test_a_model_without_the_file_says_nothing(run, diffusion):
    write_lines("p.jsonl", [{"prompt": "whatever there is"}])
    code, _, err = run("generate", diffusion, "p.jsonl", "-o", "out", *ARGS)
    assert code == 0 and "trained on" not in err
    assert "note" not in records("out")[0]


def test_special_tokens_and_images_are_no_words(run, tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image
    from vlm_folders import save_llava

    folder = with_words(save_llava(tmp_path / "llava"), tmp_path / "closed")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    content = [{"type": "image", "image": str(tmp_path / "red.png")}, {"type": "text", "text": "a red dog"}]
    rows = [
        {"id": "marked", "prompt": "<image> a cat", "image": str(tmp_path / "red.png")},
        {"id": "said", "messages": [{"role": "user", "content": content}]},
    ]
    write_lines("p.jsonl", rows)
    code, _, err = run("generate", folder, "p.jsonl", "-o", "out", "--max-new-tokens", 1)
    assert code == 0, err
    notes = {r["id"]: r.get("note") for r in records("out")}
    assert notes["marked"] is None and "'dog'" in notes["said"] and "'red'" not in notes["said"]


def test_signs_are_words_too(run, diffusion, tmp_path):
    """A tokenizer of words makes something unknown of them, which changes the picture."""
    folder = with_words(diffusion, tmp_path / "closed", ("a", "red", "cat", "?"))
    rows = [{"id": "known", "prompt": "a red cat?"}, {"id": "signs", "prompt": "a_red 🟥, cat"}]
    write_lines("p.jsonl", rows)
    assert run("generate", folder, "p.jsonl", "-o", "out", *ARGS)[0] == 0
    notes = {r["id"]: r.get("note") for r in records("out")}
    assert notes["known"] is None
    assert notes["signs"].startswith("the model does not know '_', '🟥', ',';")


def test_special_tokens_of_a_pipeline_are_no_words(run, diffusion, tmp_path):
    folder = with_words(diffusion, tmp_path / "closed")
    write_lines("p.jsonl", [{"prompt": "<|startoftext|> a red cat"}])
    code, _, err = run("generate", folder, "p.jsonl", "-o", "out", *ARGS)
    assert code == 0 and "note" not in records("out")[0], err


def test_only_prompts_that_are_run_are_said(run, diffusion, tmp_path):
    folder = with_words(diffusion, tmp_path / "closed")
    write_lines("p.jsonl", [{"prompt": "a cat"}, {"prompt": "a dog"}])
    code, _, err = run("generate", folder, "p.jsonl", "-o", "out", "--limit", 1, *ARGS)
    assert code == 0 and "trained on" not in err


def test_a_prompt_that_is_long_because_it_is_spelled_says_so(run, diffusion, tmp_path):
    folder = with_words(diffusion, tmp_path / "closed")
    write_lines("p.jsonl", [{"prompt": "a photograph of an astronaut " * 20}])
    code, _, _ = run("generate", folder, "p.jsonl", "-o", "out", *ARGS)
    (record,) = records("out")
    assert code == 3 and record["error"]["type"] == "PromptTooLong"
    assert "count letter by letter: the model does not know 'photograph', 'of'" in record["error"]["message"]


def test_a_word_without_end_is_cut_in_the_note():
    known = Vocabulary(frozenset({"cat"}), "little")
    assert len(known.note(known.foreign("x" * 100_000))) < 100


def test_many_foreign_words_are_counted():
    known = Vocabulary(frozenset({"left-hand", "it's"}), "little")
    assert known.foreign("Left-hand IT'S") == []
    foreign = known.foreign("one two one three four five six seven")
    assert len(foreign) == 7 and known.note(foreign).endswith("and 2 more; it knows little")


@pytest.mark.parametrize("text", ["{", "[]", '{"words": [1], "knows": "x"}', '{"words": ["a"]}'])
def test_a_broken_file_is_one_clear_error(diffusion, tmp_path, text):
    folder = with_words(diffusion, tmp_path / "closed")
    (folder / "closed_vocabulary.json").write_text(text, encoding="utf-8")
    with pytest.raises(
        InputError, match=r"closed_vocabulary\.json cannot be used .*take it out of the folder"
    ):
        _ = describe(str(folder)).vocabulary


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"params": {"height": -8}}, (), "params.height must be pixels, an integer from 8, not -8"),
        ({"params": {"height": True}}, (), "params.height must be pixels, an integer from 8, not True"),
        ({"params": {"height": 4}}, (), "params.height must be pixels, an integer from 8, not 4"),
        ({"params": {"height": 20}}, (), "params.height 20 is no multiple of 8, the pixels that"),
        ({"params": {"width": 13}}, (), "give 8 or 16"),
        ({}, ("--size", "48x32"), "--size: height 48 is no multiple of 32"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_weights(
    run, diffusion, tmp_path, monkeypatch, row, options, said
):
    import trainless.batch.request as module

    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("weights were loaded"))
    folder = shutil.copytree(diffusion, tmp_path / "sd")
    if options:  # an autoencoder of six levels
        config = folder / "vae" / "config.json"
        found = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**found, "block_out_channels": [8] * 6}), encoding="utf-8")
    write_lines("p.jsonl", [{"prompt": "a cat", **row}])
    code, _, err = run("generate", folder, "p.jsonl", "-o", "out", "--steps", 1, *options)
    assert code == 1 and said in err and len(err.splitlines()) == 1, "one fault for one value"
