"""Labelled data: what is read from where, and what is said about each fault."""

from __future__ import annotations

import json

import datasets
import pytest

from calibrators.conftest import write
from trainless import InputError
from trainless.calibrators._data import DataOptions, read

GOOD = {"prompt": "one:", "choices": [" a", " b"], "label": 1}


def got(data, **options):
    main, _ = read(data, DataOptions(**options))
    return [(e.prompt, list(e.choices), e.label) for e in main.examples]


def test_the_plain_format(tmp_path):
    file = tmp_path / "data.jsonl"
    # A byte order mark, CRLF and an empty line; other columns do not matter.
    lines = [json.dumps(GOOD), "", json.dumps({**GOOD, "label": " a", "idx": 7})]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert got(file) == [("one:", [" a", " b"], 1), ("one:", [" a", " b"], 0)]
    main, held = read(file, DataOptions())
    assert [e.where for e in main.examples] == [f"{file}:1", f"{file}:3"] and held is None
    assert got([GOOD]) == [("one:", [" a", " b"], 1)]


@pytest.mark.parametrize(
    ("label", "number"), [(0, 0), (1, 1), (True, 1), (False, 0), (" b", 1), ("b", 1), ("0", 0)]
)
def test_labels(label, number):
    assert got([{**GOOD, "label": label}])[0][2] == number


def test_a_text_of_digits_is_a_choice_first():
    assert got([{"prompt": "?", "choices": [" 1", " 0"], "label": "1"}])[0][2] == 0


def test_other_columns():
    row = {"text": "so good", "stars": {"n": [3, 4]}, "yes": "fine", "sentiment": 1}
    options = {
        "template": "Review: {text} ({stars.n.1}) {{x}}\nSentiment:",
        "choices": [" bad", " {yes}"],
        "label": "sentiment",
    }
    assert got([row], **options) == [("Review: so good (4) {x}\nSentiment:", [" bad", " fine"], 1)]
    nested = {"q": "?", "choices": {"text": [" x", " y"]}, "answer": "y"}
    assert got([nested], template="{q}", choices="choices.text", label="answer") == [("?", [" x", " y"], 1)]


def test_datasets(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(6)]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])}
    )
    one = datasets.Dataset.from_list(rows, features=features)
    options = {"template": "{text}:", "choices": [" no", " yes"]}
    want = [(f"t{i}:", [" no", " yes"], i % 2) for i in range(6)]
    assert got(one, **options) == want
    one.save_to_disk(str(tmp_path / "one"))
    assert got(tmp_path / "one", **options) == want
    both = datasets.DatasetDict(train=one.select(range(4)), validation=one.select(range(4, 6)))
    both.save_to_disk(str(tmp_path / "both"))
    assert got(str(tmp_path / "both"), **options) == want[:4]
    main, held = read(str(tmp_path / "both"), DataOptions(**options, held_out_split="validation"))
    assert [e.prompt for e in held.examples] == ["t4:", "t5:"] and main.source.endswith("both:train")
    assert held.examples[0].where.endswith("both:validation:1")
    with pytest.raises(InputError, match="no split 'trian'; did you mean 'train'"):
        got(str(tmp_path / "both"), **options, split="trian")
    # A folder of plain files goes through `datasets` too.
    folder = tmp_path / "plain"
    folder.mkdir()
    write(folder / "train.jsonl", [GOOD])
    assert got(folder) == [("one:", [" a", " b"], 1)]


def test_limit_takes_from_everywhere():
    rows = [{**GOOD, "prompt": str(i)} for i in range(10)]
    assert [p for p, _, _ in got(rows, limit=5)] == ["0", "2", "4", "6", "8"]
    assert [p for p, _, _ in got(rows, limit=4)] == ["0", "2", "5", "7"]
    assert len(got(rows, limit=50)) == 10


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "choices": ["a", "b"]}, "no column 'label'"),
        ({**GOOD, "label": None}, "column 'label' is empty"),
        ({**GOOD, "label": 2}, "label 2 is out of range: there are 2 choices, 0 to 1"),
        ({**GOOD, "label": -1}, r"label -1 is out of range.*withheld"),
        ({**GOOD, "label": 1.0}, "label must be the number or the text"),
        ({**GOOD, "label": "c"}, "label 'c' is none of the choices"),
        ({**GOOD, "choices": [" a"]}, "at least two choices"),
        ({**GOOD, "choices": []}, "at least two choices"),
        ({**GOOD, "choices": [" a", " a"]}, "the choice ' a' stands there twice"),
        ({**GOOD, "choices": [" a", ""]}, "none of them empty"),
        ({**GOOD, "choices": [" a", 2]}, "a list of texts"),
        ({**GOOD, "choices": "ab"}, "a list of texts"),
        ({**GOOD, "prompt": ["x"]}, "column 'prompt' holds list"),
        ({"promt": "x", "choices": ["a", "b"], "label": 0}, "no column 'prompt'; did you mean 'promt'"),
        (["x"], "an example is an object"),
    ],
)
def test_faults_name_file_and_line(tmp_path, row, said):
    file = write(tmp_path / "data.jsonl", [GOOD, row])
    with pytest.raises(InputError, match=rf"data\.jsonl:2: .*{said}"):
        got(file)


def test_all_faults_at_once_and_the_same_one_once(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{**GOOD, "label": 5}] * 30 + [{"prompt": "x"}]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{not json\n", encoding="utf-8")
    with pytest.raises(InputError) as raised:
        got(file)
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert f"{file}:1: label 5" in str(raised.value) and "(and 29 more like it)" in str(raised.value)
    assert f"{file}:31: no column 'choices'" in str(raised.value) and f"{file}:32: this is not JSON" in str(
        raised.value
    )


def test_faults_of_the_whole(tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    for data, said in (
        (empty, "there is no example in it"),
        ([], "there is no example in it"),
        (tmp_path / "gone.jsonl", "no such file"),
        (write(tmp_path / "x.csv", []), "labelled data is JSONL"),
        (7, "got int"),
    ):
        with pytest.raises(InputError, match=said):
            got(data)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl:1: this is not UTF-8"):
        got(latin)
    for options, said in (
        ({"template": "{text"}, "expected '}'"),
        ({"template": "{}"}, "name of a column"),
        ({"template": "{text!r}"}, "name of a column"),
        ({"choices": ["{a:>3}", "b"]}, "name of a column"),
    ):
        with pytest.raises(InputError, match=said):
            DataOptions(**options).check()


def test_held_out(tmp_path):
    file = write(tmp_path / "data.jsonl", [GOOD])
    other = write(tmp_path / "other.jsonl", [{**GOOD, "prompt": "two:"}])
    _, held = read(file, DataOptions(held_out=str(other)))
    assert [e.prompt for e in held.examples] == ["two:"]
    for options, said in (
        ({"held_out": str(file)}, r"data\.jsonl:1: held out, but the same as .*data\.jsonl:1 \(1 such"),
        ({"held_out_split": "validation"}, "a file has no splits"),
        ({"held_out_split": "train"}, "the split of the data itself"),
    ):
        with pytest.raises(InputError, match=said):
            read(file, DataOptions(**options))
