"""Tables of other people: the prompt under another name, and columns that are kept."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path

import pytest
from batch_helpers import records, write_lines

from trainless.batch.columns import Columns
from trainless.batch.prompts import read_prompts
from trainless.errors import InputError

ROWS = [
    {"question": "one", "source": "a", "score": 1.5, "id": 7},
    {"question": "two", "source": "b", "score": float("nan"), "id": 8},
]


def write(kind: str) -> str:
    if kind == "jsonl":
        write_lines("p.jsonl", [ROWS[0], {**ROWS[1], "score": None}])
        return "p.jsonl"
    if kind == "csv":
        Path("p.csv").write_text("question,source,score,id\none,a,1.5,7\ntwo,b,,8\n")
        return "p.csv"
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(ROWS), "p.parquet")
        return "p.parquet"
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk("p")
    return "p"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "datasets"])
def test_the_prompt_has_another_name_and_the_rest_is_kept(kind):
    items, faults = read_prompts(write(kind), None, Columns("question", keep=True))
    assert not faults.found and [item.prompt for item in items] == ["one", "two"]
    one = "1.5" if kind == "csv" else 1.5
    assert items[0].meta == {"source": "a", "score": one} and items[0].id in (7, "7")
    assert items[1].meta["source"] == "b" and items[1].meta.get("score") is None


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_other_columns_are_errors_unless_they_are_kept(kind):
    spec = write(kind)
    try:
        _, faults = read_prompts(spec, None, Columns("question"))
        said = "\n".join(faults.found)
    except InputError as error:
        said = str(error)
    assert "'source'" in said and "unknown" in said and "'question'" not in said.split("known:")[0]
    if kind != "jsonl":
        assert "--keep-columns" in said


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_field_that_is_not_there(kind):
    spec = write(kind)
    try:
        _, faults = read_prompts(spec, None, Columns("questoin", keep=True))
        said = "\n".join(faults.found)
    except InputError as error:
        said = str(error)
    assert "'questoin'" in said
    if kind != "jsonl":
        assert "did you mean 'question'?" in said


def test_a_field_called_prompt_is_one_more_column_then():
    write_lines("p.jsonl", [{"prompt": "old", "text": "new"}])
    (item,), _ = read_prompts("p.jsonl", None, Columns("text", keep=True))
    assert item.prompt == "new" and item.meta == {"prompt": "old"}


def test_kept_columns_join_the_meta_that_is_there():
    write_lines("p.jsonl", [{"prompt": "x", "meta": {"a": 1}, "b": 2}])
    assert read_prompts("p.jsonl", None, Columns(keep=True))[0][0].meta == {"a": 1, "b": 2}
    write_lines("p.jsonl", [{"prompt": "x", "meta": {"a": 1}, "a": 2}, {"prompt": "x", "meta": 5, "a": 2}])
    _, faults = read_prompts("p.jsonl", None, Columns(keep=True))
    assert "p.jsonl:1: column 'a' is in meta already" in faults.found[0]
    assert "p.jsonl:2: meta must be an object" in faults.found[1]
    write_lines("p.jsonl", [{"prompt": "x"}])
    assert read_prompts("p.jsonl", None, Columns(keep=True))[0][0].meta is None


def test_dates_and_decimals_are_words_and_bytes_are_refused():
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {
        "prompt": "x",
        "when": datetime.datetime(2024, 5, 1, 12, 0),
        "cost": decimal.Decimal("1.50"),
        "many": [float("inf"), 1.0],
    }
    parquet.write_table(pa.Table.from_pylist([rows]), "p.parquet")
    (item,), _ = read_prompts("p.parquet", None, Columns(keep=True))
    assert item.meta == {"when": "2024-05-01T12:00:00", "cost": "1.50", "many": [None, 1.0]}
    parquet.write_table(pa.Table.from_pylist([{"prompt": "x", "raw": b"\0"}]), "p.parquet")
    _, faults = read_prompts("p.parquet", None, Columns(keep=True))
    assert "column 'raw' holds bytes" in faults.found[0]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="--prompt-field messages"):
        Columns("messages")
    Path("p.txt").write_text("x\n")
    with pytest.raises(InputError, match=r"p\.txt holds one prompt a line"):
        read_prompts("p.txt", None, Columns("text"))


def test_kept_columns_stand_in_the_records_and_outside_the_keys(run, llama):
    base = ("--max-new-tokens", 1, "--prompt-field", "question")
    spec = write("csv")
    assert run("generate", llama, spec, "-o", "out", *base)[0] == 1
    assert run("generate", llama, spec, "-o", "out", *base, "--keep-columns")[0] == 0
    metas = {r["prompt"]: r["meta"] for r in records("out")}
    assert metas == {"one": {"source": "a", "score": "1.5"}, "two": {"source": "b"}}
    Path("p.csv").write_text("question,id\none,7\ntwo,8\n")
    code, _, err = run("generate", llama, spec, "-o", "out", *base)
    assert code == 0 and "2 of 2 results are already" in err
