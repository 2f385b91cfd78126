"""ZipVL of the oracle: the dynamic ratio by hand, a stock model on what is important, chunks, short prompts."""

import pytest
import torch

from . import ZipVL, install, models, replay
from .checks import CALLS, EXACT, LENGTHS, same

EVERY = [[range(14), range(9), range(5)]]
SOME = [[[2, 5, 11, 12, 13], [3, 7, 8], [1, 4]]]


def make(tau=0.9, bits=(4, 2), probes=SOME, **more):
    return ZipVL(tau, bits, probes, **{"last": 2, "interval": 3, "min_tokens": 0, **more})


def test_ratio_by_hand():
    a = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1], dtype=torch.float64)
    call = type("Call", (), {"site": type("Site", (), {"layer": 0})()})()
    for tau, want in ((0.3, 1), (0.499, 1), (0.6, 2), (0.85, 3), (0.95, 4), (1.0, 5)):
        rule = make(tau)
        rule.ratio_gaps[0] = []
        assert rule._size(call, a) == want, tau


@pytest.mark.parametrize("mode", ["quantise", "discard"])
def test_everything_important_at_16_bits_is_the_identity(mode):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    plain = replay(model, (), ids, mask, CALLS)
    rule = make(1.0, (16, 16), EVERY, last=14, mode=mode)
    for a, b in zip(replay(model, rule, ids, mask, CALLS), plain, strict=True):
        assert torch.equal(a, b)
    short = make(0.2, min_tokens=15, mode=mode)
    for a, b in zip(replay(model, short, ids, mask, CALLS), plain, strict=True):
        assert torch.equal(a, b)
    assert not any(short.blocks.values())


def test_important_tokens_by_the_definition():
    model, ids = models.build("llama"), models.prompt(20)
    rows = [4, 9, 13, 18, 19]
    with install(model, ()) as o:
        replay(model, None, ids)
    p = o.trace(0).before[0]  # later layers see what the first one left out
    a = [sum(p[h, i, j].item() for h in range(4) for i in rows) for j in range(20)]
    for tau in (0.3, 0.6, 0.9, 0.99):
        size, total = 0, 0.0
        for value in sorted(a, reverse=True):
            if total >= tau * sum(a):
                break
            size, total = size + 1, total + value
        mean = [a[j] / sum(i >= j for i in rows) for j in range(20)]
        order = sorted(range(20), key=lambda j: mean[j], reverse=True)
        added, within = make(tau, probes=[[rows]]), make(tau, probes=[[rows]], forced="within")
        replay(model, added, ids)
        replay(model, within, ids)
        assert added.chosen[0][0][2] == size
        assert added.important(0, 0, 0) == sorted({*order[:size], 18, 19})
        rest = [j for j in order if j < 18][: max(0, size - 2)]
        assert within.important(0, 0, 0) == sorted([*rest, 18, 19])


def test_more_is_important_as_tau_grows():
    model, ids = models.build("llama"), models.prompt(20)
    before: set[int] = set()
    for tau in (0.2, 0.5, 0.8, 0.95, 1.0):
        rule = make(tau, probes=[[range(20)]])
        replay(model, rule, ids)
        now = set(rule.important(0, 0, 0))
        assert before <= now
        before = now
    assert len(before) == 20


@torch.no_grad()
def test_prefill_is_a_stock_model_on_the_important_tokens():
    """One layer: the important tokens can be fed alone; the others pass the layer with an attention of zero."""
    model, ids = models.build("llama", layers=1), models.prompt(20)
    rule = make(0.7, (16, 16), [[range(20)]])
    got = replay(model, rule, ids)[0]
    left = rule.important(0, 0, 0)
    assert 4 < len(left) < 18
    alone = model(input_ids=ids[:, left], position_ids=torch.tensor([left])).logits
    torch.testing.assert_close(got[:, left], alone, **EXACT)
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    rest = [j for j in range(20) if j not in left]
    torch.testing.assert_close(got[:, rest], model(input_ids=ids).logits[:, rest], **EXACT)


@torch.no_grad()
def test_discarding_is_a_stock_model_without_the_others():
    model, ids = models.build("llama", layers=1), models.prompt(22)
    rule = make(0.7, probes=[[range(19)]], mode="discard", interval=100)
    got = replay(model, rule, ids, None, [19, 1, 2])
    left = rule.kept(0, 0, 0, 0)
    assert left == rule.kept(0, 0, 0, 1) == rule.important(0, 0, 0) and len(left) < 17
    for call, start, stop in ((1, 19, 20), (2, 20, 22)):
        fed = [*left, *range(19, stop)]
        alone = model(input_ids=ids[:, fed], position_ids=torch.tensor([fed])).logits
        torch.testing.assert_close(got[call], alone[:, start - stop :], **EXACT)
    assert rule.kept(0, 2, 0, 0) == [*left, 19, 20, 21]


