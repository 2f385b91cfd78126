"""KVzip: scores, kept pairs and the steps after them against an independent simulation, and what is refused."""

import pytest
import torch
from oracle import Kept, KvQuant, KVzip, decoder_zoo, models, real_rows, replay, vlms
from transformers import DynamicCache

import trainless
from trainless.cache import chosen_pairs
from trainless.hosts.transformers.replays import Replays
from trainless.patch.binding import bind
from trainless.preview.memory import estimate
from trainless.recipes import resolve

CALLS = [14, 1, 1, 3, 1]
LENGTHS = (14, 9, 5)


@pytest.mark.parametrize(
    "given",
    [
        {"ratio": 0.4, "sinks": 2},
        {"ratio": 0.5, "sinks": 1, "chunk": 4},
        {"ratio": 0.5, "sinks": 0, "pool": "layer", "floor": 0.3},
        {"ratio": 0.45, "pool": "head", "sinks": 1},
    ],
    ids=lambda g: g.get("pool", f"model-{g.get('chunk', '')}"),
)
def test_equals_the_simulation(given):
    model = models.build("llama")
    ids, mask = models.left_padded([sum(CALLS) - 14 + n for n in LENGTHS])
    rule = KVzip(**given)
    want = replay(model, rule, ids, mask, CALLS)
    with trainless.patched(model, "kvzip", **given) as patch:
        cache = DynamicCache(config=model.config)
        got = replay(model, None, ids, mask, CALLS, cache)
        assert patch.report().methods[0].acted
    for layer in range(3):
        for row in range(3):
            assert cache.layers[layer].kept()[row] == [rule.kept(layer, -1, row, head) for head in range(2)]
    for a, b, real in zip(got, want, real_rows(mask, CALLS, 3), strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=1e-10)


def test_what_is_packed_is_what_was_left():
    """Beside kvquant: the prompt is whole until it has been read again, then it loses pairs, then it is packed."""
    model, given = models.build("llama"), {"ratio": 0.5, "sinks": 1}
    ids = models.prompt(21)
    rule = KVzip(**given)
    replay(model, rule, ids, None, CALLS)
    sets = {
        layer: [[[rule.kept(layer, call, 0, head) for head in range(2)]] for call in range(len(CALLS))]
        for layer in range(3)
    }
    left, codes = Kept(sets), KvQuant(group=4, residual=3)
    codes.evictor = left
    want = replay(model, [codes, left], ids, None, CALLS)
    packed = {"use": "kvquant", "with": {"group": 4, "residual": 3}}
    with trainless.patched(model, [{"use": "kvzip", "with": given}, packed]):
        got = replay(model, None, ids, None, CALLS)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_second_reading_leaves_no_trace():
    """Where all pairs stay although it was made: bits, states that come out, counts, and the cache are the stock ones."""
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids, mask = models.left_padded(LENGTHS)
    cache, stock = DynamicCache(config=model.config), DynamicCache(config=model.config)
    want = model(ids, attention_mask=mask, past_key_values=stock, output_hidden_states=True)
    with trainless.patched(model, "kvzip", ratio=1 - 1e-9) as patch:
        got = model(ids, attention_mask=mask, past_key_values=cache, output_hidden_states=True)
        report = patch.report().methods[0]
        assert report.fired == 3 and report.acted == 0
        assert cache.layers[0].done and cache.get_seq_length() == ids.shape[1]
    assert torch.equal(got.logits, want.logits) and len(got.hidden_states) == len(want.hidden_states)
    for a, b in zip(cache.layers, stock.layers, strict=True):
        assert torch.equal(a.keys[:, :, : ids.shape[1]], b.keys)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_images_are_read_again(family):
    """Rows of a padded batch with images, at positions of three axes in one of them, are what they are alone."""
    model = vlms.build(family)
    given = vlms.batch(model, family)
    calls = [given.prompt, 1, 2]
    with trainless.patched(model, "kvzip", ratio=0.5, sinks=1):
        whole = vlms.replay(model, None, given, calls)
        one = vlms.row(model, given, 1)
        pads = given.ids.shape[1] - one.ids.shape[1]
        alone = vlms.replay(model, None, one, [calls[0] - pads, *calls[1:]])
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a[1:2, -b.shape[1] :], b, rtol=0, atol=1e-10)


