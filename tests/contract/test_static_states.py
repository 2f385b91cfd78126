"""Methods that remember a prompt, on static caches: the dynamic cache's result, eagerly and in compiled steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import decoder_zoo, models, real_rows, replay, vlms
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

import trainless
from trainless.cache import StaticStatefulMixin
from trainless.hosts.transformers.version import CACHE_NAME

from .test_families import _gpt_oss
from .tools import build, same

NEAR = 1e-10
CALLS = [14, *[1] * 3, 4, *[1] * 3]
ACT = {"alpha": 1.5, "skip_layers": 0, "min_rows": 3}
VAR = {
    "sink_dims": list(vlms.DIMS), "min_nonsink": 0.3, "min_visual": 0.1, "max_sink_share": 0.3, "layers": "1:",
}  # fmt: skip
USES = {
    "act": [{"use": "act", "with": ACT}],
    "act, heads": [{"use": "act", "with": {**ACT, "heads": [[0, 1], [1, 0], [1, 3]]}}],
    "act, running": [
        {"use": "act", "with": {**ACT, "statistics": "running", "heads": [[0, 1], [1, 0], [1, 3]]}}
    ],
    "act and a scale and a gain": [
        {"use": "attn_temperature", "with": {"temperature": 0.8}},
        {"use": "act", "with": ACT},
        {"use": "head_gain", "with": {"heads": [[0, 0], [2, 1]], "gain": 0.5}},
    ],
}


@pytest.fixture(autouse=True)
def _compiler():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def static(model: Any, length: int = 40) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


def against_dynamic(model: Any, patch: Any, ids: Any, mask: Any, cache: Any, calls: Any = CALLS) -> None:
    """Logits, and how often each method acted."""
    rows = ids.shape[0]
    want = replay(model, None, ids, mask, calls, DynamicCache(config=model.config))
    before = [m.acted for m in patch.report().methods]
    got = replay(model, None, ids, mask, calls, cache)
    for a, b, real in zip(got, want, real_rows(mask, calls, rows), strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=NEAR)
    assert [m.acted for m in patch.report().methods] == [2 * n for n in before] and all(before)


@pytest.mark.parametrize("use", USES)
def test_act_is_what_it_is_on_a_dynamic_cache(use: str):
    model = build("llama")
    ids, mask = models.left_padded([25, 20, 13])
    patch, cache = trainless.patch(model, USES[use]), static(model)
    against_dynamic(model, patch, ids, mask, cache)
    assert any(isinstance(layer, StaticStatefulMixin) for layer in cache.layers)
    assert "rows" in patch.report().methods[-1].kernels


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_learned_sinks(family: str):
    """The layers without a window; those with one have a layer in a static cache that is refused by name."""
    model, ids = _gpt_oss() if family == "gpt_oss" else build(family), models.prompt(25, 2)
    with trainless.patched(
        model, "act", where={"layers": [0, 2] if family == "gpt_oss" else [1]}, **ACT
    ) as patch:
        against_dynamic(model, patch, ids, None, static(model))
    with (
        trainless.patched(model, "act", **ACT),
        pytest.raises(trainless.Unsupported, match=r"act.*StaticSliding"),
    ):
        replay(model, None, ids, None, CALLS, static(model))


def decoded(model: Any, cache: Any, ids: Any, steps: Any) -> list[torch.Tensor]:
    """A prompt of 14 tokens read by ``model``, the others one by one by ``steps``."""
    found = []
    for start, stop in [(0, 14), *((i, i + 1) for i in range(14, ids.shape[1]))]:
        run = model if start == 0 else steps
        found.append(run(ids[:, start:stop], **{CACHE_NAME: cache}).logits)
    return found


@pytest.mark.parametrize(
    "use", [pytest.param("act, running", marks=pytest.mark.grid), "act and a scale and a gain"]
)
def test_steps_are_one_graph(use: str):
    model, ids = build("llama"), models.prompt(22, 2)
    patch = trainless.patch(model, USES[use])
    want = decoded(model, static(model), ids, model)
    counted = [(m.fired, m.acted) for m in patch.report().methods]
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for times in (2, 3):  # another sequence, another cache
        same(decoded(model, static(model), ids, compiled), want, NEAR)
        assert counter.frame_count == 1
        assert [(m.fired, m.acted) for m in patch.report().methods] == [
            (times * fired, times * acted) for fired, acted in counted
        ]
    with patch.paused():
        stock = decoded(model, static(model), ids, compiled)
    patch.remove()
    same(stock, decoded(model, static(model), ids, model), NEAR)


def test_generate_with_a_static_cache():
    model, ids = build("llama"), models.prompt(20)
    trainless.patch(model, "act", **ACT)
    given = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, cache_implementation="static", **given), want)
    beams = model.generate(ids, num_beams=3, **given)
    assert torch.equal(model.generate(ids, num_beams=3, cache_implementation="static", **given), beams)


def test_pauses_resets_and_other_patches():
    model, ids = build("llama"), models.prompt(25)

    def told(cache: Any) -> list[torch.Tensor]:
        with trainless.patched(model, "act", **ACT) as patch:
            found = replay(model, None, ids[:, :16], None, [14, 1, 1], cache)
            with patch.paused():
                found.append(model(ids[:, 16:17], **{CACHE_NAME: cache}).logits)
            found += [model(ids[:, i : i + 1], **{CACHE_NAME: cache}).logits for i in (17, 18)]
            found.append(model(ids[:, 19:22], **{CACHE_NAME: cache}).logits)
        return found

    fixed = static(model)
    want = told(DynamicCache())
    same(told(fixed), want, NEAR)
    fixed.reset()
    same(told(fixed), want, NEAR)
    with (
        trainless.patched(model, "act", **{**ACT, "beta": 0.1}),
        pytest.raises(trainless.Unsupported, match="another patch"),
    ):
        model(ids[:, 22:23], **{CACHE_NAME: fixed})


@pytest.fixture(scope="module")
def pictures() -> Any:
    model = vlms.build("llava")
    given = vlms.batch(model, "llava", None, more=12)
    vlms.plant(model, given)
    return model, given


def test_var_is_what_it_is_on_a_dynamic_cache(pictures: Any):
    model, given = pictures
    calls = [given.prompt, 1, 1, 5, 1, 1]
    with trainless.patched(model, "var", **VAR) as patch:
        want = vlms.replay(model, None, given, calls)
        before = patch.report().methods[0].acted
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=given.prompt + 15)
        got = vlms.replay(model, None, given, calls, cache)
        assert patch.report().methods[0].acted == 2 * before > 0
        assert "rows" in patch.report().methods[0].kernels
    for a, b, rows in zip(got, want, vlms.real(given, calls), strict=True):
        assert (a[rows] - b[rows]).abs().max() < NEAR


def test_steps_of_var_are_one_graph(pictures: Any):
    model, given = pictures
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    where = vlms.positions(model, given)

    def talk(steps: Any) -> list[torch.Tensor]:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=given.prompt + 15)
        found = vlms.replay(model, None, given, [given.prompt], cache)
        wide = torch.nn.functional.pad(given.mask, (0, given.prompt + 15 - given.mask.shape[1]), value=0)
        for at in range(given.prompt, given.prompt + 6):
            seen = wide.clone()
            seen[:, at + 1 :] = 0
            out = steps(
                input_ids=given.ids[:, at : at + 1], attention_mask=seen[:, : at + 1] if steps is model else seen,
                position_ids=where[..., at : at + 1], past_key_values=cache,
            )  # fmt: skip
            found.append(out.logits)
        return found

    with trainless.patched(model, "var", **VAR) as patch:
        want = talk(model)
        acted = patch.report().methods[0].acted
        same(talk(compiled), want, NEAR)
        assert counter.frame_count == 1 and patch.report().methods[0].acted == 2 * acted


USED = {"h2o": {"heavy": 3, "recent": 2}, "kvquant": {"group": 4, "residual": 4}, "act": ACT}


@pytest.mark.parametrize(
    ("kind", "method"),
    [("gemma3_text", "h2o"), ("gemma3_text", "kvquant"), ("jamba", "h2o"), ("jamba", "act")],
)
def test_generate_on_static_caches_of_several_kinds_of_layer_is_as_on_a_dynamic_one(kind: str, method: str):
    """There generate() makes a mask for each kind of layer itself, and hands over no padding."""
    model = decoder_zoo.build(kind)
    given = decoder_zoo.padded(decoder_zoo.prompt(9), decoder_zoo.prompt(14, seed=3))

    def logits(**more: Any) -> Any:
        asked = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
        return model.generate(**given, max_new_tokens=6, return_dict_in_generate=True, **asked, **more).logits

    stock = logits()
    with trainless.patched(model, method, **USED[method]):
        want = logits()
        same(logits(cache_implementation="static", disable_compile=True), want)
    assert not torch.equal(torch.stack(want), torch.stack(stock))
