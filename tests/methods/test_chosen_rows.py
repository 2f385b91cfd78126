"""TOVA and SnapKV: rules that look at the last rows alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import models
from transformers import DynamicCache

import trainless
from trainless.patchers import get
from trainless.seams import Evict, Site


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def layers_after(model, method, ids, mask=None, **given):
    cache = DynamicCache()
    with trainless.patched(model, method, **given):
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache.layers


def test_one_set_for_the_layer_or_one_for_each_head():
    model, ids = models.build("llama", seed=2), models.prompt(24)
    shared = layers_after(model, "tova", ids, capacity=8)
    assert all(layer.kept()[0][0] == layer.kept()[0][1] for layer in shared)
    apart = layers_after(model, "tova", ids, capacity=8, shared=False)
    assert any(layer.kept()[0][0] != layer.kept()[0][1] for layer in apart)


@pytest.mark.parametrize("method", ["tova", "snapkv"])
def test_kept_sets_grow_with_the_budget(method):
    model, ids = models.build("llama", layers=1), models.prompt(30)
    more = {"window": 3} if method == "snapkv" else {}
    found = [layers_after(model, method, ids, capacity=n, **more)[0].kept()[0] for n in (5, 8, 13, 21, 30)]
    for one, other in itertools.pairwise(found):
        assert all(set(a) < set(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["tova", "snapkv"])
def test_groups_are_heads_that_share_by_mean(method):
    """A model with grouped heads against the same one with its keys and values repeated."""
    model, ids = models.build("llama", layers=1), models.prompt(26)
    given = {"capacity": 9, "shared": False} if method == "tova" else {"capacity": 9, "window": 3, "pool": 1}
    grouped = layers_after(model, method, ids, **given)[0]
    calls = []
    with trainless.patched(model, method, **{**given, "capacity": 25}):
        from trainless.cache import CompressingLayer

        cache = DynamicCache()
        real = CompressingLayer._grouped
        try:
            CompressingLayer._grouped = lambda self, mass: calls.append(mass) or real(self, mass)
            model(ids, past_key_values=cache)
        finally:
            CompressingLayer._grouped = real
    (mass,) = calls
    each = mass[0, :, 0].unflatten(0, (2, 2)).mean(1)
    last = 1 if method == "tova" else 3
    for head in range(2):
        free = each[head, : 26 - last]
        want = sorted(free.topk(9 - last).indices.tolist()) + list(range(26 - last, 26))
        assert grouped.kept()[0][head] == want


def test_a_prompt_within_the_capacity_is_left_alone():
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids, mask = models.left_padded([18, 7])
    options = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    stock = model.generate(ids, output_logits=True, **options)
    for given in ({"capacity": 1.0, "window": 2}, {"capacity": 1.0}, {"capacity": 40}):
        patch = trainless.patch(model, "snapkv", **given)
        found = model.generate(ids, output_logits=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, stock.logits, strict=True)), given
        patch.remove()


@pytest.mark.parametrize(
    ("length", "capacity", "kept", "window"), [(24, 0.5, 12, 6), (24, 0.1, 2, 1), (7, 0.5, 3, 1)]
)
def test_a_fraction_is_kept_and_the_window_is_at_most_half_of_it(length, capacity, kept, window):
    """So that short prompts, too, are cut to the share that was asked for."""
    layers = layers_after(models.build("llama"), "snapkv", models.prompt(length), capacity=capacity, window=6)
    for head in (head for layer in layers for head in layer.kept()[0]):
        assert len(head) == kept and head[-window:] == list(range(length - window, length))


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_neighbours_share_their_score(pooling):
    """With a wide pool what stays are runs of neighbours, without one it is single tokens."""
    model, ids = models.build("llama", layers=1, seed=4), models.prompt(30)

    def runs(pool):
        kept = layers_after(model, "snapkv", ids, capacity=12, window=2, pool=pool, pooling=pooling)[
            0
        ].kept()[0]
        return sum(b - a > 1 for head in kept for a, b in itertools.pairwise(head))

    assert runs(7) < runs(1)


def test_nothing_is_computed_while_the_budget_is_not_reached():
    """Below the capacity a call is the stock kernel's, with no row of probabilities beside it."""
    model = models.build("llama", dtype=torch.float32, exact=False)
    patch = trainless.patch(model, "tova", capacity=40)
    model(models.prompt(24), past_key_values=DynamicCache())
    found = patch.report().methods[0]
    assert found.kernels == {"stock": 3} and found.acted == 0


def test_rules_that_make_no_sense_are_refused():
    for given in ({"score": "probe_mass"}, {"last": 3}, {"pool": 4, "once": True}, {"pool": 3}):
        with pytest.raises(trainless.InputError):
            Evict(**given)
    assert Evict(capacity=0.5, recent=8).total(10) == 5 and Evict(capacity=0.5, recent=8).total(4) == 2
    assert Evict(capacity=6, recent=3).fixed == 6
    site = Site("a", torch.nn.Identity(), "transformers", causal=True, facts={"max_positions": 64})
    for method in ("tova", "snapkv"):
        assert get(method)(capacity=64).contribute(site)[0].inert
        assert not get(method)(capacity=63).contribute(site)[0].inert