def test_positions_follow_the_furthest_of_all_axes():
    replays = Replays(models.build("llama").model)
    replays.runtimes = []
    exists = torch.tensor([[False, True, True, True, True]])
    axes = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 1, 1, 4], [0, 0, 1, 2, 3]])[:, None]
    columns, there = torch.tensor([[2, 3, 0]]), torch.tensor([[True, True, False]])
    found = replays._continued(axes, exists, columns, there)
    assert found[:, 0, :2].tolist() == [[5, 5], [5, 5], [5, 6]]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("deepseek_v3", "made from what is cached"),
        ("falcon_h1", "LinearAttentionAndFullAttentionLayer"),
        ("qwen3_next", "LinearAttentionLayer"),
    ],
)
def test_models_that_cannot_be_read_again_are_refused_when_patching(kind, reason):
    model = decoder_zoo.build(kind)
    said = trainless.explain(model, "kvzip")
    assert not said.ok and reason in said.problems[0].message
    with pytest.raises(trainless.TrainlessError, match=reason):
        trainless.patch(model, "kvzip")


def test_calls_that_cannot_be_read_again_are_refused():
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids = models.prompt(12)
    with trainless.patched(model, "kvzip"):
        with pytest.raises(trainless.Unsupported, match="mask made by hand"):
            model(ids, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool).tril())
        with pytest.raises(trainless.Unsupported, match=r"kvzip.*assisted decoding"):
            model.generate(ids, max_new_tokens=3, do_sample=False, prompt_lookup_num_tokens=2)
        with pytest.raises(trainless.Unsupported, match=r"kvzip.*static cache"):
            model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
        with pytest.raises(trainless.InputError, match=r"position 6\d\d, .* chunk smaller"):
            model(models.prompt(320))
    with (
        trainless.patched(model, "act", skip_layers=0),
        pytest.raises(trainless.Conflict, match="second time"),
    ):
        trainless.patch(model, "kvzip")


def test_the_number_of_pairs_is_exact_and_grows_by_inclusion():
    generator = torch.Generator().manual_seed(0)
    # Few values, so that most choices are among equals.
    scores = [torch.randint(0, 4, (1, 2, 30), generator=generator) / 4 for _ in range(3)]
    before = None
    for ratio in (0.2, 0.33, 0.5, 0.71, 1.0):
        kept = chosen_pairs(scores, None, ratio, 2, "model")
        assert sum(int(k.sum()) for k in kept) == round(ratio * 180)
        assert all(bool(k[0, :, [0, 1, 29]].all()) for k in kept)
        if before is not None:
            assert all(bool((a <= b).all()) for a, b in zip(before, kept, strict=True))
        before = kept
    flat = [torch.zeros(1, 1, 10)]
    assert chosen_pairs(flat, None, 0.4, 1, "model")[0][0, 0].nonzero()[:, 0].tolist() == [0, 7, 8, 9]


def test_verify_follows_every_call():
    with trainless.patched(models.build("llama", dtype=torch.float32, exact=False), "kvzip") as patch:
        found = patch.verify()
    assert found and "raises" not in str(found), str(found)


def test_a_prompt_whose_call_ends_elsewhere_is_not_passed_over():
    """Whoever calls the decoder's forward itself goes past the hook that has the prompt read again."""
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids, cache = models.prompt(21), DynamicCache(config=model.config)
    with trainless.patched(model, "kvzip"):
        model.model.forward(ids, past_key_values=cache)
        with pytest.raises(trainless.Unsupported, match="was not read a second time"):
            model.model.forward(ids[:, :1], past_key_values=cache)


def test_the_report_counts_the_mean_of_heads_that_differ():
    model, prompt = models.build("llama", dtype=torch.float32, exact=False), 40
    with trainless.patched(model, "kvzip", ratio=0.5, sinks=0) as patch:
        model(models.prompt(prompt))
        layers = patch.report().methods[0].layers
    kept = [layer["tokens_kept"] for layer in layers]
    assert abs(sum(kept) - prompt // 2 * len(kept)) <= len(kept) / 2  # each is rounded


def test_the_estimate_is_near_what_heads_that_differ_hold():
    model, prompt = models.build("llama", dtype=torch.float32, exact=False), 250
    for use, given in (("kvzip", {"ratio": 0.5}), ("h2o", {"ratio": 0.5, "budgets": "adaptive"})):
        found = estimate(*bind(model, resolve(use, given)), [prompt])
        with trainless.patched(model, use, **given) as patch:
            model(models.prompt(prompt))
            held = sum(layer["bytes_kept"] for layer in patch.report().methods[0].layers)
        assert found is not None and found.points[0].patched == pytest.approx(held, rel=0.05), use
