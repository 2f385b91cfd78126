"""Every prompt format, and every way in which a line can be wrong."""

from __future__ import annotations

import io
import json

import pytest

from trainless.batch.prompts import read_prompts, refuse
from trainless.errors import InputError

DATA = [
    {"id": "a", "prompt": "first", "n": 2, "params": {"temperature": 0.5}, "meta": {"k": [1]}},
    {"id": "b", "prompt": "second, with comma\nand line", "seed": 7},
]


def read(path, stdin=None):
    items, faults = read_prompts(str(path), stdin)
    refuse(faults)
    return items


def check_data(items):
    assert [(i.id, i.prompt, i.n, i.seed) for i in items] == [
        ("a", "first", 2, None),
        ("b", "second, with comma\nand line", 1, 7),
    ]
    assert items[0].params == {"temperature": 0.5} and items[0].meta == {"k": [1]}
    assert items[1].params == {} and items[1].meta is None


def test_text_keeps_spaces_counts_lines_and_takes_bom_and_crlf(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbf one \r\n\r\n\xc3\xa9\xe2\x80\xa8still the same line\n")
    assert [(i.id, i.prompt) for i in read(file)] == [(1, " one "), (3, "é\u2028still the same line")]


def test_jsonl(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in DATA))
    check_data(read(file))


def test_csv(tmp_path):
    file = tmp_path / "p.csv"
    file.write_bytes(
        b"id,prompt,n,seed,params,meta\r\n"
        b'a,first,2,,"{""temperature"": 0.5}","{""k"": [1]}"\r\n'
        b'b,"second, with comma\nand line",,7,,\r\n'
    )
    check_data(read(file))


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "p.parquet"
    names = ("id", "prompt", "n", "seed", "params", "meta")
    parquet.write_table(arrow.Table.from_pylist([{n: row.get(n) for n in names} for row in DATA]), file)
    check_data(read(file))


def test_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {name: [row.get(name) for row in DATA] for name in ("id", "prompt", "n", "seed", "params", "meta")}
    rows["n"] = [2, 1]
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    check_data(read(tmp_path / "set"))


def test_openai_lines(tmp_path):
    body = {
        "model": "x",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "stop": ["."],
        "n": 2,
    }
    line = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(line))
    (item,) = read(file)
    assert (item.id, item.n, item.messages) == ("r1", 2, [{"role": "user", "content": "hi"}])
    assert item.params == {"max_new_tokens": 5, "stop": ["."]}


@pytest.mark.parametrize(
    ("data", "prompts"), [(b'\n {"prompt": "j"}\n', ["j"]), (b"plain\n{not json\n", ["plain", "{not json"])]
)
def test_stdin_is_jsonl_or_text(data, prompts):
    assert [i.prompt for i in read("-", io.BytesIO(data))] == prompts


BAD_LINES = [
    ('{"prompt": "x"', "not JSON"),
    ('["x"]', "an object with fields"),
    ('{"promt": "x"}', "unknown field 'promt'; did you mean 'prompt'?"),
    ('{"id": 1}', "prompt is missing"),
    ('{"prompt": null}', "prompt is missing"),
    ('{"prompt": 3}', "prompt must be a string"),
    ('{"prompt": "x", "messages": []}', "both given"),
    ('{"messages": []}', "at least one"),
    ('{"messages": [{"role": "user"}]}', "exactly role and content"),
    ('{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "takes parts"),
    ('{"prompt": "x", "prompt": "y"}', "stands twice"),
    ('{"prompt": "x", "seed": -1}', "seed must be"),
    ('{"prompt": "x", "seed": 1.5}', "seed must be"),
    ('{"prompt": "x", "n": 0}', "n must be"),
    ('{"prompt": "x", "n": true}', "n must be"),
    ('{"prompt": "x", "params": []}', "params must be"),
    ('{"prompt": "x", "params": {"temperature": NaN}}', "NaN"),
    ('{"prompt": "x", "id": {}}', "id must be"),
    ('{"prompt": "x", "image": "nowhere.png"}', "is no file"),
    ('{"prompt": "x", "images": "a.png"}', "list of paths"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "url '/v1/embeddings'"),
    ('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "tools": []}}', "body.tools"),
    ('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "stream": true}}', "body.stream"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_is_named_with_its_place(tmp_path, line, said):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl:3: ") as error:
        read(file)
    assert said in str(error.value)
    assert all("p.jsonl:3: " in line for line in str(error.value).splitlines())


def test_all_faults_at_once_and_duplicate_ids(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": 7, "prompt": "x"}\n{"n": 0, "sed": 1}\n{"id": "7", "prompt": "y"}\n')
    with pytest.raises(InputError) as error:
        read(file)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0][-1] for line in lines] == ["2", "2", "2", "3"]
    assert "already used at" in lines[3] and "p.jsonl:1" in lines[3]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"prompt,sed\nx,1\n", "p.csv:1: unknown column 'sed'; did you mean 'seed'?"),
        (b"prompt,n\nx,1\nx,many\n", "p.csv:3: column 'n' must hold an integer"),
        (b"prompt,n\nx\n", "p.csv:2: 1 cells under 2 columns"),
        (b'prompt,params\nx,"{"\n', "p.csv:2: column 'params' must hold JSON"),
        (b"prompt\n\xff\n", "p.csv:2: this is not UTF-8"),
        (b"", "there is no prompt"),
    ],
)
def test_bad_csv(tmp_path, data, said):
    (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(InputError) as error:
        read(tmp_path / "p.csv")
    assert said in str(error.value)


def test_missing_file_and_bad_parquet(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "p.jsonl")
    (tmp_path / "p.parquet").write_bytes(b"PAR0")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read(tmp_path / "p.parquet")


def test_a_json_list_is_not_taken_for_lines_of_text(tmp_path):
    (tmp_path / "p.json").write_text('[\n{"prompt": "x"}\n]')
    with pytest.raises(InputError, match="one object a line"):
        read(tmp_path / "p.json")
    (tmp_path / "q.json").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    assert [i.prompt for i in read(tmp_path / "q.json")] == ["x", "y"]
