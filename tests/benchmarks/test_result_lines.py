"""Results as JSON lines: what kills, other runs and other settings leave in the file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lines import append, chosen, file_of, records, runs, when


def test_a_torn_line_is_passed_over_and_replaced_by_the_next_record(tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.jsonl"
    assert records(out) == []
    append(out, {"n": 1})
    with out.open("a", encoding="utf-8") as file:
        file.write('{"n": 2, "va')
    torn = out.read_bytes()
    assert [r["n"] for r in records(out)] == [1]
    assert out.read_bytes() == torn, "reading leaves a line alone that another run may be writing"
    append(out, {"n": 3})
    assert [r["n"] for r in records(out)] == [1, 3]


def test_a_file_of_one_torn_line_begins_anew(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    out.write_text('{"n": 2, "va', encoding="utf-8")
    append(out, {"n": 3})
    assert [r["n"] for r in records(out)] == [3]


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    out.write_text('{"n": 1}\nnothing\n{"n": 2}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"r\.jsonl:2: no record"):
        records(out)


def test_records_say_when_they_were_measured(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    append(out, {"n": 1})
    (found,) = records(out)
    assert found["threads"] == torch.get_num_threads()
    earlier = {**found, "date": "2026-01-02T03:04:05+00:00", "threads": 64, "cpu": "an older one"}
    unsaid = {"date": "2026-01-02", "threads": 3}
    assert when([unsaid], "a CPU") == "2026-01-02 · a CPU, 3 threads"
    assert when([found, earlier], "a CPU").startswith(f"2026-01-02 to {found['date'][:10]} · ")
    assert f"{found['cpu']}, {torch.get_num_threads()} thread" in when([found, earlier], "a CPU")
    assert when([earlier], "a CPU") == "2026-01-02 · an older one, 64 threads"
    assert when([{**earlier, "threads": 1}], "a CPU").endswith(", 1 thread")


@pytest.mark.parametrize(
    ("items", "found"),
    [([], []), ([0, 1, 2, 3], [(0, 3), (3, 4)]), ([1, 2, 5, 6, 7], [(1, 3), (5, 8)]), ([4], [(4, 5)])],
)
def test_what_is_left_is_done_in_stretches(items: list[int], found: list[tuple[int, int]]) -> None:
    assert runs(items, 3) == found


def test_words_that_are_in_no_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    assert chosen(parser, ["act, all", "var"], None) == ["act, all", "var"]
    assert chosen(parser, ["act, all", "var"], ["act"]) == ["act, all"]
    with pytest.raises(SystemExit):
        chosen(parser, ["act, all", "var"], ["act", "avr"])
    assert "'avr' is part of none of these: act, all; var" in capsys.readouterr().err


def test_a_table_never_overwrites_its_records() -> None:
    assert file_of("a/b.jsonl") == Path("a/b.jsonl")
    with pytest.raises(argparse.ArgumentTypeError, match=r"does not end in \.jsonl"):
        file_of("results.md")


# ---------------------------------------------------------------- on a model


def painted(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> str:
    pytest.importorskip("diffusers")
    pytest.importorskip("scipy")
    import shapes_images

    strips = str(out.parent / "strips")
    common = ["--sizes", "32x32", "--steps", "1", "--out", str(out), "--strips", strips]
    monkeypatch.setattr("sys.argv", ["shapes_images.py", *common, *options])
    shapes_images.main()
    return out.with_suffix(".md").read_text(encoding="utf-8")


def test_more_captions_are_added_and_pair_with_the_same_noise(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "r.jsonl"
    painted(monkeypatch, out, "--prompts", "1", "--only", "clear r=12")
    page = painted(monkeypatch, out, "--prompts", "3", "--batch", "3", "--only", "clear r=12")
    assert page.count("| 3 |\n") == 2
    assert [(r["variant"], r["first"], len(r["things"])) for r in records(out)] == [
        ("unpatched", 0, 1), ("clear r=12", 0, 1), ("unpatched", 1, 2), ("clear r=12", 1, 2),
    ]  # fmt: skip
    assert (tmp_path / "shapes-32x32.png").is_file(), "sheets of a file of one's own lie beside it"


def test_noise_belongs_to_the_caption_and_not_to_its_batch() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("scipy")
    from evaluate import load_pipeline, new_requests, paint

    pipeline, requests = load_pipeline("demo:shapes"), new_requests(3, 1)
    whole = paint(pipeline, requests, 32, 32, steps=2, guidance=1.0, batch=3)
    apart = paint(pipeline, requests[1:], 32, 32, steps=2, guidance=1.0, batch=1, first=1)
    assert all(np.allclose(one, other, atol=1e-4) for one, other in zip(whole[1:], apart, strict=True))
    assert not np.allclose(whole[0], whole[1], atol=1e-2)


def test_a_report_says_what_was_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "r.jsonl"
    line = painted(monkeypatch, out, "--prompts", "1", "--only", "unpatched", "--guidance", "1")
    assert "1 steps, guidance 1;" in line
    with pytest.raises(SystemExit, match="holds nothing that was measured with demo:shapes"):
        painted(monkeypatch, out, "--report", "--guidance", "2")
    record = {
        **json.loads(out.read_text(encoding="utf-8")),
        "date": "2020-02-03T00:00:00+00:00",
        "threads": 7,
    }
    out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert "2020-02-03 · " in (page := painted(monkeypatch, out, "--report", "--guidance", "1"))
    assert ", 7 threads · demo:shapes" in page