RULES = {
    "quantise": lambda p: make(probes=p),
    "discard": lambda p: make(0.7, probes=p, mode="discard"),
    "within, blocks": lambda p: make(0.7, probes=p, forced="within", flush="blocks", interval=2),
    "layer scope": lambda p: make(0.8, probes=p, v_scope="layer", k_group=4),
    "short off": lambda p: make(probes=p, min_tokens=9),
    "short in the buffer": lambda p: make(probes=p, min_tokens=9, short="buffer", interval=7),
    "short, generated only": lambda p: make(0.7, probes=p, min_tokens=9, short="generated", mode="discard"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_padded_batch_is_its_rows_alone(name):
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = RULES[name](SOME)
    batch = replay(model, rule, ids, mask, CALLS)
    assert rule.margin() > 0
    for row, length in enumerate(LENGTHS):
        pads = 22 - length
        calls = [CALLS[0] - pads, *CALLS[1:]]
        alone = RULES[name]([[SOME[0][row]]])
        got = replay(model, alone, ids[row : row + 1, pads:], None, calls)
        same([b[row : row + 1, -n:] for b, n in zip(batch, calls, strict=True)], got, calls=calls)
        assert alone.packed(2, 0, 1) == rule.packed(2, row, 1)
        for call in range(len(CALLS)):
            assert alone.kept(1, call, 0, 0) == rule.kept(1, call, row, 0)


def test_rows_sum_to_one_among_important_tokens_and_to_zero_elsewhere():
    model = models.build("llama")
    ids, mask = models.left_padded(LENGTHS)
    rule = make(0.7)
    with install(model, rule) as o:
        replay(model, None, ids, mask, [14])
    for layer in range(3):
        p = o.trace(layer).after
        for row, start in enumerate((0, 5, 9)):
            found = [start + j for j in rule.important(layer, 0, row)] if row < 2 else None
            if found is None:
                continue
            rest = [j for j in range(14) if j not in found]
            sums = p[row].sum(-1)
            torch.testing.assert_close(sums[:, found], torch.ones_like(sums[:, found]), **EXACT)
            assert not p[row][:, rest].any() and not p[row][:, :, rest].any()


def test_later_chunks_are_settled_by_the_newest_row():
    model, ids = models.build("llama"), models.prompt(22)
    rule = make(0.6, mode="discard", probes=[[range(10)]])
    with install(model, rule) as o:
        replay(model, None, ids, None, [10, 1, 1, 1, 1, 5])
        step = o.trace(1, 3).before[0]
    assert [c for c, *_ in rule.chosen[1]] == [0, 3, 5]
    a = step[:, -1].sum(0)
    gone = [j for j in range(10) if j not in rule.kept(1, 0, 0, 0)]
    assert not a[gone].any()
    chunk = {j: a[j].item() for j in (10, 11, 12)}
    order, total, size = sorted(chunk, key=chunk.get, reverse=True), 0.0, 0
    while total < 0.6 * sum(chunk.values()):
        total, size = total + chunk[order[size]], size + 1
    assert rule.important(1, 3, 0) == sorted({*order[:size], 12})
    assert rule.kept(1, 3, 0, 0) == [*rule.kept(1, 2, 0, 0)[:-2], *rule.important(1, 3, 0)]
    assert rule.kept(1, 5, 0, 0)[-1] == 18
    # What is settled is settled: the prompt's tokens stay.
    first = rule.kept(1, 0, 0, 0)
    assert rule.kept(1, 5, 0, 0)[: len(first)] == first


def test_short_prompts():
    model, ids = models.build("llama"), models.prompt(12)
    calls = [6, 1, 1, 1, 1, 1, 1]
    for short, want in (
        ("off", {}),
        ("buffer", {6: range(12)}),
        ("generated", {3: [6, 7, 8], 6: [9, 10, 11]}),
    ):
        rule = make(min_tokens=7, short=short, interval=3 if short == "generated" else 12)
        replay(model, rule, ids, None, calls)
        found: dict[int, list[int]] = {}
        for block in rule.blocks[0]:
            found[block.call] = sorted([*found.get(block.call, []), *block.columns[0]])
        assert found == {call: list(columns) for call, columns in want.items()}, short
