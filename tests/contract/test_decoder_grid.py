"""Every method on tiny decoders of many families: what is accepted works at the call, the rest is refused by name.

A sample runs always; TRAINLESS_GRID=1 runs every model type of transformers that can be built small.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from oracle import decoder_zoo as zoo
from oracle import dense
from torch import Tensor

import trainless
from trainless.hosts import components, find_sites
from trainless.preview.support import support

SHARED = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
}
# One for each way in which keys come from a cache.
SAMPLE: dict[str, dict[str, Any]] = {
    "llama": {}, "deepseek_v3": {}, "longcat_flash": {}, "jetmoe": {}, "diffllama": {}, "doge": {}, "falcon_h1": {},
    "zamba2": {}, "hrm_text": {}, "gemma4_text": SHARED, "llama4_text": {}, "qwen3_next": {}, "deepseek_v4": {},
}  # fmt: skip
EVERY = {kind: SAMPLE.get(kind, {}) for kind in zoo.kinds()} if os.environ.get("TRAINLESS_GRID") else SAMPLE
KINDS = pytest.mark.parametrize("kind", EVERY)

METHODS: dict[str, dict[str, Any]] = {
    "streaming": {"sinks": 2, "recent": 7},
    "h2o": {"heavy": 4, "recent": 5},
    "tova": {"capacity": 9},
    "snapkv": {"capacity": 9, "window": 4},
    "kvquant": {"k_bits": 8, "v_bits": 8, "group": 4, "residual": 4},
    "zipcache": {"interval": 3, "bits": (8, 8)},
    "act": {"alpha": 2.0, "skip_layers": 0, "min_rows": 2},
    "attn_temperature": {"temperature": 0.7},
    "head_gain": {"gain": 0.5},
}
IDENTITY: dict[str, dict[str, Any]] = {
    "streaming": {"sinks": 2, "recent": 1 << 20}, "h2o": {"heavy": 4, "recent": 100}, "tova": {"capacity": 1000},
    "snapkv": {"capacity": 1000, "window": 4}, "kvquant": {"k_bits": 16, "v_bits": 16}, "zipcache": {"bits": (16, 16)},
    "act": {"beta": 1.0}, "attn_temperature": {"temperature": 1.0}, "head_gain": {"gain": 1.0},
}  # fmt: skip
# What evicts and packs here although the cache is not a plain one.
ALL = ("h2o", "streaming", "tova", "snapkv", "kvquant", "zipcache", "act")
SERVED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("deepseek_v3", "longcat_flash", "jetmoe", "falcon_h1", "zamba2", "hrm_text", "llama4_text"), ALL
    ),
    "gemma4_text": (*ALL, "head_gain"),
    "diffllama": ("kvquant", "zipcache", "act"),
    "doge": ("kvquant", "zipcache"),
}
# One row of two is near: MiniMax's own mask forgets the padding in single steps, and routers of the others stand on an
# edge in one of the rows, where any rounding chooses another expert.
ONE_ROW = {"minimax", "minimax_m2", "phimoe"}
REFUSED = {
    "diffllama": {"h2o": "runs twice", "streaming": "runs twice"},
    "doge": {"h2o": "each at its place", "tova": "each at its place"},
    "deepseek_v4": {"h2o": "keeps its own", "act": "holds other keys"},
}


def _model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    try:
        model = zoo.build(kind, dtype=dtype, **EVERY[kind])
        _logits(model, zoo.padded(zoo.prompt(4)))
        return model
    except Exception as error:  # a family that cannot be built small, or does not run stock
        if kind in SAMPLE:
            raise
        pytest.skip(str(error)[:150])


def _logits(model: Any, batch: dict[str, Tensor], tokens: int = 4) -> Tensor:
    found = model.generate(
        **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return torch.stack(found.logits, 1)


@KINDS
def test_what_is_accepted_works_and_what_cannot_is_refused_when_patching(kind: str) -> None:
    model = _model(kind)
    batch = zoo.padded(zoo.prompt(20, 1), zoo.prompt(13, 2))
    stock = _logits(model, batch)
    for method, given in METHODS.items():
        said = trainless.explain(model, method, **given)
        if not said.ok:
            with pytest.raises(trainless.TrainlessError) as caught:
                trainless.patch(model, method, **given)
            assert str(caught.value) == said.problems[0].message
            assert REFUSED.get(kind, {}).get(method, "") in str(caught.value)
            assert method not in SERVED.get(kind, ())
            continue
        assert method not in REFUSED.get(kind, {}), (kind, method)
        with trainless.patched(model, method, **given) as patch:
            got = _logits(model, batch)
            report = patch.report().methods[0]
        assert report.fired and report.acted and torch.isfinite(got).all(), (kind, method)
        if method in ("kvquant", "zipcache"):
            # Eight bits are near the stock model, as long as the text is the same.
            off = (got[:, :2] - stock[:, :2]).abs().amax((1, 2))
            worst = off.min() if kind in ONE_ROW else off.max()
            assert worst < 0.1 * stock.abs().max(), (kind, method, off)
        else:
            assert not torch.equal(got, stock), (kind, method)
    assert torch.equal(_logits(model, batch), stock)


@KINDS
def test_the_identity_has_the_stock_bits(kind: str) -> None:
    model = _model(kind)
    batch = zoo.padded(zoo.prompt(15, 1), zoo.prompt(11, 2))
    stock = _logits(model, batch, 3)
    for method, given in IDENTITY.items():
        if trainless.explain(model, method, **{**METHODS[method], **given}).ok:
            with trainless.patched(model, method, **{**METHODS[method], **given}):
                assert torch.equal(_logits(model, batch, 3), stock), (kind, method)


# Logits that are capped, or that share a row with learned sinks, are none of the dense rule's.
UNRULED = {
    "gemma2",
    "gpt_oss",
    "vaultgemma",
    "mimo_v2_flash",
    "granite_swa",
    "granitemoe_swa",
    "flint",
    "inkling_text",
}


@KINDS
@pytest.mark.parametrize(
    ("method", "rule"),
    [("h2o", {"heavy": 4, "recent": 5}), ("streaming", {"first": 2, "recent": 7})],
    ids=["h2o", "streaming"],
)
def test_kept_sets_are_those_of_a_dense_rule(kind: str, method: str, rule: dict[str, int]) -> None:
    if kind in UNRULED:
        pytest.skip("its logits are capped, or have learned sinks")
    model = _model(kind, torch.float64)
    if not trainless.explain(model, method, **METHODS[method]).ok:
        pytest.skip("refused when patching")
    ids = zoo.padded(zoo.prompt(24))
    with trainless.patched(model, method, **METHODS[method]) as patch:
        got = _logits(model, ids, 6)
        sites = [site for site, _ in patch.bindings[0].contributions]
    rules = {
        s.name: dense.Rule(heads=s.facts["cache_shape"][0], tiled=s.facts["keys"] == "tiled", **rule)
        for s in sites
    }
    with dense.ruled(model, rules):
        want = _logits(model, ids, 6)
    assert (want - _logits(model, ids, 6)).abs().max() > 1e-3  # the rule matters
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@KINDS
def test_estimated_bytes_are_those_of_the_cache(kind: str) -> None:
    from trainless.patch.binding import bind
    from trainless.preview.memory import estimate
    from trainless.recipes import resolve

    model, length = _model(kind), 30
    if not trainless.explain(model, "attn_temperature", temperature=0.5).ok:
        pytest.skip("refused when patching")
    found = estimate(*bind(model, resolve("attn_temperature", {"temperature": 0.5})), [length])
    if found is None or any(
        "other keys" in (s.facts["no_state"] or "") for s in find_sites(components(model))
    ):
        pytest.skip("its cache holds more than keys and values of tokens")
    with torch.no_grad():
        cache = getattr(model(input_ids=zoo.prompt(length), use_cache=True), "past_key_values", None)
    if cache is None:
        pytest.skip("it does not return its cache")
    cache = getattr(cache, "self_attention_cache", cache)
    tensors = [
        t
        for layer in cache.layers
        for n in ("keys", "values")
        if isinstance(t := getattr(layer, n, None), Tensor)
    ]
    assert found.points[0].unpatched == sum(t.numel() * t.element_size() for t in tensors)


def test_support_tells_methods_apart() -> None:
    found = {s.method: s for s in support(zoo.build("doge"))}
    assert found["attn_temperature"].verdict == "works" and found["attn_temperature"].sites == 4
    assert found["h2o"].verdict == "refused" and "each at its place" in next(iter(found["h2o"].reasons))
    shared = {s.method: s for s in support(zoo.build("gemma4_text", **SHARED))}
    assert shared["h2o"].verdict == "passes over" and 0 < shared["h2o"].sites < shared["h2o"].of
    assert any("another layer" in reason for reason in shared["h2o"].reasons)


def test_deepseek_v3_is_said_to_need_what_it_needs() -> None:
    """61 layers of 512 + 64 numbers in bfloat16, without building any weight."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config()
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    cache = trainless.explain(model, "h2o").cache
    assert cache is not None
    assert [p.unpatched for p in cache.points] == [n * 61 * (512 + 64) * 2 for n in (4096, 32768)]
