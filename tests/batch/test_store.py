"""The folder of results: resume, repair, refusal, deletion. What is on disk is the only memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from batch_helpers import records, results, write_lines

from trainless.batch.items import Item
from trainless.batch.keys import Settings, jobs
from trainless.batch.pictures import Picture

ARGS = ("--max-new-tokens", 4, "--batch-size", 2)


@pytest.fixture
def go(run, llama):
    def call(*more, out="out", prompts="p.txt"):
        return run("generate", llama, prompts, "-o", out, *ARGS, *more)

    return call


def prompts(count, name="p.txt"):
    Path(name).write_text("".join(f"prompt {'x' * i}\n" for i in range(count)))


def test_layout_and_record(go):
    prompts(3)
    code, out, err = go()
    assert code == 0 and out == "" and "3 ok, 0 errors of 3" in err
    names = {p.name for p in Path("out").iterdir() if not p.name.startswith(".")}
    assert names == {"run.json", "report.json", "part-0000-of-0001.jsonl"}
    record = records("out")[0]
    assert list(record) == [
        "id", "sample", "key", "prompt", "seed", "status", "text", "tokens_in", "tokens_out", "seconds",
        "patch", "error",
    ]  # fmt: skip
    run_json = json.loads(Path("out/run.json").read_text())
    assert run_json["settings"]["max_new_tokens"] == 4 and run_json["settings"]["dtype"] == "float32"
    assert run_json["model"]["fingerprint"] and "torch" in run_json["versions"]
    report = json.loads(Path("out/report.json").read_text())
    assert (report["total"], report["ok"], report["errors"], report["missing"]) == (3, 3, 0, 0)
    assert report["tokens_out"] == sum(r["tokens_out"] for r in records("out"))


def test_meta_passes_through_and_stands_outside_the_key(go):
    write_lines("p.jsonl", [{"id": "a", "prompt": "x", "meta": {"m": 1}}])
    write_lines("q.jsonl", [{"id": "b", "prompt": "x"}])
    assert go(prompts="p.jsonl")[0] == 0
    assert records("out")[0]["meta"] == {"m": 1}
    assert go(prompts="q.jsonl")[0] == 0
    assert len(records("out")) == 1, "another id and no meta is the same item"


def test_resume_adds_what_is_new_whatever_the_order_limit_and_batch(go):
    prompts(6)
    assert go("--limit", 2)[0] == 0
    assert len(records("out")) == 2
    lines = Path("p.txt").read_text().splitlines()
    Path("p.txt").write_text("\n".join([*lines[::-1], "a new one"]))
    code, _, err = go("--batch-size", 3)
    assert code == 0 and "2 of 7 results are already" in err
    keys = [r["key"] for r in records("out")]
    assert len(keys) == len(set(keys)) == 7
    before = Path("out/part-0000-of-0001.jsonl").read_bytes()
    assert go()[0] == 0
    assert Path("out/part-0000-of-0001.jsonl").read_bytes() == before


def test_results_are_those_of_the_present_prompts(go):
    prompts(4)
    assert go()[0] == 0
    prompts(2)
    assert go()[0] == 0
    report = json.loads(Path("out/report.json").read_text())
    assert (report["total"], report["ok"], report["other_records"]) == (2, 2, 2)


@pytest.mark.parametrize("cut", [1, 2, 30, 200])
def test_torn_last_line_is_repaired(go, cut):
    prompts(5)
    assert go()[0] == 0
    whole = results("out")
    part = Path("out/part-0000-of-0001.jsonl")
    part.write_bytes(part.read_bytes()[:-cut])
    assert go()[0] == 0
    assert results("out") == whole  # reading every line as JSON is half of the point
    assert len(records("out")) == 5


def test_damaged_line_in_the_middle_is_made_again(go):
    prompts(5)
    assert go()[0] == 0
    whole = results("out")
    part = Path("out/part-0000-of-0001.jsonl")
    lines = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([lines[0], b"\0" * 40, *lines[2:]]))
    assert go()[0] == 0
    good = [line for line in part.read_bytes().split(b"\n") if line.startswith(b"{")]
    assert {json.loads(line)["key"] for line in good} == set(whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--max-new-tokens", 5), "--max-new-tokens was 4, is 5"),
        (("--seed", 3), "--seed was 0, is 3"),
    ],
)
def test_other_settings_are_refused_by_name(go, more, said):
    prompts(2)
    assert go()[0] == 0
    before = Path("out/run.json").read_bytes()
    code, _, err = go(*more)
    assert code == 1 and said in err and "--overwrite" in err
    assert Path("out/run.json").read_bytes() == before and len(records("out")) == 2


def test_another_model_is_refused_and_a_moved_one_is_not(go, run, llama, tmp_path):
    from tiny_models import save_llama

    prompts(2)
    assert go()[0] == 0
    shutil.copytree(llama, "moved")
    assert run("generate", "moved", "p.txt", "-o", "out", *ARGS)[0] == 0
    assert len(records("out")) == 2
    save_llama(tmp_path / "other", seed=1)
    code, _, err = run("generate", "other", "p.txt", "-o", "out", *ARGS)
    assert code == 1 and "model was" in err


def test_overwrite_deletes_only_ours(go):
    prompts(3)
    assert go()[0] == 0
    media = Path("out/media")
    media.mkdir()
    (media / ("0" * 32 + ".png")).write_bytes(b"")
    mine = [Path("out/notes.txt"), Path("out/part-0000-of-0009.jsonl"), media / "mine.png"]
    for file in mine:
        file.write_text("mine")
    code, _, _ = go("--overwrite", "--max-new-tokens", 5, "--limit", 1)
    assert code == 0
    assert len(json.loads(Path("out/report.json").read_text())) and all(f.read_text() == "mine" for f in mine)
    assert not (media / ("0" * 32 + ".png")).exists()
    ours = [json.loads(line) for line in Path("out/part-0000-of-0001.jsonl").open()]
    assert [r["tokens_out"] for r in ours] == [5]


@pytest.mark.parametrize(
    "content", [None, "{}", "not json", '{"trainless": {"made_by": "bench", "format": 1}, "parts": []}']
)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_foreign_folder_is_refused(go, content, more):
    prompts(1)
    Path("out").mkdir()
    foreign = Path("out/thesis.tex" if content is None else "out/run.json")
    foreign.write_text(content or "years of work")
    code, _, err = go(*more)
    assert code == 1 and "out" in err and "another folder" in err
    assert foreign.read_text() == (content or "years of work")
    assert {p.name for p in Path("out").iterdir()} == {foreign.name}


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere"])
def test_unwritable_folder_is_one_clear_error(go, out):
    prompts(1)
    Path("file").write_text("a file")
    code, _, err = go(out=out)
    assert code == 1 and len(err.strip().splitlines()) == 1 and out in err


def test_retry_errors_appends_and_the_last_record_counts(go, monkeypatch):
    from trainless.batch.text import TextEngine

    prompts(4)
    sound = TextEngine.generate

    def flaky(self, batch):
        if any(job.item.prompt.endswith("xxx") for job in batch):
            raise ValueError("bad luck")
        return sound(self, batch)

    monkeypatch.setattr(TextEngine, "generate", flaky)
    code, _, err = go()
    assert code == 3 and "3 ok, 1 errors of 4" in err
    (bad,) = [r for r in records("out") if r["status"] == "error"]
    assert bad["error"] == {"type": "ValueError", "message": "bad luck"} and bad["text"] is None
    monkeypatch.setattr(TextEngine, "generate", sound)
    assert go()[0] == 3, "a plain resume keeps the error"
    code, _, err = go("--retry-errors")
    assert code == 0 and "4 ok, 0 errors" in err
    made = records("out")
    assert [r["status"] for r in made if r["key"] == bad["key"]] == ["error", "ok"]
    assert len(made) == 5


def test_dry_run_writes_nothing_and_loads_no_weights(go, monkeypatch):
    import trainless.batch.request as module

    prompts(3)
    Path("p.txt").write_text(Path("p.txt").read_text() + "x" * 200 + "\n")
    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("weights were loaded"))
    code, out, _ = go("--dry-run")
    assert code == 0 and "4 prompts, 4 samples" in out and "2 of up to 2" in out
    assert "p.txt:4" in out and "128 positions" in out
    assert not Path("out").exists()


def test_finished_run_loads_no_weights(go, monkeypatch):
    import trainless.batch.request as module

    prompts(2)
    assert go()[0] == 0
    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("weights were loaded"))
    assert go()[0] == 0


# ---------------------------------------------------------------- keys

SETTINGS = Settings("m", None, "float32", 0, 4, None, None)


def keys(*items, settings=SETTINGS):
    return [job.key for job in jobs(items, settings)]


def test_key_covers_content_and_settings(tmp_path):
    from dataclasses import replace

    image = tmp_path / "a.png"
    image.write_bytes(b"1")
    base = Item("", prompt="x", images=(Picture("a", image),))
    key = keys(base)[0]
    different = [
        Item("", prompt="y", images=(Picture("a", image),)),
        Item("", prompt="x"),
        Item("", prompt="x", images=(Picture("a", image),), negative_prompt=""),
        Item("", prompt="x", images=(Picture("a", image),), params={"top_k": 1}),
        Item("", prompt="x", images=(Picture("a", image),), seed=0),
        Item("", messages=[{"role": "user", "content": "x"}], images=(Picture("a", image),)),
    ]
    changed = {
        "model": "n",
        "recipe": "r",
        "dtype": "float16",
        "seed": 1,
        "max_new_tokens": 5,
        "size": "8x8",
        "steps": 1,
    }
    found = [keys(item)[0] for item in different]
    found += [keys(base, settings=replace(SETTINGS, **{k: v}))[0] for k, v in changed.items()]
    image.write_bytes(b"2")
    found.append(keys(base)[0])
    assert len({key, *found}) == len(found) + 1


def test_key_does_not_cover_name_place_meta_or_number_of_samples(tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    a.write_bytes(b"1"), b.write_bytes(b"1")
    one = keys(Item("f:1", id=1, prompt="x", images=(Picture("a", a),), meta=1))
    three = keys(Item("g:9", id="z", prompt="x", images=(Picture("b", b),), n=3))
    assert three[:1] == one and len(set(three)) == 3


def test_equal_items_are_told_apart_by_occurrence_only():
    x, y = Item("", prompt="x"), Item("", prompt="y")
    assert len(set(keys(x, x))) == 2
    assert sorted(keys(x, y, x)) == sorted(keys(x, x, y))
    names = [job.id for job in jobs([x, x], SETTINGS)]
    assert names[1] == f"{names[0]}-2"


def test_key_of_this_version_is_fixed():
    """Folders of results outlive versions: a change here is a change of the record format."""
    assert keys(Item("", prompt="x")) == ["b0b7afc8516445d3251041d52e215808"]
