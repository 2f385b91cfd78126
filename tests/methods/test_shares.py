"""One ratio for every evictor, tokens that were given and never go, and the draw as a baseline."""

import itertools

import pytest
import torch
from oracle import H2O, Random, SnapKV, Streaming, Tova, install, models, real_rows, replay
from oracle.random import drawn
from transformers import DynamicCache

import trainless
from trainless.kernels.draws import draws

CALLS = [14, 1, 1, 3, 1, 1, 1]
LENGTHS = [22, 17, 13]
RULES = {
    "h2o": lambda: H2O(0.1, 0.1, reduce="call"),
    "tova": lambda: Tova(0.5),
    "streaming": lambda: Streaming(0.5),
    "random": lambda: Random(0.5),
}
OWN = {
    "h2o": ("heavy", "recent"),
    "tova": ("capacity",),
    "streaming": ("sinks", "recent"),
    "random": ("capacity",),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _against(method, given, rule):
    """The patched model against the dense oracle: logits of every call, and what stays at the end."""
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    with install(model, rule):
        want = replay(model, None, ids, mask, CALLS)
    cache = DynamicCache()
    with trainless.patched(model, method, **given):
        got = replay(model, None, ids, mask, CALLS, cache)
    for a, b, real in zip(got, want, real_rows(mask, CALLS, 3), strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=1e-11)
    for layer, row, head in itertools.product(range(3), range(3), range(2)):
        assert cache.layers[layer].kept()[row][head] == rule.kept(layer, -1, row, head)
    return cache


@pytest.mark.parametrize("protect", ["none", "prompt"])
@pytest.mark.parametrize("ratio", [0.25, 0.6, None])
@pytest.mark.parametrize("method", RULES)
def test_against_the_oracle(method, ratio, protect):
    given = {"protect": protect} if ratio is None else {"ratio": ratio, "protect": protect}
    cache = _against(method, given, RULES[method]().shares(ratio, protect))
    for row, length in enumerate([14, 9, 5]):
        kept = cache.layers[0].kept()[row][0]
        if protect == "prompt":
            assert kept[:length] == list(range(length)), "the prompt stays"
            assert set(range(length + 2, length + 5)) <= set(kept), "so does a later turn"
        elif ratio is not None:
            assert len(kept) == max(1, int(ratio * length))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_snapkv_keeps_its_share(ratio):
    rule = SnapKV(ratio, window=32, pool=3)
    cache = _against("snapkv", {"ratio": ratio, "pool": 3}, rule)
    grown = sum(CALLS) - 14
    assert [len(r[0]) for r in cache.layers[1].kept()] == [max(1, int(ratio * n)) + grown for n in (14, 9, 5)]
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids, mask = models.left_padded([30, 21])
    with trainless.patched(model, "snapkv", ratio=ratio, pool=3):
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        chunks = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, prefill_chunk_size=7
        )
    assert torch.equal(whole, chunks)


@pytest.mark.parametrize("method", [*RULES, "snapkv"])
def test_a_ratio_of_one_is_the_identity(method):
    model = models.build("llama", dtype=torch.float32, exact=False)
    ids, mask = models.left_padded(LENGTHS)
    stock = replay(model, None, ids, mask, CALLS)
    with trainless.patched(model, method, ratio=1):
        assert all(
            torch.equal(a, b) for a, b in zip(replay(model, None, ids, mask, CALLS), stock, strict=True)
        )


@pytest.mark.parametrize("method", [*RULES, "snapkv"])
def test_a_ratio_stands_in_the_place_of_other_budgets(method, tmp_path):
    model = models.build("llama")
    for own in OWN.get(method, ("capacity",)):
        with pytest.raises(trainless.InputError, match=f"ratio.*in the place of {own}"):
            trainless.patch(model, method, ratio=0.5, **{own: 0.1 if own != "sinks" else 4})
    for wrong in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(trainless.InputError, match="ratio"):
            trainless.patch(model, method, ratio=wrong)
    with trainless.patched(model, method, ratio=0.5) as patch:
        said = patch.report().to_dict()["methods"][0]["parameters"]
        assert said["ratio"] == 0.5 and not set(OWN.get(method, ("capacity",))) & set(said)
        folder = patch.save(tmp_path / "saved")
    with trainless.patched(model, str(folder)) as again:  # what was saved can be read again
        assert again.bindings[0].method == patch.bindings[0].method


