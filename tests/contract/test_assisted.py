"""Assisted decoding: drafts that may be rejected leave nothing behind."""

import pytest
import torch
from oracle import models
from transformers import DynamicCache

import trainless
from trainless.cache import CompressingLayer

from .cases import BUDGETED, EVICTORS, LANGUAGE, Case, named
from .tools import build, same

pytestmark = pytest.mark.ways

ON_LLAMA = [c for c in LANGUAGE if "llama" in c.families]
FULL_BUDGET = [c for c in ON_LLAMA if c.wide is not None]


def _repeating(length: int = 18) -> torch.Tensor:
    """A prompt in which n-grams come back, so that prompt lookup has something to find."""
    return models.prompt(6, 3).repeat(1, length // 6)


def _ways(model) -> dict:
    helper = build("llama", seed=9, layers=1, dtype=torch.float32, exact=False)
    helper.generation_config.num_assistant_tokens = 3
    return {"lookup": {"prompt_lookup_num_tokens": 3}, "model": {"assistant_model": helper}}


def _generate(model, ids, **more):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **more
    )


@pytest.mark.parametrize(**named([*FULL_BUDGET, *[c for c in ON_LLAMA if c.wide is None]]))
@pytest.mark.parametrize("way", ["lookup", "model"])
def test_assisted_at_full_budget_is_greedy(case: Case, way: str):
    model = build("llama", dtype=torch.float32, exact=False)
    ids = _repeating()
    trainless.patch(model, case.method, **(case.wide if case.wide is not None else case.parameters))
    greedy = _generate(model, ids)
    # The first call of assisted decoding brings a draft along: whoever looks over the whole prompt sees it.
    if "refused" in (case.assisted, case.chunks):
        with pytest.raises(trainless.Unsupported, match=rf"{case.method}.*assisted decoding"):
            _generate(model, ids, **_ways(model)[way])
        assert torch.equal(_generate(model, ids), greedy)
        return
    assert torch.equal(_generate(model, ids, **_ways(model)[way]), greedy)


@pytest.mark.parametrize(**named(BUDGETED))
@pytest.mark.parametrize("way", ["lookup", "model"])
def test_assisted_with_eviction_stays_within_its_budget(case: Case, way: str):
    model = build("llama", dtype=torch.float32, exact=False)
    trainless.patch(model, case.method, **case.parameters)
    ids = _repeating()
    found = _generate(model, ids, return_dict_in_generate=True, **_ways(model)[way])
    for layer in found.past_key_values.layers:
        assert isinstance(layer, CompressingLayer) and layer.record_past
        seen = int(layer.get_seq_length())
        assert found.sequences.shape[1] - 1 <= seen + 1
        heads, grown = layer.kept()[0], seen - ids.shape[1] if case.once else 0
        assert all(head[-1] == seen - 1 and head == sorted(set(head)) for head in heads)
        kept = [len(head) for head in heads]
        if layer.policy.by_head:  # heads that share a budget keep as much together
            kept = [sum(kept) / len(kept)]
        assert set(kept) == {layer.budgets[0] + grown}


@pytest.mark.parametrize(**named([*BUDGETED, *[c for c in EVICTORS if not (c.even or c.pattern)]]))
@pytest.mark.parametrize("rejected", [0, 1, 3])
def test_rejected_drafts_leave_no_trace(case: Case, rejected: int):
    """Draft of 4 tokens, the last ones taken back: as if only the accepted ones had come as one turn."""
    model = build("llama")
    trainless.patch(model, case.method, **case.parameters)
    ids, other = models.prompt(26, 1), models.prompt(26, 2)

    def run(rounds):
        cache = DynamicCache()
        at = 0
        for number, (size, back) in enumerate(rounds):
            if number == 1:
                cache.activate_past_recording()
            # What is taken back was something else than what comes later.
            given = torch.cat([ids[:, at : at + size - back], other[:, at + size - back : at + size]], 1)
            positions = torch.arange(at, at + size)[None]
            out = model(given, position_ids=positions, past_key_values=cache).logits[:, : size - back]
            at += size - back
            if number:
                cache.crop(-back)
        return out, cache

    drafted, one = run([(14, 0), (4, rejected), (4, rejected), (2, 0)])
    accepted, two = run([(14, 0), (4 - rejected, 0), (4 - rejected, 0), (2, 0)])
    same([drafted], [accepted], 1e-11)
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.kept() == b.kept() and a.get_seq_length() == b.get_seq_length()
        if a.scores is not None:
            torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-11)
        torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=1e-11)


@pytest.mark.parametrize(**named(EVICTORS))
def test_crop_without_recording_is_refused(case: Case):
    model = build("llama")
    trainless.patch(model, case.method, **case.parameters)
    cache = DynamicCache()
    model(models.prompt(14), past_key_values=cache)
    with pytest.raises(trainless.Unsupported, match="activate_past_recording"):
        cache.crop(-2)
