"""The residual stream is a fact where a layer is given one hidden state for each token, and is refused elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calibrators.conftest import byte_tokenizer
from contract.toys import registered, toy
from oracle import decoder_zoo, models, vision_zoo

import trainless
from trainless.seams import Observe


def _entering(site: Any) -> list[Observe]:
    return [Observe(lambda call, statistics, state: None, asks=frozenset({"residual"}))]


Entering = toy("entering", _entering, parts=frozenset({"text"}))


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with torch.no_grad(), registered(Entering):
        yield


@pytest.mark.parametrize("kind", ["deepseek_v4", "diffllama", "gemma3n_text", "qwen4_exp_text"])
def test_layers_without_one_stream_are_refused_when_patching(kind: str) -> None:
    if kind not in decoder_zoo.kinds():
        pytest.skip(f"this transformers has no {kind}")
    model = decoder_zoo.build(kind, dtype=torch.float32)
    with pytest.raises(trainless.NoMatch, match=r"several hidden states|more than once"):
        trainless.patch(model, "toy_entering")
    assert not trainless.explain(model, "toy_entering").ok
    if kind != "diffllama":  # whose layers have one stream, which a measurement may look at
        with pytest.raises(trainless.Unsupported, match="sink_dims looks at the residual stream"):
            trainless.calibrate(model, "sink_dims", tokenizer=byte_tokenizer())


def test_var_does_not_take_one_stream_of_several_for_all() -> None:
    """Qwen 4's layers are given theirs side by side, (B, L, 4 D): sinks of the first were taken for sinks."""
    if "qwen4_exp" not in vision_zoo.kinds():
        pytest.skip("this transformers has no qwen4_exp")
    model = vision_zoo.build("qwen4_exp", dtype=torch.float32)
    with pytest.raises(trainless.NoMatch, match="several hidden states"):
        trainless.patch(model, "var", sink_dims=[1], layers="0:")


def test_a_wider_stream_than_the_models_is_seen_at_the_call() -> None:
    model = models.build("llama")
    with trainless.patched(model, "toy_entering") as patch:
        model(decoder_zoo.prompt(6))
        site = patch.bindings[0].contributions[0][0]
        site.facts["hidden_size"] += 1
        with pytest.raises(trainless.Unsupported, match="which of them are the residual stream"):
            model(decoder_zoo.prompt(6))
