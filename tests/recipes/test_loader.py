"""Everything that names a recipe, how layers merge, and what is said when they do not."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from trainless.errors import CalibrationError, InputError, RecipeError
from trainless.recipes import load_recipe, resolve

from .conftest import Need, Shrink

BASE = """\
schema: 1
name: base
description: a base
fits: {model_type: [llama, mistral]}
patches:
  - use: toy_shrink
    with:
      keep: 0.2     # published: A Toy Paper
      factor: 3     # ours: it is odd
    where: {layers: "2:"}
  - use: toy_need
    id: last
    with: {window: 7}   # ours: lucky
"""
CHILD = """\
schema: 1
extends: base.yaml
patches:
  - use: toyshrink
    with: {keep: 64}
    where: {part: text}
  - use: toy_need
    with: {window: 9}
"""


def test_method_by_name_and_alias():
    recipe = resolve("toyshrink", {"keep": 1})
    assert recipe.name == "toy_shrink" and recipe.fits is None
    assert recipe.uses[0].method == Shrink(keep=1, factor=5.0)
    assert not recipe.uses[0].where
    assert load_recipe("toy_shrink").uses[0].method == Shrink(factor=5.0)


def test_file_and_folder(write, tmp_path):
    recipe = resolve(write(BASE, "recipe.yaml"))
    assert recipe.name == "base" and recipe.description == "a base"
    assert [u.id for u in recipe.uses] == ["toy_shrink", "last"]
    assert recipe.uses[0].where.layers == "2:"
    assert resolve(tmp_path).resolved() == resolve(str(tmp_path)).resolved() == recipe.resolved()


def test_mapping_and_list():
    one = {"use": "toy_shrink", "with": {"keep": 3}, "where": {"layers": [0]}}
    assert (
        resolve(one).resolved() == resolve({"schema": 1, "name": "toy_shrink", "patches": [one]}).resolved()
    )
    both = resolve([one, {"use": "toy_need", "with": {"window": 1}}])
    assert both.name == "toy_shrink+toy_need"
    assert [type(u.method) for u in both.uses] == [Shrink, Need]


def test_the_same_method_twice_in_a_list_gets_two_ids():
    halves = [{"use": "toy_shrink", "where": {"layers": half}} for half in (":8", "8:")]
    assert [u.id for u in resolve(halves).uses] == ["toy_shrink-1", "toy_shrink-2"]
    named = [halves[0], {**halves[1], "id": "late"}]
    assert [u.id for u in resolve(named).uses] == ["toy_shrink", "late"]
    assert [u.id for u in resolve([{**half, "id": "x"} for half in halves]).uses] == ["x-1", "x-2"]
    assert [u.id for u in resolve([*halves, {**halves[0], "id": "toy_shrink-1"}]).uses] == [
        "toy_shrink-2",
        "toy_shrink-3",
        "toy_shrink-1",
    ]


def test_resolved_loads_again_and_keeps_the_digest(write):
    write(BASE, "base.yaml")
    recipe = resolve(write(CHILD, "child.yaml"))
    assert resolve(recipe.resolved()).resolved() == recipe.resolved()
    again = resolve(write(recipe.to_yaml(), "again.yaml"))
    assert again.resolved() == recipe.resolved() and again.digest == recipe.digest
    assert re.fullmatch("[0-9a-f]{64}", recipe.digest)
    assert resolve(recipe).digest == recipe.digest


def test_digest_depends_on_what_is_patched_only(write):
    base = resolve(write(BASE))
    assert resolve(write(BASE.replace("name: base", "name: other"))).digest == base.digest
    assert resolve(write(BASE.replace("id: last", "id: final"))).digest == base.digest
    for old, new in (("0.2", "0.3"), ('"2:"', '"3:"'), ("window: 7", "window: 8")):
        assert resolve(write(BASE.replace(old, new))).digest != base.digest
    assert resolve("toy_shrink", {"keep": 1}).digest != resolve("toy_shrink", {"keep": 1.0}).digest
    assert resolve("toy_shrink").digest == resolve("toy_shrink", {"keep": 0.1}).digest


def test_extends_merges_by_id_key_by_key(write):
    write(BASE, "base.yaml")
    recipe = resolve(write(CHILD, "child.yaml"))
    assert recipe.name == "child" and recipe.fits == {"model_type": ["llama", "mistral"]}
    assert recipe.description == "a base"
    assert [u.id for u in recipe.uses] == ["toy_shrink", "last", "toy_need"]
    first = recipe.uses[0]
    assert first.method.keep == 64 and first.method.factor == 3.0
    assert first.where.given() == {"layers": "2:", "part": "text"}
    assert [recipe.uses[i].method.window for i in (1, 2)] == [7, 9]


def test_several_bases_in_order(write):
    other = (
        "schema: 1\nfits: {model_type: [llama]}\npatches: [{use: toy_shrink, with: {keep: 9, factor: 1}}]\n"
    )
    write(BASE, "a.yaml")
    write(other, "sub/b.yaml")
    write("schema: 1\nextends: ../a.yaml\npatches: [{use: toy_shrink, with: {flag: true}}]\n", "sub/c.yaml")
    top = write(
        "schema: 1\nextends: [sub/b.yaml, sub/c.yaml]\npatches: [{use: toy_shrink, with: {recent: 2}}]\n",
        "d.yaml",
    )
    made = resolve(top)
    assert made.uses[0].method == Shrink(keep=0.2, factor=3.0, flag=True, recent=2)
    assert made.fits == {"model_type": ["llama"]}


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("my.yaml", "cycle: my.yaml → my.yaml"),
        ("https://example.org/x.yaml", "is a URL"),
        ("gone.yaml", "no packaged recipe and no file"),
        ("/etc/passwd", "must be relative"),
        ("3", "must name a recipe; got 3"),
        ("[]", "at least one"),
        ("lama/long-context", "did you mean 'llama/long-context'"),
    ],
)
def test_bad_extends(write, extends, said):
    path = write(f"schema: 1\nextends: {extends}\npatches: [{{use: toy_need}}]\n")
    with pytest.raises(RecipeError) as error:
        resolve(path)
    # the only fault: what the base would have given is not called missing
    if extends != "[]":
        assert len(error.value.faults) == 1
    assert error.value.faults[0].startswith(f"{path}:2 extends: ") and said in error.value.faults[0]


def test_long_cycle_and_bombs(write):
    for a, b in ("xy", "yz", "zx"):
        path = write(f"schema: 1\nextends: {b}.yaml\npatches: [{{use: toy_shrink}}]\n", f"{a}.yaml")
    with pytest.raises(RecipeError, match=r"extends: cycle: z\.yaml → x\.yaml → y\.yaml → z\.yaml"):
        resolve(path)
    for i in range(12):
        write(
            f"schema: 1\nextends: [l{i + 1}.yaml, l{i + 1}.yaml]\npatches: [{{use: toy_shrink}}]\n",
            f"l{i}.yaml",
        )
    last = write("schema: 1\npatches: [{use: toy_shrink}]\n", "l12.yaml")
    with pytest.raises(RecipeError, match="extends more than 100 files"):
        resolve(last.parent / "l0.yaml")


def test_faults_of_a_base_carry_its_own_lines(write):
    base = write(BASE.replace("keep: 0.2", "kepe: 0.2"), "base.yaml")
    child = write(CHILD.replace("window: 9", "window: 0"), "child.yaml")
    with pytest.raises(RecipeError) as error:
        resolve(child)
    assert {f.split(" ", 1)[0] for f in error.value.faults} == {f"{base}:8", f"{child}:8"}


def test_every_fault_of_a_file_at_once(write):
    path = write(
        "schema: 2\nnam: x\nname: 3\nfits: {model: [a], pipeline: a, model_type: [1]}\npatches:\n"
        "- use: toy_shrnk\n- use: toy_shrink\n  with: {kep: 1, factor: '2'}\n  were: {}\n"
        "- use: toy_shrink\n- with: {}\n- use: toy_need\n  id: toy_shrink\n- use: 3\n"
        "- use: toy_need\n  id: a.b\n- 7\n"
    )
    with pytest.raises(RecipeError) as error:
        resolve(path)
    found = [f.removeprefix(str(path)) for f in error.value.faults]
    expected = [
        ":1 schema: must be 1",
        ":2 nam: unknown key; did you mean 'name'",
        ":3 name: must be a string; got 3",
        ":4 fits.model: unknown key; did you mean 'model_type'",
        ":4 fits.pipeline: must be a list of names",
        ":4 fits.model_type[0]: must be a string; got 1",
        ":6 patches[0].use: unknown method 'toy_shrnk'; did you mean 'toy_shrink'",
        ":9 patches[1].were: unknown key; did you mean 'where'",
        ":8 patches[toy_shrink].with.kep: unknown parameter of toy_shrink; did you mean 'keep'",
        ":8 patches[toy_shrink].with.factor: must be a number; got '2', a string",
        ":10 patches[2]: 'toy_shrink' is already the patch in line 7; give one an `id`",
        ":11 patches[3].use: is required",
        ":13 patches[4].id: 'toy_shrink' is the name of another method",
        ":14 patches[5].use: must be the name of a method; got 3",
        ":16 patches[6].id: 'a.b' must consist of",
        ":17 patches[7]: must be a mapping",
    ]
    for want in expected:
        assert any(f.startswith(want) for f in found), (want, found)
    lines = [int(f.split(" ")[0][1:]) for f in found]
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("toy_shrnk", "neither a method nor a recipe; did you mean 'toy_shrink'"),
        ("llama/long-contxt", "did you mean 'llama/long-context'"),
        ("https://example.org/r.yaml", "is a URL"),
        ("gone.yaml", "no recipe file 'gone.yaml'"),
        (Path("gone"), "no recipe file 'gone'"),
        ([], "is empty"),
        (3, "neither the name"),
        ([["toy_shrink"]], "neither the name"),
        ({}, "schema: is required"),
        ({"schema": 1, "patches": []}, "at least one patch"),
        ({"use": "toy_shrink", "wiht": {}}, "wiht: unknown key; did you mean 'with'"),
        ({"use": "toy_shrink", "with": [1]}, "toy_shrink.with: must be a mapping; got [1]"),
        ([{"use": "toy_shrink", "with": {"kep": 1}}], "[toy_shrink].with.kep: unknown parameter"),
    ],
)
def test_bad_arguments(what, said):
    with pytest.raises(InputError) as error:
        resolve(what)
    assert said in str(error.value)


def test_a_folder_without_a_recipe(tmp_path):
    with pytest.raises(InputError, match=r"has no recipe\.yaml"):
        resolve(tmp_path)


@pytest.mark.parametrize("what", [["toy_shrink"], {"use": "toy_shrink"}, "llama/long-context"])
def test_parameters_only_with_a_method(what):
    with pytest.raises(InputError, match=r"parameters \(keep\) go with a single method name"):
        resolve(what, {"keep": 1})


def test_set_and_what_it_understood(write):
    recipe = resolve(
        write(BASE),
        sets=[
            "toyshrink.keep=64",
            "toy_shrink.recent = 0.25",
            "last.window=1",
            "toy_shrink.heads=[[1, 2]]",
            "toy_need.layers=2:10",
        ],
    )
    shrink, need = (u.method for u in recipe.uses)
    assert (shrink.keep, shrink.recent, shrink.factor) == (64, 0.25, 3.0)
    assert need.window == 1 and need.layers == "2:10"
    assert recipe.understood() == [
        "toy_shrink.keep = 64 tokens",
        "toy_shrink.recent = 25 % of the prompt",
        "last.window = 1",
        "toy_shrink.heads = [[1, 2]]",
        "last.layers = 2:10",
    ]
    ends = resolve("toy_shrink", sets=["toy_shrink.keep=1", "toy_shrink.recent=1.0"]).understood()
    assert ends == ["toy_shrink.keep = 1 token", "toy_shrink.recent = 100 % of the prompt (everything)"]


def test_set_leaves_a_given_recipe_alone():
    recipe = resolve("toy_shrink", {"keep": 3})
    changed = resolve(recipe, sets=["toy_shrink.keep=4"])
    assert (recipe.uses[0].method.keep, changed.uses[0].method.keep) == (3, 4)
    assert resolve(recipe).uses[0].method.keep == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keep=1", "is not name.key=value"),
        ("toy_shrink.keep", "is not name.key=value"),
        (".keep=1", "is not name.key=value"),
        ("toy_need.window=1", "method 'toy_need' is not in use here; in use: toy_shrink"),
        ("toy_shrin.keep=1", "not in use here; did you mean 'toy_shrink'"),
        ("toy_shrink.kep=1", "unknown parameter of toy_shrink; did you mean 'keep'"),
        ("toy_shrink.keep=", "is empty"),
        ("toy_shrink.keep=!!int 3", "tag !!int"),
        ("toy_shrink.keep=[1", "is not YAML"),
        ("toy_shrink.keep='4'", "got '4', a string"),
        ("toy_shrink.factor=four", "must be a number; got 'four'"),
    ],
)
def test_bad_set(text, said):
    with pytest.raises(InputError) as error:
        resolve("toy_shrink", sets=[text])
    assert str(error.value).startswith("--set") and said in str(error.value)
    assert not isinstance(error.value, RecipeError)


def test_set_must_not_guess_between_two():
    halves = [{"use": "toy_shrink", "where": {"layers": half}} for half in (":8", "8:")]
    with pytest.raises(InputError, match="used 2 times; name one by its id: toy_shrink-1, toy_shrink-2"):
        resolve(halves, sets=["toy_shrink.keep=1"])
    assert resolve(halves, sets=["toy_shrink-2.keep=7"]).uses[1].method.keep == 7


def test_origins(write):
    base = write(BASE, "base.yaml")
    child = write(CHILD, "child.yaml")
    found = {o.path: o for o in resolve(child, sets=["toy_shrink.flag=true"]).origins()}
    said = {path: (o.value, o.source, o.note) for path, o in found.items()}
    assert said["toy_shrink.keep"] == (64, f"{child}:5", "")
    assert said["toy_shrink.factor"] == (3.0, f"{base}:9", "ours: it is odd")
    assert said["toy_shrink.where.layers"] == ("2:", f"{base}:10", "")
    assert said["toy_shrink.flag"] == (True, "--set", "")
    assert said["toy_shrink.mode"] == ("sum", "default (ours)", "")
    assert said["last.window"] == (7, f"{base}:13", "ours: lucky")
    python = resolve("toy_shrink", {"recent": 2}).origins()
    assert (python[0].source, python[0].note) == ("default (published)", "A Toy Paper")
    assert (python[1].path, python[1].source) == ("toy_shrink.recent", "argument")


def test_comments_are_found_where_they_are(write):
    text = (
        "schema: 1\npatches:\n- use: toy_shrink\n  with:  # whole\n    keep: 3 # a # b\n"
        "    mode: 'sum' # it's #1\n    heads: [[1, 2],\n      [3, 4]]  # far\n    steps: {\"x#y\": 1}\n"
    )
    notes = {o.path.split(".")[1]: o.note for o in resolve(write(text)).origins()}
    assert notes["keep"] == "a # b" and notes["mode"] == "it's #1" and notes["steps"] == ""


def test_calibration_paths(write, tmp_path, monkeypatch):
    file = tmp_path / "sub" / "heads.safetensors"
    path = write(
        "schema: 1\npatches: [{use: toy_shrink, with: {calibration: heads.safetensors}}]\n", "sub/r.yaml"
    )
    with pytest.raises(
        RecipeError, match=r"r\.yaml:2 .*calibration: no calibration file 'heads.safetensors'"
    ):
        resolve(path)
    file.write_bytes(b"one")
    recipe = resolve(path)
    assert recipe.uses[0].calibration == file
    assert recipe.uses[0].method == Shrink(factor=5.0)
    assert recipe.resolved()["patches"][0]["with"]["calibration"] == str(file)
    assert any(o.path == "toy_shrink.calibration" and o.source == f"{path}:2" for o in recipe.origins())
    monkeypatch.chdir(file.parent)
    python = resolve("toy_shrink", {"calibration": "heads.safetensors"})
    assert python.uses[0].calibration == file and python.digest == recipe.digest
    fingerprint = recipe.uses[0].fingerprint()["with"]["calibration"]
    assert fingerprint == hashlib.sha256(b"one").hexdigest()
    moved = file.rename(tmp_path / "moved.safetensors")
    assert resolve("toy_shrink", {"calibration": moved}).digest == python.digest
    moved.write_bytes(b"two")
    assert resolve("toy_shrink", {"calibration": moved}).digest != recipe.digest
    echoed = resolve("toy_shrink", sets=[f"toy_shrink.calibration={moved}"]).understood()
    assert echoed == [f"toy_shrink.calibration = {moved}"]


def test_bad_calibration():
    with pytest.raises(CalibrationError, match="no calibration file 'gone'"):
        resolve("toy_shrink", {"calibration": "gone"})
    with pytest.raises(InputError, match="is a URL"):
        resolve("toy_shrink", {"calibration": "https://example.org/x.safetensors"})
    with pytest.raises(InputError, match="must be the path"):
        resolve("toy_shrink", {"calibration": 3})
    with pytest.raises(InputError, match="unknown parameter of toy_need"):
        resolve("toy_need", {"window": 1, "calibration": "x"})


def test_fits(write):
    recipe = resolve(write(BASE))
    recipe.check_fits("llama")
    recipe.check_fits("llava", "mistral")
    with pytest.raises(InputError, match="recipe base fits model_type llama, mistral; this model is bert"):
        recipe.check_fits("bert")
    resolve("toy_shrink").check_fits("anything")


def test_recipes_in_a_list_must_share_a_model(write):
    a, b = write(BASE, "a.yaml"), write(BASE.replace("llama, mistral", "mistral, bert"), "b.yaml")
    assert resolve([a, b]).fits == {"model_type": ["mistral"]}
    c = write(BASE.replace("model_type: [llama, mistral]", "pipeline: [P]"), "c.yaml")
    with pytest.raises(InputError, match="fit no model in common"):
        resolve([a, c])
