"""Against the dense float64 oracle: prefill, cached steps, turns, padding, groups, batches, kept sets."""

import pytest
import torch
from oracle import Kept, models, replay
from transformers import DynamicCache

import trainless
from trainless.cache import CompressingLayer

from .cases import CAUSAL, EVICTORS, LANGUAGE, VLMS, Case, named, pairs
from .tools import CALLS, EXACT, LENGTHS, TOLERANCE, build, dense, differs, outputs, same, text, wide

ALL = (*models.CAUSAL, *models.ENCODERS, *models.DENOISERS, *VLMS)
ON_LLAMA = [c for c in LANGUAGE if "llama" in c.families]


@pytest.mark.every
@pytest.mark.parametrize(("case", "family"), pairs(ALL))
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "single"])
def test_equals_the_oracle(case: Case, family: str, padded: bool):
    if not padded and family not in (*CAUSAL, *VLMS):
        pytest.skip("encoders and denoisers are run once, padded")
    model = build(family)
    with dense(model, family, case):
        want = outputs(model, family, padded)
    trainless.patch(model, case.method, **case.parameters)
    same(outputs(model, family, padded), want, TOLERANCE.get(family, EXACT))


@pytest.mark.parametrize(**named(ON_LLAMA))
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)], ids=str)
def test_equals_the_oracle_in_head_groups_of_any_size(case: Case, heads: tuple[int, int]):
    model = build(
        "llama", seed=3, num_attention_heads=heads[0], num_key_value_heads=heads[1], hidden_size=8 * heads[0]
    )
    if case.method == "head_gain" and case.parameters["heads"] == "all" and heads[0] != 4:
        pytest.skip("the row's oracle lists four heads")
    with dense(model, "llama", case):
        want = outputs(model, "llama")
    trainless.patch(model, case.method, **case.parameters)
    same(outputs(model, "llama"), want, EXACT)


# One prefill longer than a block of rows that is computed outright, then steps; a prefill of one token.
CUTS = {"steps": [18, 1, 1, 1, 1], "turns": [6, 9, 7], "one": [1, 1, 19, 1], "long-turn": [4, 17, 1]}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(**named(ON_LLAMA))
def test_equals_the_oracle_however_the_calls_are_cut(case: Case, cut: str):
    model = build("llama", seed=1)
    ids = torch.cat([models.prompt(22, 4), models.prompt(22, 5)])
    with dense(model, "llama", case):
        want = replay(model, None, ids, None, CUTS[cut])
    trainless.patch(model, case.method, **case.parameters)
    same(replay(model, None, ids, None, CUTS[cut]), want, EXACT)


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_float32_stays_near_float64(case: Case):
    """Selections have margins on these inputs, so single precision only rounds."""
    want, got = [], []
    for dtype, into in ((torch.float64, want), (torch.float32, got)):
        model = build("llama", dtype=dtype, exact=False)
        trainless.patch(model, case.method, **case.parameters)
        into += [t.double() for t in outputs(model, "llama")]
    same(got, want, 2e-4)


