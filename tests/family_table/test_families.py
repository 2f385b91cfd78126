"""docs/families/*.jsonl says what is found today: a sample always, everything under TRAINLESS_ALL=1.

TRAINLESS_FAMILIES=2/10 runs the second of ten parts of everything, so that it can be spread over runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from trainless.recipes import packaged, resolve

from . import language, outcomes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import families  # noqa: E402 - it lies in docs/, with what it writes

# One for each kind of cache, and for each way in which a method leaves a family alone.
SAMPLE = {
    "decoders": ("llama", "gpt_oss", "deepseek_v3", "qwen3_next", "doge", "bloom", "mamba"),
    "denoisers": ("FluxTransformer2DModel", "SanaTransformer2DModel", "UNetMotionModel", "SD3ControlNetModel",
        "Cosmos3OmniTransformer", "T5FilmDecoder"),
    "vision": ("gemma4", "git", "mistral3", "pi0", "t5gemma2"),
}  # fmt: skip
FIX = "run: python docs/families.py"


def _parts() -> list[tuple[str, str]]:
    every = [(group, name) for group in families.GROUPS for name in families.maker(group).names()]
    part = os.environ.get("TRAINLESS_FAMILIES")
    if part:
        at, of = map(int, part.split("/"))
        return every[at - 1 :: of]
    if os.environ.get("TRAINLESS_ALL"):
        return every
    return [(group, name) for group, names in SAMPLE.items() for name in names]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    families.quiet()
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("group", "name"), _parts(), ids=["-".join(part) for part in _parts()])
def test_a_line_made_today_is_the_stored_one(group: str, name: str) -> None:
    _, lines = families.stored(group)
    assert name in lines, FIX
    if package := families.missing(group, name):
        pytest.skip(f"{package} is not installed")
    assert families.maker(group).line(name) == lines[name], f"{FIX} --only {name}"


@pytest.mark.parametrize("group", families.GROUPS)
def test_every_family_of_the_installed_library_has_a_line(group: str) -> None:
    _, lines = families.stored(group)
    missing = sorted(set(families.maker(group).names()) - set(lines))
    gone = sorted(set(lines) - set(families.maker(group).names()))
    assert not missing, f"{FIX} --only {' '.join(missing)}"
    assert not gone, f"{', '.join(gone)} is no longer there; {FIX}"


@pytest.mark.parametrize("group", families.GROUPS)
def test_nothing_that_is_accepted_is_wrong(group: str) -> None:
    _, lines = families.stored(group)
    wrong = [
        (name, method, outcome)
        for name, line in lines.items()
        for method, outcome in line.get("methods", {}).items()
        if outcomes.FAULT in outcome.split(":")[0] or not outcome
    ]
    assert not wrong


def test_every_method_is_tried() -> None:
    """A new method needs its parameters in ``language.TRIES`` or ``denoisers.TRIES``."""
    from . import denoisers

    for group, tried in (("decoders", language.methods()), ("denoisers", denoisers.methods())):
        _, lines = families.stored(group)
        for line in lines.values():
            assert "not built" in line or sorted(line["methods"]) == tried, FIX
    assert set(language.methods()) == set(language.TRIES)
    assert set(denoisers.methods()) == {*denoisers.TRIES, denoisers.WEIGHTS}


def _fits(*groups: str) -> list[tuple[str, str]]:
    """(recipe, model type) of packaged recipes, for the model types of these groups."""
    kinds = {kind for group in groups for kind in families.maker(group).names()}
    return [
        (name, kind)
        for name in packaged()
        for kind in (resolve(name).fits or {}).get("model_type", [])
        if kind in kinds
    ]


def test_recipes_name_only_families_on_which_their_methods_work() -> None:
    built = [
        {k: v for k, v in families.stored(g)[1].items() if "methods" in v} for g in ("vision", "decoders")
    ]
    lines = {**built[0], **built[1]}
    checked: set[str] = set()
    for name, kind in _fits("decoders", "vision"):
        assert kind in lines, f"{name} fits {kind}, of which there is no tiny model"
        for use in resolve(name).uses:
            outcome = lines[kind]["methods"].get(use.method.name, "")
            if use.method.name in language.methods():
                assert outcome.startswith(("exact", "passes over")), (name, kind, outcome)
                checked.add(kind)
    assert len(checked) > 20


NEW = ("gpt_oss", "qwen3_next", "deepseek_v3", "gemma4_text", "lfm2")
WIDE = [name for name in packaged() if len((resolve(name).fits or {}).get("model_type", [])) > 12]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", sorted({kind for _, kind in _fits("decoders")}) if os.environ.get("TRAINLESS_ALL") else NEW
)
def test_recipes_for_many_families_find_layers_on_each(kind: str) -> None:
    from oracle import decoder_zoo as zoo

    import trainless

    given = families.maker("decoders").OVERRIDES.get(kind, {})
    if (
        kind == "gemma4_text"
    ):  # half of its layers have windows, and the last of either kind is kept for drafters
        given = {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4}
    model = zoo.build(kind, dtype=torch.float32, **given)
    for name in WIDE:
        if kind in resolve(name).fits["model_type"]:
            assert trainless.explain(model, name).ok, (name, trainless.explain(model, name).problems)


# ---------------------------------------------------------------- that the table can fail


@pytest.mark.parametrize(
    ("method", "broken"),
    [("attn_temperature", {"temperature": 0.71}), ("h2o", {"heavy": 3, "recent": 6}), ("zipvl", {"tau": 0.9})],
)  # fmt: skip
def test_another_rule_is_seen(method: str, broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The method does something else than its rule: on plain keys, the line says so."""
    from dataclasses import replace

    from oracle import decoder_zoo as zoo

    tried = language.TRIES[method]
    monkeypatch.setitem(language.TRIES, method, replace(tried, given={**tried.given, **broken}))
    found = language.found_on(zoo.build("llama"), [method])
    assert found.outcomes[method].startswith("fault: off by"), found.outcomes


def test_a_call_that_raises_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from oracle import decoder_zoo as zoo

    import trainless
    from trainless.patchers.attn_temperature import AttnTemperature

    def refuse(self: Any, site: Any) -> Any:
        def raises(call: Any, statistics: Any, state: Any) -> Any:
            raise trainless.Unsupported("not in this call")

        return [trainless.seams.Scale(raises)]

    monkeypatch.setattr(AttnTemperature, "contribute", refuse)
    found = language.found_on(zoo.build("llama"), ["attn_temperature"])
    assert found.outcomes["attn_temperature"].startswith("fault: accepted when patching; the call raised")


def test_reasons_read_the_same_on_every_machine() -> None:
    text = outcomes.one_line("<Thing at 0x7f12ab34cd> in\n  /home/me/lib/python/x.py  failed")
    assert text == "<Thing at 0x…> in …/x.py failed"
    assert outcomes.passed({1: "a", 2: "b", 3: "a"}, 5) == "passes over: a (2 of 5 layers); b (1 of 5 layers)"
