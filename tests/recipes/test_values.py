"""One strict reading of parameters for Python, YAML and --set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trainless.errors import InputError, RecipeError
from trainless.patchers import Method
from trainless.recipes import resolve
from trainless.recipes.values import build
from trainless.seams import Budget

from .conftest import Need, Shrink


def read(cls, **values):
    faults = []
    return build(cls, values, lambda path, reason: faults.append((path, reason))), faults


@pytest.mark.parametrize("value", [0, 1, 64, 1.0, 0.2])
def test_budget_kept_as_given(value):
    made, faults = read(Shrink, keep=value)
    assert not faults
    assert made.keep == value and type(made.keep) is type(value)


def test_accepted_forms():
    made, faults = read(
        Shrink, heads=[[0, 1], (2, 3)], factor=4, bits=[8, 2], steps={"a.b": 3}, recent=None, flag=True
    )
    assert not faults
    assert made.heads == [(0, 1), (2, 3)]
    assert made.factor == 4.0 and isinstance(made.factor, float)
    assert made.bits == (8, 2) and made.steps == {"a.b": 3} and made.flag is True


def test_defaults_have_their_declared_type():
    made, _ = read(Shrink)
    assert isinstance(made.factor, float)  # declared as 5
    assert read(Shrink, factor=5)[0] == made


@pytest.mark.parametrize(
    ("values", "path", "said"),
    [
        ({"factor": "4"}, ("factor",), "must be a number; got '4', a string"),
        ({"factor": True}, ("factor",), "must be a number"),
        ({"factor": float("nan")}, ("factor",), "finite"),
        ({"factor": float("inf")}, ("factor",), "finite"),
        ({"factor": -1}, ("factor",), "at least 0"),
        ({"factor": 11}, ("factor",), "at most 10"),
        ({"bits": [4, 2, 2]}, ("bits",), "list of 2"),
        ({"bits": [4, 2.0]}, ("bits", 1), "must be an int; got 2.0"),
        ({"bits": [4, 3]}, ("bits", 1), "2 or 4 or 8 or 16"),
        ({"bits": "42"}, ("bits",), "must be a list of 2"),
        ({"keep": 1.5}, ("keep",), "write keep=1"),
        ({"keep": 0.0}, ("keep",), "fraction"),
        ({"keep": -1}, ("keep",), "negative"),
        ({"keep": True}, ("keep",), "tokens as an int"),
        ({"keep": "0.1"}, ("keep",), "tokens as an int"),
        ({"keep": None}, ("keep",), "null"),
        ({"mode": "frist"}, ("mode",), "did you mean 'first'"),
        ({"mode": 1}, ("mode",), "'sum' or 'first'"),
        ({"heads": "al"}, ("heads",), "did you mean 'all'"),
        ({"heads": [[1, 2, 3]]}, ("heads", 0), "list of 2"),
        ({"heads": [[1, "a"]]}, ("heads", 0, 1), "must be an int; got 'a'"),
        ({"heads": 3}, ("heads",), "'all' or a list"),
        ({"steps": {"a": 1.0}}, ("steps", "a"), "must be an int"),
        ({"steps": [1]}, ("steps",), "must be a mapping"),
        ({"flag": 1}, ("flag",), "true or false"),
        ({"flag": "yes"}, ("flag",), "true or false"),
        ({"factr": 1}, ("factr",), "unknown parameter of toy_shrink; did you mean 'factor'?"),
        ({"flag": True, "factor": 0}, ("factor",), "no sense"),
    ],
)
def test_refused(values, path, said):
    made, faults = read(Shrink, **values)
    assert made is None
    assert [p for p, _ in faults] == [path]
    assert said in faults[0][1]


def test_check_messages_are_placed_but_not_mangled():
    @dataclasses.dataclass(frozen=True)
    class Pair(Method):
        name = "pair"
        a: Budget = 0
        b: Budget = 0

        def check(self):
            if self.a == self.b == 0:
                raise InputError("a=0 and b=0 keep nothing")

    assert read(Pair)[1] == [(("a",), "a=0 and b=0 keep nothing")]
    with pytest.raises(InputError, match=r"^h2o\.heavy: heavy=0 and recent=0 keep nothing"):
        resolve("h2o", {"heavy": 0, "recent": 0})
    with pytest.raises(InputError, match=r"^act\.heads: \[2, 3\] is listed twice"):
        resolve("act", {"heads": [[2, 3], [2, 3]]})


def test_missing_parameter():
    made, faults = read(Need)
    assert made is None and faults == [((), "needs 'window' (how many)")]


def test_every_fault_at_once():
    _, faults = read(Shrink, factr=1, keep=2.0, mode="x", bits=[3, 5])
    assert [p for p, _ in faults] == [("factr",), ("keep",), ("mode",), ("bits", 0), ("bits", 1)]


BAD = {"keep": 1.5, "mode": "frist", "factr": 1}


def test_python_yaml_and_set_say_the_same(write):
    with pytest.raises(InputError) as python:
        resolve("toy_shrink", BAD)
    path = write(
        "schema: 1\npatches:\n- use: toy_shrink\n  with:\n    keep: 1.5\n    mode: frist\n    factr: 1\n"
    )
    with pytest.raises(RecipeError) as file:
        resolve(path)
    with pytest.raises(InputError) as sets:
        resolve("toy_shrink", sets=[f"toy_shrink.{k}={v}" for k, v in BAD.items()])
    reasons = [line.split(": ", 1)[1] for line in str(python.value).splitlines()]
    assert len(reasons) == 3
    assert [line.split(": ", 1)[1] for line in str(sets.value).splitlines()] == reasons
    assert file.value.faults == [
        f"{path}:{5 + i} patches[toy_shrink].with.{key}: {reason}"
        for i, (key, reason) in enumerate(zip(BAD, reasons, strict=True))
    ]


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np

    found = resolve("h2o", {"heavy": np.float32(0.1), "recent": np.int64(4), "normalise": np.bool_(True)})
    method = found.uses[0].method
    assert (method.heavy, method.recent, method.normalise) == (0.1, 4, True)
    assert [type(v) for v in (method.heavy, method.recent, method.normalise)] == [float, int, bool]
    assert found.digest == resolve("h2o", {"heavy": 0.1, "recent": 4, "normalise": True}).digest
    heads = (
        resolve("head_gain", {"heads": np.array([[0, 1], [1, 0]]), "gain": np.float64(0.5)}).uses[0].method
    )
    assert heads.heads == [[0, 1], [1, 0]] or heads.heads == [(0, 1), (1, 0)]
    assert type(heads.gain) is float
    assert resolve("h2o", where={"layers": np.int32(1)}).uses[0].where.layers == 1
    with pytest.raises(InputError, match="nan"):
        resolve("h2o", {"heavy": np.float32("nan")})


def test_names_that_are_near_are_named() -> None:
    with pytest.raises(InputError, match="did you mean 'heavy'"):
        resolve("h2o", {"heav": 1})
    with pytest.raises(InputError, match=r"did you mean 'llama/long-context'\? Near it too: 'llama/"):
        resolve("llama/long-contexts")
    with pytest.raises(InputError, match=r"the nearest of \d+ names: "):
        resolve("%%%%%%")


def test_a_file_of_nonsense_is_answered_shortly(tmp_path: Path) -> None:
    file = tmp_path / "nonsense.yaml"
    file.write_text("schema: 1\npatches:\n" + "  - use: nonsense\n" * 5000)
    with pytest.raises(RecipeError) as caught:
        resolve(file)
    assert len(str(caught.value).splitlines()) == 21 and "… and 4,980 more" in str(caught.value)
    assert len(caught.value.faults) == 5000
    file.write_text(f"schema: 1\n{'x' * 100_000}: 1\npatches: [h2o]\n")
    with pytest.raises(RecipeError) as caught:
        resolve(file)
    assert len(str(caught.value)) < 2000
