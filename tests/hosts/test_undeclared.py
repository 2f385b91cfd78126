"""Denoiser classes of which no image tokens are declared: what acts on roles alone is right on them, or refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import trainless
from trainless.hosts.diffusers.denoisers import TABLE

from . import tiny_omni, tiny_sound, tiny_video  # noqa: F401 - they fill OTHERS
from .cases import OTHERS, lively
from .dense_rule import Rule


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["cosmos3", "kandinsky6", "stable_audio3"])
def test_a_temperature_is_on_every_softmax_of_a_self_attention_and_on_no_other(name):
    case = OTHERS[name]()
    model = lively(case.model)
    with trainless.patch(model, "attn_temperature", temperature=0.7):
        got = case.run(case.other)
    stock = case.run(case.other)
    with Rule(model, case.where(case.other), case.self_layers, temperature=0.7):
        want = case.run(case.other)
    assert (got - want).abs().max() < case.tolerance * want.abs().max()
    assert (want - stock).abs().max() > 20 * case.tolerance * want.abs().max()


def test_a_second_call_over_other_keys_is_refused_where_nothing_is_declared(monkeypatch):
    monkeypatch.delitem(TABLE, "diffusers.models.transformers.transformer_cosmos3.Cosmos3OmniTransformer")
    case = OTHERS["cosmos3"]()
    with trainless.patch(lively(case.model), "attn_temperature", temperature=0.7):
        with pytest.raises(trainless.Unsupported, match=r"over 7 keys and again over 31.*not declared"):
            case.run(case.other)


@pytest.mark.parametrize("name", ["anyflow_far", "kandinsky6_upscaler", "wan_animate2"])
def test_classes_that_paint_with_flex_attention_alone_are_refused_when_patching(name):
    with pytest.raises(trainless.NoMatch, match=r"flex attention.*no patch can reach"):
        trainless.patch(OTHERS[name]().model, "attn_temperature", temperature=0.7)
