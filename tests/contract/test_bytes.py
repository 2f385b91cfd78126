"""Bytes: what an evicting layer stores after a prefill is its budget, measured on the storages."""

import copy
import math

import pytest
import torch
from oracle import models
from transformers import DynamicCache

import trainless
from trainless.cache import FixedLayer, RaggedLayer
from trainless.cache.fixed import ROOM
from trainless.kernels.ragged import PAGE
from trainless.patch.report import size
from trainless.seams import tokens_of

from .cases import BUDGETED, EVICTORS, Case, named
from .tools import build

WIDTH, KV_HEADS, LAYERS = 8, 2, 3


def _budget(case: Case, length: int) -> int:
    given = case.parameters
    for whole in ("capacity", "ratio"):
        if whole in given:
            return max(1, tokens_of(given[whole], length))
    return max(1, sum(tokens_of(given[k], length) for k in ("sinks", "heavy", "recent") if k in given))


def _tensors(thing, found=None) -> list[torch.Tensor]:
    found = [] if found is None else found
    if isinstance(thing, torch.Tensor):
        found.append(thing)
    elif isinstance(thing, dict):
        for value in thing.values():
            _tensors(value, found)
    elif isinstance(thing, list | tuple):
        for value in thing:
            _tensors(value, found)
    elif type(thing).__name__ == "State":
        _tensors(thing.tensors, found)
    return found


def _storage(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(**named([c for c in BUDGETED if not c.by_head]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("lengths", [[24], [24, 24], [24, 15, 9]], ids=str)
def test_bytes_after_a_prefill_and_along_a_generation(case: Case, dtype: torch.dtype, lengths: list[int]):
    model = build("llama", dtype=dtype, exact=False)
    patch = trainless.patch(model, case.method, **case.parameters)
    ids, mask = models.left_padded(lengths)
    budget, cache = max(_budget(case, n) for n in lengths), DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    for layer in cache.layers:
        settled = isinstance(layer, FixedLayer) and layer.fixed is not None
        # One slot more than stay, for the token that comes.
        exact = len(lengths) * KV_HEADS * (budget + settled) * WIDTH * 2 * dtype.itemsize
        buffers = list(layer.fixed.tensors().values()) if settled else [layer.keys, layer.values]
        assert _storage([layer.keys, layer.values]) == exact
        assert layer.nbytes == _storage(buffers)
        # Tables of turns are the model's, whatever is cached: one for all layers.
        held = {k: v for k, v in vars(layer).items() if k not in ("keys", "values", "fixed", "tables")}
        beside = layer.nbytes - exact + _storage(_tensors(held))
        assert beside <= 40 * len(lengths) * KV_HEADS * (budget + 8)
    report, total = patch.report(), sum(layer.nbytes for layer in cache.layers)
    assert sum(layer["bytes_kept"] for layer in report.methods[0].layers) == total
    assert {layer["tokens_kept"] for layer in report.methods[0].layers} == {budget}
    assert size(total) in str(report)
    # Decoding does not grow: at most one more slot, for the token that comes; or there is room for so many later ones.
    mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    for step in range(3):
        positions = mask[:, : 25 + step].sum(1, keepdim=True) - 1
        model(ids[:, -1:], attention_mask=mask[:, : 25 + step], position_ids=positions, past_key_values=cache)
        for layer in cache.layers:
            grown = ROOM + 2 if case.once else 1  # it settles after a step, and keeps a slot empty
            most = len(lengths) * KV_HEADS * (budget + grown) * WIDTH * 2 * dtype.itemsize
            assert _storage([layer.keys, layer.values]) <= most


@pytest.mark.parametrize(**named([c for c in BUDGETED if c.by_head]))
@pytest.mark.parametrize("lengths", [[24], [24, 15, 9]], ids=str)
def test_bytes_of_heads_that_share_a_budget_are_those_of_what_each_holds(case: Case, lengths: list[int]):
    model = build("llama", dtype=torch.float32, exact=False)
    patch = trainless.patch(model, case.method, **case.parameters)
    ids, mask = models.left_padded(lengths)
    budget, cache = max(_budget(case, n) for n in lengths), DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    kept = [[len(head) for row in copy.deepcopy(layer).kept() for head in row] for layer in cache.layers]
    assert all(sum(numbers[:KV_HEADS]) == KV_HEADS * budget for numbers in kept)
    # In the layers whose heads differ, each has a slot that stays empty, room for later tokens, and whole pages.
    assert any(len(set(numbers)) > 1 for numbers in kept)
    for step in range(1, 3):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(
            ids[:, -1:],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
        )
        for layer in (layer for layer in cache.layers if layer.uneven):
            assert isinstance(layer, RaggedLayer) and layer.ragged is not None
            assert layer.ragged.keys.shape[0] < len(lengths) * KV_HEADS * (budget + step + 2 * PAGE)
            assert layer.nbytes == _storage(list(layer.ragged.tensors().values()))
            held = {k: v for k, v in vars(layer).items() if k != "ragged"}
            assert _storage(_tensors(held)) <= 64 * len(lengths) * KV_HEADS
        total = sum(layer.nbytes for layer in cache.layers)
        assert sum(layer["bytes_kept"] for layer in patch.report().methods[0].layers) == total


@pytest.mark.parametrize(**named([c for c in EVICTORS if c.pattern]))
@pytest.mark.parametrize("lengths", [[24], [24, 15, 9]], ids=str)
def test_bytes_of_a_choice_without_a_budget_are_those_of_the_kept_tokens(case: Case, lengths: list[int]):
    model = build("llama", dtype=torch.float32, exact=False)
    patch = trainless.patch(model, case.method, **case.parameters)
    ids, mask = models.left_padded(lengths)
    cache = DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    widths = []
    for layer in cache.layers:
        widths.append(max(len(head) for row in layer.kept() for head in row))
        assert widths[-1] < max(lengths)
        exact = len(lengths) * KV_HEADS * widths[-1] * WIDTH * 2 * 4
        assert _storage([layer.keys, layer.values]) == exact == layer.nbytes
        held = {k: v for k, v in vars(layer).items() if k not in ("keys", "values")}
        assert _storage(_tensors(held)) <= 40 * len(lengths) * KV_HEADS * widths[-1]
    if case.even:
        assert set(widths) == {int(case.parameters["ratio"] * max(lengths))}, "a share of the prompt"
    else:
        assert len(set(widths)) > 1, "layers differ in what they need"
    found = patch.report().methods[0].layers
    assert [layer["tokens_kept"] for layer in found] == widths


def test_rows_keep_fractions_of_their_own_prompt():
    model = build("llama")
    trainless.patch(model, "h2o", heavy=0.25, recent=0.29)
    lengths = [24, 17, 100 // 8]
    ids, mask = models.left_padded(lengths)
    cache = DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    for layer in cache.layers:
        for row, length in enumerate(lengths):
            want = max(1, math.floor(0.25 * length + 1e-9) + math.floor(0.29 * length + 1e-9))
            assert [len(head) for head in layer.kept()[row]] == [want] * KV_HEADS


@pytest.mark.parametrize(**named(EVICTORS))
def test_nothing_of_the_dropped_tokens_is_held(case: Case):
    """A slice of a tensor keeps all of it alive; kept tokens must have storage of their own."""
    model = build("llama")
    trainless.patch(model, case.method, **case.parameters)
    cache = DynamicCache()
    model(models.prompt(24), past_key_values=cache)
    for layer in cache.layers:
        for tensor in _tensors({k: v for k, v in vars(layer).items() if k != "states"}):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
