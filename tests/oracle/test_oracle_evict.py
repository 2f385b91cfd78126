"""The evicting rules of the oracle against shortened sequences, stock attentions and recorded sets."""

import pytest
import torch

from . import H2O, Kept, Streaming, float64_math, install, models, replay
from .checks import CALLS, EXACT, LENGTHS, same


@pytest.mark.parametrize("positions", ["real", "rolled"])
@pytest.mark.parametrize("rule", [H2O, Streaming])
def test_budget_of_at_least_the_length_is_the_identity(rule, positions):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    made = H2O(10, 12, positions=positions) if rule is H2O else Streaming(recent=22, positions=positions)
    same(replay(model, made, ids, mask, CALLS), replay(model, (), ids, mask, CALLS), mask)


@pytest.mark.parametrize("family", models.FULL_ATTENTION)
@pytest.mark.parametrize("positions", ["real", "rolled"])
@torch.no_grad()
def test_streaming_is_the_stock_model_on_what_is_left(family, positions):
    """With one layer, keys and values know no context: the kept tokens can be fed afresh."""
    model = models.build(family, layers=1)
    ids = models.prompt(22)
    logits = replay(model, Streaming(recent=5, sinks=2, positions=positions), ids, None, [14, 1, 1, 4])
    for call, stop, size in ((1, 15, 1), (2, 16, 1), (3, 20, 4)):
        start = stop - size
        left = [0, 1, *range(start - 5, start), *range(start, stop)]
        where = torch.tensor([left if positions == "real" else list(range(len(left)))])
        want = model(input_ids=ids[:, left], position_ids=where, attention_mask=torch.ones(1, len(left)))
        torch.testing.assert_close(logits[call], want.logits[:, -size:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_rolled_equals_real_until_something_is_evicted(family):
    model, ids = models.build(family), models.prompt(22)
    real, rolled = (
        replay(model, H2O(10, 6, positions=p), ids, None, [14, 1, 1, 1, 1, 1]) for p in ("real", "rolled")
    )
    same(real[:4], rolled[:4], calls=[14, 1, 1, 1])
    assert (real[5] - rolled[5]).abs().max() > 1e-4


def test_without_heavy_tokens_h2o_is_a_sliding_window():
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    same(
        replay(model, H2O(0, 6), ids, mask, CALLS),
        replay(model, Streaming(recent=6, sinks=0), ids, mask, CALLS),
        mask,
    )


@torch.no_grad()
def test_h2o_keeps_the_largest_column_sums_of_the_stock_attention():
    model, ids = models.build("llama"), models.prompt(20)
    rule = H2O(4, 3)
    replay(model, rule, ids)
    model.set_attn_implementation("eager")
    with float64_math():
        attentions = model(ids, output_attentions=True).attentions
    for layer, p in enumerate(attentions):
        c = p[0].sum(dim=1).view(2, 2, 20).sum(dim=1)
        torch.testing.assert_close(rule.turns[layer][0].score[0], c, **EXACT)
        assert c.sum().item() == pytest.approx(4 * 20, abs=1e-9)
        for head in range(2):
            best = set(c[head, :17].topk(4).indices.tolist())
            assert rule.kept(layer, 0, 0, head) == sorted(best | {17, 18, 19})


def test_h2o_goes_on_scoring_and_evicting():
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = H2O(3, 2)
    with install(model, rule) as o:
        replay(model, None, ids, mask, CALLS)
        for layer in range(3):
            running = torch.zeros(3, 2, 0, dtype=torch.float64)
            for call in range(len(CALLS)):
                turn = rule.turns[layer][call]
                p = o.trace(layer, call).before * turn.real[:, -CALLS[call] :][:, None, :, None]
                mass = p.sum(2).view(3, 2, 2, -1).sum(2)
                running = mass + torch.nn.functional.pad(running, (0, CALLS[call]))
                assert not (turn.kept & ~turn.real[:, None]).any()
                assert turn.kept[..., -1].all()
                if call:
                    old = rule.turns[layer][call - 1].kept
                    assert not (turn.kept[..., : old.shape[-1]] & ~old).any()
                for row in range(3):
                    assert (turn.kept[row].sum(-1) == min(5, int(turn.real[row].sum()))).all()
                torch.testing.assert_close(turn.score, running, **EXACT)
    assert rule.margin() > 0


def test_fractions_are_of_the_rows_own_prompt_and_frozen():
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = H2O(0.3, 0.2)
    replay(model, rule, ids, mask, CALLS)
    for row, prompt in enumerate((14, 9, 5)):
        want = max(1, int(0.3 * prompt) + int(0.2 * prompt))
        for call in range(len(CALLS)):
            assert len(rule.kept(0, call, row, 1)) == want


def test_kept_sets_nest_as_the_budget_grows():
    model, ids = models.build("llama"), models.prompt(22)
    before: set[int] = set()
    for heavy in range(0, 12, 2):
        rule = H2O(heavy, 3)
        replay(model, rule, ids)
        now = set(rule.kept(0, 0, 0, 0))
        assert before < now
        before = now


def test_ties_go_to_the_newer_token_and_the_newest_stays():
    model = models.build("llama", peak=0.0)  # every row is uniform; scores decide
    rule = H2O(3, 0, normalise=True, layers=[0])
    ids, mask = models.left_padded([6, 4])
    replay(model, rule, ids, mask, [6])
    # c_j / n_j falls with j under uniform causal attention: old tokens win, the newest has its place.
    assert rule.kept(0, 0, 0, 0) == [0, 1, 5] and rule.kept(0, 0, 1, 0) == [0, 1, 3]
    score = torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    call = type("Call", (), {"site": type("Site", (), {"name": "x"})()})()
    rule._state["x"] = {"lengths": torch.tensor([6])}
    assert rule.choose(call, 0, 0, list(range(6)), score)[0] == {1, 2, 5}
    rule.heavy = 4
    assert rule.choose(call, 0, 0, list(range(6)), score)[0] == {1, 2, 4, 5}


@pytest.mark.parametrize("gqa", ["sum", "first", "max", "mean"])
def test_groups_share_scores(gqa):
    model, ids = models.build("llama"), models.prompt(18)
    rule = H2O(4, 3, gqa=gqa)
    with install(model, rule) as o:
        replay(model, None, ids)
    per_head = o.trace(0).before[0].sum(1).view(2, 2, 18)
    want = {
        "sum": per_head[:, 0] + per_head[:, 1],
        "first": per_head[:, 0],
        "max": torch.maximum(per_head[:, 0], per_head[:, 1]),
        "mean": (per_head[:, 0] + per_head[:, 1]) / 2,
    }[gqa]
    torch.testing.assert_close(rule.turns[0][0].score[0], want, **EXACT)


@pytest.mark.parametrize("positions", ["real", "rolled"])
def test_recorded_sets_replay_to_the_same_logits(positions):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = H2O(3, 3, positions=positions)
    want = replay(model, rule, ids, mask, CALLS)
    sets = {
        layer: [[[rule.kept(layer, c, r, h) for h in range(2)] for r in range(3)] for c in range(len(CALLS))]
        for layer in range(3)
    }
    same(replay(model, Kept(sets, positions), ids, mask, CALLS), want, mask)
    sets[0][1][0][0] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(AssertionError, match="were not there"):
        replay(model, Kept(sets, positions), ids, mask, CALLS)