def test_only_rules_that_go_on_protect_the_prompt():
    with pytest.raises(trainless.InputError, match="protect"):
        trainless.patch(models.build("llama"), "snapkv", protect="prompt")
    with pytest.raises(trainless.InputError, match="prompt"):
        trainless.patch(models.build("llama"), "tova", protect="everything")


def test_draws_are_those_of_the_definition_and_fair():
    heads, places = torch.arange(3)[:, None], torch.arange(50)
    for seed in (0, 7, 2**63 - 1):
        found = draws((seed << 16) + 4, heads, places)
        want = [[drawn(seed, 4, h, n) for n in range(50)] for h in range(3)]
        assert torch.equal(found, torch.tensor(want, dtype=torch.float64))
    many = draws(0, heads, torch.arange(4000))
    assert (many.mean(1) - 0.5).abs().max() < 0.03 and (many.var(1) - 1 / 12).abs().max() < 0.01
    assert torch.corrcoef(many).fill_diagonal_(0).abs().max() < 0.06


@pytest.mark.parametrize("protect", ["none", "prompt"])
def test_a_row_draws_the_same_alone_and_in_a_batch(protect):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    with trainless.patched(model, "random", ratio=0.5, seed=3, protect=protect):
        cache = DynamicCache()
        replay(model, None, ids, mask, CALLS, cache)
        alone = DynamicCache()
        replay(model, None, ids[1:, 5:], None, [9, *CALLS[1:]], alone)
        assert alone.layers[1].kept()[0] == cache.layers[1].kept()[1]
    kept = []
    for seed in (0, 0, 1):
        with trainless.patched(model, "random", ratio=0.5, seed=seed):
            cache = DynamicCache()
            replay(model, None, ids, mask, CALLS, cache)
            kept.append(cache.layers[2].kept())
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("method", ["tova", "snapkv", "streaming", "random", "h2o"])
def test_defaults_act_on_an_ordinary_prompt(method):
    model = models.build("llama")
    with trainless.patched(model, method) as patch:
        model.generate(models.prompt(24), max_new_tokens=3, do_sample=False)
        assert patch.report().methods[0].acted > 0


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("random", {}),
        ("tova", {"ratio": 0.2, "protect": "prompt"}),
        ("snapkv", {}),
        ("streaming", {"ratio": 0.3}),
    ],
)
def test_verify_knows_shares_and_draws(method, given):
    model = models.build("llama", dtype=torch.float32, exact=False)
    with trainless.patched(model, method, **given) as patch:
        outcome = patch.verify()
        assert outcome, str(outcome)


@pytest.mark.parametrize("method", ["h2o", "tova", "streaming", "random"])
def test_a_turn_of_one_token_is_no_prompt_among_longer_turns_either(method):
    model = models.build("llama")
    small = {"h2o": {"heavy": 1, "recent": 1}, "tova": {"capacity": 2}, "random": {"capacity": 2}}
    given = {**small.get(method, {"sinks": 1, "recent": 1}), "protect": "prompt"}
    turns = [torch.arange(3, 11)[None], *(torch.tensor([[n]]) for n in (5, 6, 7, 20, 21, 22, 23, 24))]
    wide = torch.tensor([[0, 0, 0, 5], [8, 9, 10, 11]])
    with trainless.patched(model, method, **given), torch.no_grad():
        alone, cache = [], DynamicCache(config=model.config)
        for turn in turns:
            alone.append(model(turn, past_key_values=cache).logits[0, -1])
        cache, mask, found = DynamicCache(config=model.config), torch.zeros(2, 0).long(), []
        for turn in (turns[0].expand(2, -1), wide, *(turn.expand(2, -1) for turn in turns[2:])):
            mask = torch.cat([mask, turn != 0], 1).long()
            positions = (mask.cumsum(1) - 1)[:, -turn.shape[1] :]
            out = model(turn, attention_mask=mask, position_ids=positions, past_key_values=cache)
            found.append(out.logits[0, -1])
    for a, b in zip(alone, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
