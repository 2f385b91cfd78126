"""``recommend``: by goal, packed caches first, only what was measured with these settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle import models

import trainless

ROOT = Path(__file__).parents[1]


def _percent(text: str) -> float:
    return float(text.rstrip("%"))


def test_memory_comes_first_and_leads_with_packed_caches() -> None:
    found = trainless.recommend()
    assert found[0].name == "memory"
    assert found[0].options[0].what["use"] == "kvquant"
    assert all(option.what["use"] != "h2o" for goal in found for option in goal.options[:1])
    facts = [_percent(option.figures["facts, asked later"]) for option in found[0].options]
    first, dense = found[0].options[0], found[0].baseline
    assert facts[0] >= _percent(dense["facts, asked later"]) - 5 and _percent(first.figures["cache"]) < 40
    assert found[0].options[-1].what["use"] == "h2o" and "forgets the prompt" in found[0].options[-1].cost


def test_every_option_is_a_recipe_with_figures_and_a_cost() -> None:
    for goal in trainless.recommend():
        assert goal.options and goal.measured and max(map(len, str(goal).splitlines())) <= 80
        for option in goal.options:
            assert option.figures and all(option.figures.values()) and option.cost and "[[" not in option.cost
            assert trainless.load_recipe(option.what).uses or option.what["use"] == "linfusion"


def test_figures_of_caches_are_of_the_settings_that_are_recommended(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kv_recall

    measured = {f"{v.name} {v.budget}": v for v in (*kv_recall.VARIANTS, *kv_recall.GENERATING)}
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import advice
    import yaml

    goals = yaml.safe_load(advice.GOALS.read_text(encoding="utf-8"))["goals"]
    rows = [o for g in goals if g["file"] == "kv_recall-amd-epyc" for o in g["options"]]
    assert len(rows) > 8
    for option in rows:
        variant = measured[option["row"]]
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in option["with"].items()}
        assert (option["use"], given) == (variant.method, variant.settings), option["label"]


def test_with_a_model_what_fits_it_comes_first() -> None:
    model = models.build("llama")
    found = trainless.recommend(model)
    assert [goal.name for goal in found] == ["memory", "length", "generation", "speed", "hallucination"]
    assert all(option.fits for option in found[0].options)
    last = next(goal for goal in found if goal.name == "hallucination").options[-1]
    assert last.what["use"] == "var" and last.fits is False and last.reason
    (pictures,) = trainless.recommend(model, goal="size")
    assert not any(option.fits for option in pictures.options) and "none of them fits" in str(pictures)
    with pytest.raises(trainless.InputError, match="did you mean 'memory'"):
        trainless.recommend(goal="memry")
    with pytest.raises(trainless.InputError, match="cannot patch"):
        trainless.recommend("some name")


def test_the_command(capsys) -> None:
    import json

    from trainless.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["recommend", "--goal", "memory", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and found[0]["options"][0]["what"]["use"] == "kvquant"
    with pytest.raises(SystemExit) as ended:
        main(["recommend", "--goal", "nothing"])
    assert ended.value.code == 1
    assert "memory" in capsys.readouterr().err
