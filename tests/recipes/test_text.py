"""Reading YAML: plain data only, with lines; each refusal has file, line, key and reason."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainless.errors import RecipeError
from trainless.recipes import resolve
from trainless.recipes.text import RecipeSource, parse, write

HEAD = "schema: 1\npatches:\n- use: toy_shrink\n"


def faults_of(path) -> list[str]:
    with pytest.raises(RecipeError) as error:
        resolve(path)
    for fault in error.value.faults:
        assert re.match(r".+\.yaml:\d+ \S+: \S", fault), fault
    return [fault.removeprefix(str(path)) for fault in error.value.faults]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n", [":1 a: unknown key", ":1 schema: is required", ":1 patches: is required"]),
        ("", [":1 document: is empty"]),
        ("# only a comment\n", [":1 document: is empty"]),
        ("[]\n", [":1 document: must be a mapping"]),
        ("just words\n", [":1 document: must be a mapping"]),
        (HEAD + "---\n" + HEAD, [":4 document: holds a second document"]),
        (HEAD + "schema: 1\n", [":4 schema: duplicate key, first given in line 1"]),
        (HEAD + "  with: {keep: 1, keep: 2}\n", [":4 patches[0].with.keep: duplicate key"]),
        (HEAD + "  with: !!map {}\n", [":4 patches[0].with: tag !!map is not allowed"]),
        (HEAD + "  with: {keep: !x 1}\n", [":4 patches[0].with.keep: tag !x is not allowed"]),
        (HEAD + "  with: &a {keep: 1}\n", [":4 patches[0].with: anchor &a is not allowed"]),
        (
            HEAD + "  with: {keep: &k 1,\n    recent: *k}\n",
            [":4 patches[0].with.keep: anchor &k", ":5 patches[0].with.recent: alias *k"],
        ),
        (HEAD + "  where: {modules: *.attn}\n", [":4 patches[0].where.modules: is not YAML: a plain '*'"]),
        (HEAD + "  with: {<<: {keep: 1}}\n", [":4 patches[toy_shrink].with.<<: unknown parameter"]),
        (HEAD + "  with: {[1]: 2}\n", [":4 patches[0].with: keys must be plain names"]),
        (HEAD + "  ~: 2\n", [":4 patches[0]: keys must be plain names"]),
        (HEAD + "\tx: 1\n", [":4 patches[0]: is not YAML"]),
        (HEAD + "  with: {keep: 1\n", [":5 patches[0].with: is not YAML"]),
        ("[" * 4000, [":1 document: is nested deeper"]),
        ("? " * 4000, [":1 document: is nested deeper"]),
        ("a: 1\nb: \x07\n", [":2 document: holds a character that YAML forbids (U+0007)"]),
        (b"a: 1\nb: \xff\n", [":2 document: is not UTF-8"]),
        ("schema: 1\n".encode("utf-16"), [":1 document: is not UTF-8"]),
        (b"\x00\x01\x02binary", [":1 document: holds a character that YAML forbids (U+0000)"]),
        (b"#" * 1_000_001, [":1 document: is larger than 1 MB"]),
        (
            HEAD + "  with: {keep: " + "9" * 5000 + "}\n",
            [":4 patches[0].with.keep: is a number with too many"],
        ),
    ],
)
def test_refused(write, text, expected):
    found = faults_of(write(text))
    for want in expected:
        assert any(f.startswith(want) for f in found), (want, found)


def test_tags_aliases_and_nothing_else_is_reported_of_them(write):
    found = faults_of(write(HEAD + "  with: {keep: !!str 1, recent: &r 2}\n"))
    assert len(found) == 2


def test_a_tag_runs_nothing(write, tmp_path):
    target = tmp_path / "made"
    faults_of(write(HEAD + f"  with: {{keep: !!python/object/apply:os.mkdir ['{target}']}}\n"))
    assert not target.exists()


def test_exactly_one_megabyte_is_read(write):
    text = HEAD + "#"
    assert resolve(write(text + "x" * (1_000_000 - len(text)))).uses[0].id == "toy_shrink"


def test_bom_and_crlf(write):
    text = "﻿" + (HEAD + "  with:\n    keep: 3\n").replace("\n", "\r\n")
    recipe = resolve(write(text))
    assert recipe.uses[0].method.keep == 3
    assert recipe.origins()[0].source.endswith(":5")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:10", "2:10"),  # YAML 1.1 reads 130
        ("no", "no"),  # YAML 1.1 reads false
        ("1e-3", 0.001),  # YAML 1.1 reads a string
        ("010", 10),  # YAML 1.1 reads 8
        ("0x10", 16),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("1.0", 1.0),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("~", None),
        ("", None),
        ("true", True),
        ("[1, [2, x]]", [1, [2, "x"]]),
        ("'4'", "4"),
    ],
)
def test_scalars(text, value):
    got = parse(f"a: {text}", RecipeSource("t"), lambda *fault: pytest.fail(str(fault)))["a"]
    assert got == value and type(got) is type(value)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)
    | st.sampled_from(["1e-3", "2:10", "0x1F", "~", "null", "1.", "-", "*", "&a", "!t", "#x", "no", "010"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc:# '1", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
def test_what_is_written_is_read_back(value):
    data = {"a": value}
    text = write(data)
    assert parse(text, RecipeSource("t"), lambda *fault: pytest.fail(f"{fault} in {text}")) == data
