"""The packaged recipes: all load, all say where their values come from, all travel in the wheel."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from trainless.errors import InputError
from trainless.patchers import known
from trainless.recipes import json_schema, packaged, resolve, show
from trainless.recipes.packaged import read
from trainless.recipes.text import RecipeSource, parse

FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "bert", "t5", "vit"}
FAMILIES |= {"sd15", "sd21", "sdxl", "sd3", "flux", "pixart", "llava", "qwen2_vl", "internvl"}
FAMILIES |= {"llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "paligemma"}
METHODS = {"attn_temperature", "act", "head_gain", "streaming", "h2o", "entropy"}
METHODS |= {"linfusion", "clear", "var", "kvquant", "zipcache", "tova", "snapkv", "zipvl", "xattention"}


def data_of(name: str) -> dict:
    return parse(show(name), RecipeSource(name), lambda *fault: pytest.fail(str(fault)))


def test_families_and_methods_are_covered():
    assert {name.split("/")[0] for name in packaged()} >= FAMILIES
    used = {type(use.method).name for name in packaged() for use in resolve(name).uses}
    assert used >= METHODS


@pytest.mark.parametrize("name", packaged())
def test_packaged(name):
    recipe = resolve(name)
    assert recipe.name == name and recipe.fits and recipe.description
    assert resolve(recipe.resolved()).digest == recipe.digest
    for origin in recipe.origins():
        if origin.source.startswith("default"):
            assert origin.source in ("default (published)", "default (ours)")
        else:
            assert origin.note.startswith(("published: ", "ours: ")), origin
            assert len(origin.note.split(": ", 1)[1]) > 5, origin


def test_fits_names_exist():
    transformers = pytest.importorskip("transformers")
    types = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    for name in packaged():
        for model_type in resolve(name).fits.get("model_type", []):
            assert model_type in types, (name, model_type)


def test_pipeline_names_exist():
    diffusers = pytest.importorskip("diffusers")
    for name in packaged():
        for pipeline in resolve(name).fits.get("pipeline", []):
            assert pipeline in dir(diffusers), (name, pipeline)


def test_layers_of_gemma_are_those_that_see_everything():
    transformers = pytest.importorskip("transformers")
    from trainless.recipes import layer_numbers

    for name, config in (
        ("gemma/gemma2-long-context", transformers.Gemma2Config()),
        ("gemma/gemma3-long-context", transformers.Gemma3TextConfig()),
    ):
        full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        assert layer_numbers(resolve(name).uses[0].where.layers, config.num_hidden_layers) == full


def test_a_recipe_of_another_family_is_refused():
    resolve("llama/long-context").check_fits("llama")
    with pytest.raises(InputError, match="fits model_type llama"):
        resolve("llama/long-context").check_fits("bert")
    with pytest.raises(InputError, match="StableDiffusionXLPipeline"):
        resolve("sdxl/any-size").check_fits("FluxPipeline")


def test_a_recipe_without_its_file_loads_and_says_how_to_name_it(tmp_path):
    assert resolve("sdxl/linear").uses[0].method.weights is None
    named = resolve("sdxl/linear", sets=[f"linfusion.weights={tmp_path}"])
    assert named.uses[0].method.weights == tmp_path and named.digest != resolve("sdxl/linear").digest
    with pytest.raises(InputError, match="no file or folder"):
        resolve("sdxl/linear", sets=["linfusion.weights=/nowhere/at/all"])


def test_show_and_unknown_names():
    assert show("llama/long-context").startswith("schema: 1\n")
    with pytest.raises(InputError, match="did you mean 'llama/long-context'"):
        show("llama/long-contex")
    assert read("llama/long-context").decode() == show("llama/long-context")


def test_packaged_extends(write):
    path = write(
        "schema: 1\nextends: llama/h2o\nfits: {model_type: [smollm3]}\n"
        "patches: [{use: h2o, with: {recent: 64}}]\n"
    )
    recipe = resolve(path)
    assert recipe.fits == {"model_type": ["smollm3"]}
    found = {o.path: o for o in recipe.origins()}
    assert found["h2o.recent"].source == f"{path}:4"
    assert found["h2o.heavy"].source.startswith("llama/h2o.yaml:")
    assert found["h2o.heavy"].note.startswith("published: ")


def test_recipes_are_package_data():
    for name in packaged():
        assert files("trainless.recipes").joinpath("families", *f"{name}.yaml".split("/")).is_file()


def test_the_wheel_carries_the_recipes(tmp_path):
    hatchling = pytest.importorskip("hatchling.builders.wheel")
    root = Path(__file__).parents[2]
    wheel = next(hatchling.WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"]))
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"trainless/recipes/families/{name}.yaml" for name in packaged()} <= inside


# ---------------------------------------------------------------- JSON Schema


def check(schema: dict, value: object, root: dict, at: str = "") -> Iterator[str]:
    """The part of draft 2020-12 that the schema uses; jsonschema is not a dependency."""
    if "$ref" in schema:
        yield from check(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], value, root, at)
    if "const" in schema and value != schema["const"]:
        yield f"{at}: not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} not in {schema['enum']}"
    if "anyOf" in schema and all(list(check(s, value, root, at)) for s in schema["anyOf"]):
        yield f"{at}: {value!r} matches nothing of anyOf"
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    kind = schema.get("type")
    if kind and (
        not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))
    ):
        yield f"{at}: {value!r} is no {kind}"
        return
    if isinstance(value, dict):
        known_keys = schema.get("properties", {})
        yield from (f"{at}: misses {k}" for k in schema.get("required", ()) if k not in value)
        for key, item in value.items():
            rest = schema.get("additionalProperties", True)
            if key in known_keys:
                yield from check(known_keys[key], item, root, f"{at}.{key}")
            elif rest is False:
                yield f"{at}: unknown {key}"
            elif isinstance(rest, dict):
                yield from check(rest, item, root, f"{at}.{key}")
        if len(value) < schema.get("minProperties", 0):
            yield f"{at}: too few"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{at}: {len(value)} items"
        prefix = schema.get("prefixItems", [])
        for i, item in enumerate(value):
            each = prefix[i] if i < len(prefix) else schema.get("items", {})
            yield from check(each, item, root, f"{at}[{i}]")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < schema.get("minimum", value) or value > schema.get("maximum", value):
            yield f"{at}: {value} out of bounds"
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            yield f"{at}: {value} too small"
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        yield f"{at}: too short"


def errors_of(data: object) -> list[str]:
    schema = json_schema()
    found = list(check(schema, data, schema))
    try:
        import jsonschema
    except ImportError:
        return found
    jsonschema.Draft202012Validator.check_schema(schema)
    theirs = list(jsonschema.Draft202012Validator(schema).iter_errors(data))
    assert bool(theirs) == bool(found), (theirs, found)
    return found


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_satisfy_the_schema(name):
    assert errors_of(data_of(name)) == []
    assert errors_of(resolve(name).resolved()) == []


def patched(**values: object) -> dict:
    return {"schema": 1, "patches": [{"use": "toy_shrink", "with": values}]}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"keep": 3},
        {"keep": 0.5},
        {"recent": None},
        {"heads": "all"},
        {"heads": [[1, 2]]},
        {"bits": [4, 16], "steps": {"a": 1}},
        {"calibration": "x.safetensors"},
    ],
)
def test_schema_accepts(values):
    assert errors_of(patched(**values)) == []


@pytest.mark.parametrize(
    "data",
    [
        patched(kep=1),
        patched(keep=1.5),
        patched(keep=-1),
        patched(keep="1"),
        patched(keep=None),
        patched(heads="some"),
        patched(heads=[[1]]),
        patched(bits=[4, 3]),
        patched(factor=11),
        patched(mode="x"),
        patched(steps={"a": "b"}),
        {"schema": 2, "patches": [{"use": "toy_shrink"}]},
        {"schema": 1, "patches": []},
        {"schema": 1},
        {"schema": 1, "patches": [{"use": "nothing"}]},
        {"schema": 1, "patches": [{"use": "toy_shrink", "x": 1}]},
        {"schema": 1, "patches": [{"use": "toy_shrink", "where": {"part": "txt"}}]},
        {"schema": 1, "patches": [{"use": "toy_shrink"}], "fits": {"model": ["a"]}},
        {"schema": 1, "patches": [{"use": "toy_shrink"}], "fits": {}},
    ],
)
def test_schema_refuses(data):
    assert errors_of(data)


def test_every_method_is_described():
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert set(schema["$defs"]) == {"where", *known()}
    keep = schema["$defs"]["toy_shrink"]["properties"]["with"]["properties"]["keep"]
    assert keep["description"] == "what stays" and keep["default"] == 0.1


MEASURED = re.compile(
    r"Measured on a small model, [^:]+: (\d+ %) of a text's facts found when asked later, (\d+ %) when asked in the "
    r"prompt \(unpatched (\d+ %) and (\d+ %)\)\."
)


@pytest.mark.parametrize(
    "name",
    [n for n in packaged() if any(type(u.method).evicts or type(u.method).packs for u in resolve(n).uses)],
)
def test_what_compresses_a_cache_says_what_was_lost(name, monkeypatch):
    """The figures are those of the results, or the recipe says that there are none."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import advice

    found = resolve(name)
    said = MEASURED.search(found.description)
    if said is None:
        assert "nothing was measured on these" in found.description
        return
    lines = advice._lines("kv_recall-amd-epyc", None)
    assert (said[3], said[4]) == _pair(lines["dense 100 %"])
    method = next(u.method.name for u in found.uses if type(u.method).evicts or type(u.method).packs)
    assert (said[1], said[2]) in {_pair(row) for line, row in lines.items() if line.startswith(method)}
    if method == "h2o":
        assert "For answers about a prompt take kvquant." in found.description


def _pair(row):
    return tuple(
        row[column].replace("%", " %") for column in ("recall, question later", "recall, question read")
    )
