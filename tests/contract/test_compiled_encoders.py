"""Embeddings and vision towers under ``torch.compile(fullgraph=True)`` with a temperature: one graph, eager results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import models
from torch._dynamo.utils import counters
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

import trainless

LAYERS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def build(family: str) -> Any:
    torch.manual_seed(0)
    if family == "clip-text":
        words = {"vocab_size": 60, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
        return CLIPTextModel(CLIPTextConfig(**LAYERS, **words, pad_token_id=0)).eval()
    if family == "clip-vision":
        return CLIPVisionModel(CLIPVisionConfig(**LAYERS, image_size=32, patch_size=8)).eval()
    return models.build(family, layers=1 if family == "bert" else 2, dtype=torch.float32, exact=False)


def run(model: Any, family: str, length: int = 14) -> torch.Tensor:
    named = {"clip-text": "bert", "clip-vision": "vit"}.get(family, family)
    given = models.inputs(named, **({} if named == "vit" else {"length": length}))
    ids = {n: t.clamp(max=59) if n == "input_ids" else t for n, t in given.items()}
    return model(**{n: t.float() if t.is_floating_point() else t for n, t in ids.items()})[0]


@pytest.mark.parametrize("family", ["bert", "vit", "clip-text", "clip-vision"])
def test_a_temperature_in_one_graph(family):
    model = build(family)
    plain = copy.deepcopy(model)
    target = torch.compile(model, fullgraph=True, backend="eager")
    stock = run(plain, family)
    torch.testing.assert_close(run(target, family), stock, rtol=0, atol=1e-5)
    mine, other = (trainless.patch(m, "attn_temperature", temperature=0.5) for m in (model, plain))
    for length in (14, 9):
        want = run(plain, family, length)
        torch.testing.assert_close(run(target, family, length), want, rtol=0, atol=1e-5)
    assert (run(plain, family) - stock).abs().max() > 1e-2
    report = mine.report().methods[0]
    assert report.fired == report.acted == 2 * report.sites
    with mine.paused():
        torch.testing.assert_close(run(target, family), stock, rtol=0, atol=1e-5)
    mine.remove()
    torch.testing.assert_close(run(target, family), stock, rtol=0, atol=1e-5)
    assert not counters["graph_break"] and other.report().methods[0].fired
