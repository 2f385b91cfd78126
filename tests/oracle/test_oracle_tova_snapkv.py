"""TOVA and SnapKV of the oracle: kept sets from the stock attention, by hand on tiny scores, nesting."""

import pytest
import torch

from . import Kept, SnapKV, Streaming, Tova, float64_math, install, models, replay
from .checks import CALLS, EXACT, LENGTHS, same


def stock_attention(model, ids):
    model.set_attn_implementation("eager")
    with torch.no_grad(), float64_math():
        found = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize(
    "rule",
    [lambda: Tova(22), lambda: Tova(22, shared=False), lambda: SnapKV(22, 4), lambda: SnapKV(1.0, 4)],
)
def test_capacity_of_at_least_the_length_is_the_identity(rule):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    same(replay(model, rule(), ids, mask, CALLS), replay(model, (), ids, mask, CALLS), mask)


@pytest.mark.parametrize(
    "rule",
    [lambda: Tova(6), lambda: Tova(0.4, shared=False), lambda: SnapKV(7, 3, 3), lambda: SnapKV(0.5, 2, 3)],
)
def test_a_padded_batch_is_its_rows_alone(rule):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    batch = replay(model, rule(), ids, mask, CALLS)
    for row, length in enumerate(LENGTHS):
        pads = 22 - length
        calls = [CALLS[0] - pads, *CALLS[1:]]
        alone = replay(model, rule(), ids[row : row + 1, pads:], None, calls)
        same([b[row : row + 1, -n:] for b, n in zip(batch, calls, strict=True)], alone, calls=calls)


@pytest.mark.parametrize("shared", [True, False])
def test_tova_keeps_what_the_last_row_of_the_stock_attention_likes(shared):
    model, ids = models.build("llama"), models.prompt(20)
    rule = Tova(6, shared)
    replay(model, rule, ids)
    for layer, p in enumerate(stock_attention(model, ids)):
        last = p[0, :, -1]
        for head in range(2):
            mean = last.mean(0) if shared else last[2 * head : 2 * head + 2].mean(0)
            want = sorted({*mean[:19].topk(5).indices.tolist(), 19})
            assert rule.kept(layer, 0, 0, head) == want


def test_tova_evicts_one_token_a_step_and_keeps_the_newest():
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = Tova(6)
    with install(model, rule) as o:
        replay(model, None, ids, mask, [14, 1, 1, 1, 1])
        for layer in range(3):
            for call in range(5):
                turn = rule.turns[layer][call]
                assert torch.equal(turn.kept[:, 0], turn.kept[:, 1])
                for row, prompt in enumerate((14, 9, 5)):
                    kept = rule.kept(layer, call, row, 0)
                    assert len(kept) == min(6, prompt + call) and kept[-1] == prompt + call - 1
                if call:
                    before = torch.nn.functional.pad(rule.turns[layer][call - 1].kept, (0, 1), value=True)
                    gone = before & ~turn.kept
                    p = o.trace(layer, call).before[:, :, -1].mean(1)
                    # The oldest of equals goes; here nothing is equal: it is the smallest but the newest.
                    for row in range(3):
                        if gone[row, 0].any():
                            column = int(gone[row, 0].nonzero())
                            there = before[row, 0].clone()
                            there[-1] = False
                            assert p[row, column] == p[row][there].min()


