"""Encoders with a decoder: its own cache is compressed, the encoder's keys are left as they are."""

from __future__ import annotations

import pytest
import torch
from oracle import decoder_zoo
from oracle import vision_zoo as zoo
from transformers import BartConfig, BartForConditionalGeneration

import trainless

STEPS = 6


def _model():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=90, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, forced_eos_token_id=None, init_std=0.4,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def _written(model, **more):
    ids = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(1))
    return model.generate(
        input_ids=ids, decoder_input_ids=ids[:, :14], max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


def _cache(made):
    return made.cache if "cache" in made else made.past_key_values  # its name until transformers 5.24


@pytest.mark.parametrize(
    ("method", "given", "identity"),
    [
        ("h2o", {"heavy": 3, "recent": 4}, {"recent": 1000}),
        ("streaming", {"sinks": 2, "recent": 5}, {"recent": 1000}),
        ("kvquant", {"k_bits": 2, "v_bits": 2, "group": 4, "residual": 4}, None),
    ],
)
def test_a_decoder_beside_an_encoder_generates_under_a_cache_method(method, given, identity):
    model = _model()
    stock = _written(model)
    with trainless.patch(model, method, **given) as patch:
        made = _written(model)
        assert patch.report().methods[0].acted
    own, others = _cache(made).self_attention_cache, _cache(made).cross_attention_cache
    assert not torch.equal(torch.stack(made.logits), torch.stack(stock.logits))
    if identity is None:
        assert all(type(layer).__module__.startswith("trainless.") for layer in own.layers)
    else:
        assert all(
            layer.keys.shape[2] <= 7 + 1 for layer in own.layers
        )  # buffers have a slot for the next token
        with trainless.patch(model, method, **{**given, **identity}):
            assert torch.equal(torch.stack(_written(model).logits), torch.stack(stock.logits))
    for layer, before in zip(others.layers, _cache(stock).cross_attention_cache.layers, strict=True):
        assert torch.equal(layer.keys, before.keys)


def test_a_cache_that_another_stack_reads_is_refused_by_name():
    """DiffusionGemma's decoder takes the keys out of the layers that its encoder has filled, without updating them."""
    pytest.importorskip("transformers.models.diffusion_gemma")
    model = zoo.build("diffusion_gemma", dtype=torch.float32)
    for part, reason in (("text", "another stack has filled"), ("decoder", "another stack reads its cache")):
        where = {"where": {"part": part}}
        with pytest.raises(trainless.NoMatch, match=reason):
            trainless.patch(model, "kvquant", k_bits=8, v_bits=8, **where)
        assert not trainless.explain(model, "h2o", heavy=4, recent=5, **where).ok
        with trainless.patch(model, "attn_temperature", temperature=0.7, **where) as patch:
            model(**zoo.given("diffusion_gemma", model, decoder_zoo.padded(decoder_zoo.prompt(12))))
            assert patch.report().methods[0].acted