@pytest.mark.parametrize(
    ("case", "family"), pairs(CAUSAL, [c for c in LANGUAGE if c.main or c.label == "act-running"])
)
def test_equals_the_oracle_in_the_cache_that_generate_makes(case: Case, family: str):
    """A cache made from the config has sliding layers that forget what their window hides."""
    model = build(family)
    ids, mask = text()
    with dense(model, family, case):
        want = outputs(model, family)
    trainless.patch(model, case.method, **case.parameters)
    with wide(model):
        found = replay(model, None, ids, mask, CALLS, DynamicCache(config=model.config))
    rows = mask[:, : sum(CALLS)].bool().split(CALLS, 1)
    same([a[r] for a, r in zip(found, rows, strict=True)], want, EXACT)


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_a_padded_batch_is_its_rows_alone(case: Case):
    model = build("llama")
    ids, mask = text()
    trainless.patch(model, case.method, **case.parameters)
    batch = replay(model, None, ids, mask, CALLS)
    for row, length in enumerate(LENGTHS):
        pads = ids.shape[1] - length
        calls = [CALLS[0] - pads, *CALLS[1:]]
        alone = replay(model, None, ids[row : row + 1, pads:], None, calls)
        same([b[row : row + 1, -n:] for b, n in zip(batch, calls, strict=True)], alone, EXACT)


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_generated_texts_of_a_batch_are_those_of_its_rows(case: Case):
    model = build("llama", dtype=torch.float32, exact=False)
    ids, mask = models.left_padded([19, 12, 7])
    stock = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    trainless.patch(model, case.method, **case.parameters)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, pads in enumerate((0, 7, 12)):
        alone = model.generate(ids[row : row + 1, pads:], max_new_tokens=10, do_sample=False)
        n = alone.shape[1] - (ids.shape[1] - pads)
        assert torch.equal(whole[row, ids.shape[1] : ids.shape[1] + n], alone[0, -n:])
    assert whole.shape != stock.shape or not torch.equal(whole, stock)


# ---------------------------------------------------------------- what is kept


def recorded(model: torch.nn.Module, ids, mask, calls=CALLS):
    """Logits per call, the kept sets per layer and call, and the cache."""
    cache, logits, sets, start = DynamicCache(), [], {}, 0
    positions = (torch.ones_like(ids) if mask is None else mask).cumsum(1).sub(1).clamp_min(0)
    for size in calls:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        with torch.no_grad(), wide(model):
            out = model(
                ids[:, start:stop],
                attention_mask=seen,
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            )
        logits.append(out.logits)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, CompressingLayer):
                sets.setdefault(index, []).append(layer.kept())
        start = stop
        assert cache.get_seq_length() == stop
    return logits, sets, cache


@pytest.mark.parametrize(("case", "family"), pairs(CAUSAL, EVICTORS))
def test_recorded_kept_sets_replayed_densely_give_the_same(case: Case, family: str):
    model = build(family)
    ids, mask = text()
    with trainless.patched(model, case.method, **case.parameters):
        logits, sets, _ = recorded(model, ids, mask)
    assert sorted(sets) == list(case.acted_layers(family))
    if not case.pattern:  # else the prefill is not dense either
        rule = Kept(sets, str(case.parameters.get("positions", "real")))
        want = replay(model, rule, ids, mask, CALLS)
        rows = mask.bool().split(CALLS, 1)
        same(
            [a[r] for a, r in zip(logits, rows, strict=True)],
            [a[r] for a, r in zip(want, rows, strict=True)],
            EXACT,
        )
    with dense(model, family, case) as oracle:
        replay(model, None, ids, mask, CALLS)
        rule = oracle.rules[0]
        for layer, turns in sets.items():
            for call, rows in enumerate(turns):
                for row, heads in enumerate(rows):
                    for head, kept in enumerate(heads):
                        assert kept == rule.kept(layer, call, row, head), (layer, call, row, head)


@pytest.mark.parametrize(**named(EVICTORS))
def test_something_is_evicted_and_the_newest_stays(case: Case):
    model = build("llama")
    ids, mask = text()
    trainless.patch(model, case.method, **case.parameters)
    _, sets, _ = recorded(model, ids, mask)
    stock = outputs(build("llama"), "llama")
    assert differs(outputs(model, "llama"), stock)
    for turns in sets.values():
        # Where the prompt is protected, the second token that is generated is one too many.
        assert len(turns[2 * case.protects][0][0]) < sum(CALLS[: 1 + 2 * case.protects])
        ages = torch.tensor([sum(CALLS[: i + 1]) for i in range(len(CALLS))])
        for call, rows in enumerate(turns):
            for row, heads in enumerate(rows):
                newest = int(ages[call]) - (22 - LENGTHS[row]) - 1
                assert all(kept[-1] == newest and kept == sorted(set(kept)) for kept in heads)
