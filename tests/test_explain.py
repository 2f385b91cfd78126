"""explain and methods: a dry run that says everything, changes nothing, and agrees with what patch does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from contract.tools import Snapshot
from oracle import decoder_zoo, models
from torch import nn
from transformers import StaticCache

import trainless
from trainless import InputError, NoMatch, RecipeError
from trainless.patchers import Method, base, option
from trainless.seams import Contribution, Site


def meta(family: str = "llama") -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    config = models.build(family).config
    kind = AutoModelForCausalLM if family in models.CAUSAL else AutoModel
    with torch.device("meta"):
        return kind.from_config(config).eval()


def kinds(found: trainless.Explanation) -> list[tuple[str, str]]:
    return [(p.kind, p.method) for p in found.problems]


# ---------------------------------------------------------------- explain


def test_it_says_what_patch_then_does() -> None:
    model = models.build("gemma2")
    snapshot = Snapshot(model)
    what = [{"use": "h2o", "with": {"recent": 64}}, {"use": "attn_temperature", "where": {"layers": "1:"}}]
    found = trainless.explain(model, what)
    snapshot.check(model)
    made = trainless.patch(model, what)
    for plan, report in zip(found.methods, made.report().methods, strict=True):
        assert (plan.method, plan.parameters) == (report.method, report.parameters)
        assert (plan.sites, plan.of, plan.inert) == (report.sites, report.of, report.inert)
        assert sum(plan.skipped.values()) == len(report.skipped)
    assert found.ok and found.methods[0].layers == (1,) and found.methods[1].layers == (1, 2)
    assert found.methods[1].inert and not found.methods[0].inert


def test_a_weightless_model_is_enough() -> None:
    found = trainless.explain(meta(), "h2o")
    assert found.ok and found.methods[0].sites == 3
    assert trainless.explain(meta("bert"), "attn_temperature", temperature=0.5).ok


def test_every_problem_comes_back_at_once() -> None:
    what = ["h2o", "streaming", "entropy", {"use": "act", "where": {"layers": "9:"}}, {"use": "h2o"}]
    model = models.build("llama")
    found = trainless.explain(model, what)
    assert not found.ok
    assert kinds(found) == [("NoMatch", "entropy"), ("NoMatch", "act"), *[("Conflict", "")] * 3]
    assert "h2o and streaming" in found.problems[2].message and "seam kv" in found.problems[2].message
    assert found.cache is None  # which of the rules would hold is not known
    with pytest.raises(NoMatch):
        trainless.patch(model, what)


def test_what_stands_already_counts() -> None:
    model = models.build("llama")
    trainless.patch(model, "streaming")
    assert kinds(trainless.explain(model, "h2o")) == [("Conflict", "")]


def test_problems_of_the_model_and_layers_are_data() -> None:
    model = models.build("llama")
    found = trainless.explain(model, {"use": "head_gain", "with": {"heads": [[7, 0]]}})
    assert kinds(found) == [("InputError", "head_gain")] and "layer 7" in found.problems[0].message
    recipe = {"schema": 1, "name": "r", "fits": {"model_type": ["bert"]}, "patches": [{"use": "h2o"}]}
    found = trainless.explain(model, recipe)
    assert kinds(found) == [("InputError", "")] and "fits" in found.problems[0].message
    assert found.methods[0].sites == 3


def test_a_family_that_cannot_be_reached_is_a_problem_by_name() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))
    found = trainless.explain(model, "attn_temperature", temperature=2.0)
    assert kinds(found) == [("Unsupported", "")] and "bloom" in found.problems[0].message


def test_malformed_requests_raise() -> None:
    model = models.build("llama")
    with pytest.raises(InputError, match="did you mean 'h2o'"):
        trainless.explain(model, "h2oo")
    with pytest.raises(InputError, match="recent"):
        trainless.explain(model, "h2o", recentt=3)
    with pytest.raises((InputError, RecipeError)):
        trainless.explain(model, {"patches": []})
    with pytest.raises(InputError, match="cannot patch a str"):
        trainless.explain("a/name", "h2o")


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_the_memory_estimate_is_what_a_cache_then_holds(family: str) -> None:
    from trainless.patch.binding import bind
    from trainless.preview.memory import estimate
    from trainless.recipes import resolve

    model, length = models.build(family, dtype=torch.float32), 100
    parts, bindings = bind(model, resolve("h2o", {"heavy": 0.2, "recent": 10}))
    found = estimate(parts, bindings, [length])
    assert found is not None
    ids = models.prompt(length)

    def held() -> int:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        names = ("keys", "values", "positions", "scores")
        tensors = [getattr(layer, name, None) for layer in cache.layers for name in names]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    # A sliding layer of transformers leaves one token of its window to the next call.
    assert found.points[0].unpatched == held()
    trainless.patch(model, "h2o", heavy=0.2, recent=10)
    assert found.points[0].patched == held()


def test_estimates_and_their_limits() -> None:
    found = trainless.explain(meta(), "streaming", sinks=4, recent=60)
    assert found.cache is not None and found.cache.layers == 3 and found.cache.positions == 512
    per_token = 3 * 2 * 2 * 8 * 8  # layers, keys and values, heads, width, float64 by the config's dtype
    width = {"float64": 8, "float32": 4}[found.cache.dtype]
    per_token = per_token // 8 * width
    slot = per_token + 3 * 2 * 4  # and the position of each head's token
    assert [(p.tokens, p.unpatched, p.patched, p.beyond) for p in found.cache.points] == [
        (4096, 4096 * per_token, 65 * slot, True),
        (32768, 32768 * per_token, 65 * slot, True),
    ]
    assert trainless.explain(meta("bert"), "head_gain").cache is None


def test_it_prints_within_eighty_columns_and_is_plain_data() -> None:
    import json

    found = trainless.explain(models.build("gemma2"), ["h2o", "streaming", "act", "entropy"])
    assert max(len(line) for line in str(found).splitlines()) <= 80
    assert json.loads(json.dumps(found.to_dict()))["ok"] is False
    good = str(trainless.explain(meta(), "h2o"))
    assert "sites  3/3, layers 0-2" in good and "4,096 tokens" in good and "Nothing is in the way" in good


# ---------------------------------------------------------------- methods


def test_all_methods_with_their_parameters() -> None:
    found = {info.name: info for info in trainless.methods()}
    assert {"act", "attn_temperature", "entropy", "h2o", "head_gain", "streaming"} <= set(found)
    assert all(info.fits is None for info in found.values())
    h2o = found["h2o"]
    assert h2o.identity and h2o.source and h2o.summary and h2o.hosts == ("transformers",)
    heavy = h2o.parameters[0]
    assert (heavy.name, heavy.default, heavy.origin, heavy.required) == ("heavy", 0.1, "published", False)
    assert found["attn_temperature"].aliases == ("tempscale", "vit_smoothing")
    assert max(len(line) for line in str(trainless.methods()).splitlines()) <= 80


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "bert", "vit", "t5", "unet", "flux", "sd3"])
def test_fitting_methods_come_first_and_can_be_applied(family: str) -> None:
    model = models.build(family)
    found = trainless.methods(model)
    assert [info.fits for info in found] == sorted((info.fits for info in found), reverse=True)
    for info in found:
        if info.fits and not info.note:
            made = trainless.patch(model, info.name)
            assert made.report().methods[0].of == info.of
            made.remove()
        elif not info.fits:
            assert info.reason
            with pytest.raises(NoMatch):
                trainless.patch(model, info.name)


def test_what_a_model_does_not_say_is_a_note_and_no_misfit() -> None:
    found = {info.name: info for info in trainless.methods(models.build("flux"))}
    assert found["entropy"].fits and "trained" in found["entropy"].note
    shallow = {info.name: info for info in trainless.methods(models.build("llama", layers=2))}
    assert shallow["act"].fits and "2 layers" in shallow["act"].note  # its default skips the first two


def test_a_method_with_required_parameters_fits_where_it_could(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Needs(Method):
        name: ClassVar[str] = "needs"
        summary: ClassVar[str] = "a method whose window has no default"
        window: int = option(help="how far")

        def check(self) -> None:
            if self.window < 1:
                raise InputError("window must be positive")

        def contribute(self, site: Site) -> Sequence[Contribution]:
            raise AssertionError("not asked for before the window is known")

    base.known()
    monkeypatch.setitem(base._registry, "needs", Needs)
    info = next(i for i in trainless.methods(meta()) if i.name == "needs")
    assert info.fits and info.note == "needs window" and info.parameters[0].required
    assert "window (required)" in str(info)


def test_a_family_that_cannot_be_reached_fits_nothing() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))
    found = trainless.methods(model)
    assert not any(info.fits for info in found) and all("bloom" in info.reason for info in found)


def test_no_model_is_an_error() -> None:
    with pytest.raises(InputError):
        trainless.methods(3)


def test_a_cache_that_depends_on_the_prompt_is_not_estimated():
    found = trainless.explain(meta(), [{"use": "zipvl", "with": {"mode": "discard"}}])
    assert [point.patched for point in found.cache.points] == [None, None]
    assert "depends on the prompt" in str(found)


@pytest.mark.parametrize(
    ("kind", "what", "why"),
    [
        ("deepseek_v3", "h2o", "latents"),
        ("falcon_h1", "kvquant", "also holds the state of a recurrence"),
        ("gemma3_text", "act", "StaticSlidingWindowLayer"),
        ("jetmoe", "h2o", "repeats the heads"),
        ("diffllama", "act", "more than once"),
        ("jamba", "h2o", None),
        ("llama", "zipvl", "does not fit into buffers"),
    ],
)
def test_a_static_cache_that_a_call_refuses_is_a_note(kind: str, what: str, why: str | None) -> None:
    model = decoder_zoo.build(kind, dtype=torch.float32)
    given = {"act": {"skip_layers": 0}}.get(what, {})
    notes = [n for n in trainless.explain(model, what, **given).notes if "static caches: no" in n]
    ids = decoder_zoo.prompt(12)
    with trainless.patched(model, what, **given) as patch:
        assert notes == [n for n in patch.report().notes if "static caches: no" in n]
        cache = StaticCache(config=model.config, max_cache_len=20)
        if why is None:
            assert not notes
            model(ids, past_key_values=cache)
            return
        (note,) = notes
        assert note.startswith(f"{what}: static caches: no, because ") and why in note
        with pytest.raises(trainless.Unsupported, match=f"{what}: layer . of this static cache.*{why}"):
            model(ids, past_key_values=cache)


def test_a_model_that_keeps_no_cache_by_its_own_settings_is_a_note() -> None:
    model = models.build("llama", dtype=torch.float32)
    assert not trainless.explain(model, "h2o").notes
    model.generation_config.use_cache = False
    (note,) = trainless.explain(model, "h2o").notes
    assert note.startswith("h2o: this model's own generation config says use_cache=False")
    assert not trainless.explain(model, "attn_temperature", temperature=0.5).notes
