"""Stock-like layers that append in place: the bits of layers that copy, and nobody's reference changes."""

import copy
import pickle

import pytest
import torch
from oracle import models
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import trainless
from trainless.cache import AppendingLayer, AppendingMixin, appending

from .tools import build

ACT = {"theta": 1e-3, "min_rows": 0, "skip_layers": 0}


def prompts(length):
    return torch.cat([models.prompt(length, seed) for seed in (0, 1)])


@torch.no_grad()
def steps(cache, model, ids, then=None):
    """Logits of a prompt of 12 tokens and of single tokens after it; ``then`` is done to the cache in the middle."""
    found = [model(ids[:, :12], past_key_values=cache).logits]
    for n in range(12, ids.shape[1]):
        if then is not None and n == 20:
            then(cache)
        found.append(model(ids[:, n : n + 1], past_key_values=cache).logits)
    return found


THEN = {
    "steps": None,
    "crop": lambda cache: cache.crop(-3),
    "beams": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "more rows": lambda cache: (
        cache.batch_repeat_interleave(2),
        cache.batch_select_indices(torch.tensor([0, 3])),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", THEN)
def test_steps_have_the_bits_of_steps_that_copy(name, dtype, monkeypatch):
    model = build("llama", dtype=dtype, exact=False)
    ids = prompts(30)
    with trainless.patched(model, "act", **ACT):
        got = steps(mine := DynamicCache(), model, ids, THEN[name])
        assert all(isinstance(layer, AppendingMixin) and layer.buffers for layer in mine.layers)
        monkeypatch.setattr(appending, "_fit", lambda *tensors: False)
        want = steps(other := DynamicCache(), model, ids, THEN[name])
    assert not any(layer.buffers for layer in other.layers)
    assert all(map(torch.equal, got, want))
    for a, b in zip(mine.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@torch.no_grad()
def test_what_was_handed_out_never_changes():
    model, ids = build("llama", exact=False), prompts(40)
    with trainless.patched(model, "act", **ACT):
        cache = DynamicCache()
        steps(cache, model, ids)
        layer = cache.layers[1]
        held, was, place = layer.keys, layer.keys.clone(), layer.keys.data_ptr()
        twin, filed = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        model(ids[:, :1], past_key_values=cache)
        assert layer.keys.data_ptr() == place and layer.keys.shape[2] == 41  # nothing was copied
        cache.crop(-5)
        model(ids[:, :1] + 1, past_key_values=cache)
        assert torch.equal(held, was) and not torch.equal(layer.keys[:, :, 36], held[:, :, 36])
        for other in (twin, filed):
            assert torch.equal(other.layers[1].keys, was)
            model(ids[:, 2:3], past_key_values=other)
            assert torch.equal(other.layers[1].keys[:, :, :40], was)
        assert torch.equal(twin.layers[1].keys, filed.layers[1].keys)
    assert torch.equal(held, was)


@torch.no_grad()
def test_a_layer_copies_where_a_gradient_may_be_wanted():
    model, ids = build("llama", exact=False), prompts(20)
    with trainless.patched(model, "act", **ACT):
        cache = DynamicCache()
        steps(cache, model, ids)
        embedded = model.get_input_embeddings()(ids[:, :1]).detach().clone()
        with torch.enable_grad():
            out = model(inputs_embeds=embedded.requires_grad_(), past_key_values=cache).logits.sum()
        assert cache.layers[0].buffers is None
        model(ids[:, :1], past_key_values=cache)
        out.backward()  # what was saved for it has not been written to


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_under_scales_and_gains_appends_in_place(beams, monkeypatch):
    model, ids = build("llama", dtype=torch.float32, exact=False), prompts(14)
    more = {"num_beams": beams, "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    found = []
    with trainless.patched(model, "attn_temperature", temperature=0.8):
        for fit in (appending._fit, lambda *tensors: False):
            monkeypatch.setattr(appending, "_fit", fit)
            cache = DynamicCache(config=model.config)
            out = model.generate(ids, past_key_values=cache, output_logits=True, **more)
            assert all(type(layer) is AppendingLayer for layer in cache.layers)
            found.append((out, cache))
    (got, mine), (want, other) = found
    assert torch.equal(got.sequences, want.sequences) and all(map(torch.equal, got.logits, want.logits))
    assert all(
        (layer.buffers is None) == (beams > 1) for layer in mine.layers
    )  # beams were reordered at the end
    for layer in pickle.loads(pickle.dumps(mine)).layers + copy.deepcopy(mine).layers:
        assert type(layer) is DynamicLayer and "buffers" not in vars(layer)
    for a, b in zip(mine.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
    # A later patch takes the layer for the stock one that it stands for.
    mine.reset()
    with trainless.patched(model, "streaming", recent=4):
        model(ids, past_key_values=mine)
        assert mine.layers[0].evicted


def test_an_identity_leaves_the_layers_alone():
    model, ids = build("llama", exact=False), prompts(8)
    with trainless.patched(model, "attn_temperature", temperature=1.0):
        model.generate(ids, past_key_values=(cache := DynamicCache(config=model.config)), max_new_tokens=3)
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}