def test_tova_by_hand():
    score = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.1, 0.0], dtype=torch.float64)
    call = type("Call", (), {"site": type("Site", (), {"name": "x"})()})()
    for capacity, want in ((1, {5}), (2, {1, 5}), (3, {1, 3, 5}), (4, {1, 2, 3, 5}), (5, {1, 2, 3, 4, 5})):
        rule = Tova(capacity)
        rule._state["x"] = {"lengths": torch.tensor([6])}
        assert rule.choose(call, 0, 0, list(range(6)), score)[0] == want
    rule = Tova(0.5)
    rule._state["x"] = {"lengths": torch.tensor([6])}
    assert rule.choose(call, 0, 0, list(range(6)), score)[0] == {1, 3, 5}


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("pool", [1, 5])
def test_snapkv_pools_the_window_rows_of_the_stock_attention(pooling, pool):
    model, ids = models.build("llama"), models.prompt(20)
    rule = SnapKV(9, 4, pool, pooling)
    replay(model, rule, ids)
    for layer, p in enumerate(stock_attention(model, ids)):
        for head in range(2):
            c = p[0, 2 * head : 2 * head + 2, 16:, :16].sum(dim=1).mean(dim=0).tolist()
            half = pool // 2
            around = [[c[k] for k in range(j - half, j + half + 1) if 0 <= k < 16] for j in range(16)]
            pooled = [sum(a) / pool if pooling == "avg" else max(a) for a in around]
            torch.testing.assert_close(
                rule.turns[layer][0].score[0, head, :16], torch.tensor(pooled, dtype=torch.float64), **EXACT
            )
            want = sorted(range(16), key=lambda j: (pooled[j], j), reverse=True)[:5]
            assert rule.kept(layer, 0, 0, head) == sorted([*want, 16, 17, 18, 19])


def test_snapkv_chooses_once():
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = SnapKV(7, 3)
    replay(model, rule, ids, mask, CALLS)
    for layer in range(3):
        for row, prompt in enumerate((14, 9, 5)):
            first = rule.kept(layer, 0, row, 1)
            assert len(first) == min(7, prompt)
            for call in range(1, len(CALLS)):
                new = sum(CALLS[: call + 1]) - CALLS[0]
                assert rule.kept(layer, call, row, 1) == [*first, *range(prompt, prompt + new)]


def test_snapkv_without_a_choice_is_a_window():
    model = models.build("llama")
    ids = models.prompt(14)
    same(
        replay(model, SnapKV(4, 9), ids, None, [12, 1, 1]),
        replay(model, SnapKV(4, 4), ids, None, [12, 1, 1]),
        calls=[12, 1, 1],
    )
    rule, window = SnapKV(4, 4), Streaming(recent=4, sinks=0)
    replay(model, rule, ids)
    replay(model, window, ids)
    assert rule.kept(0, 0, 0, 0) == window.kept(0, 0, 0, 0) == [10, 11, 12, 13]


def test_order_of_pooling_matters_for_the_maximum_only():
    model, ids = models.build("llama"), models.prompt(20)
    for pooling, equal in (("avg", True), ("max", False)):
        scores = []
        for first in (False, True):
            rule = SnapKV(9, 4, 3, pooling, pool_first=first)
            replay(model, rule, ids)
            scores.append(rule.turns[0][0].score)
        assert torch.allclose(*scores, rtol=0, atol=1e-12) == equal


@pytest.mark.parametrize("make", [Tova, lambda n: Tova(n, shared=False), lambda n: SnapKV(n, 3)])
def test_kept_sets_nest_as_the_budget_grows(make):
    model, ids = models.build("llama"), models.prompt(22)
    before: set[int] = set()
    for capacity in range(4, 20, 3):
        rule = make(capacity)
        replay(model, rule, ids)
        now = set(rule.kept(0, 0, 0, 0))
        assert before < now and len(now) == capacity
        before = now


@pytest.mark.parametrize("positions", ["real", "rolled"])
def test_recorded_sets_replay_to_the_same_logits(positions):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    for rule in (Tova(6, False, positions), SnapKV(7, 3, positions=positions)):
        want = replay(model, rule, ids, mask, CALLS)
        every = range(len(CALLS))
        sets = {
            layer: [[[rule.kept(layer, c, r, h) for h in range(2)] for r in range(3)] for c in every]
            for layer in range(3)
        }
        same(replay(model, Kept(sets, positions), ids, mask, CALLS), want, mask)
