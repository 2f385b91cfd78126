"""A mask is described exactly, whatever it came as."""

import pytest
import torch
from kernel_cases import IDS, KINDS, SHAPES, Largest, make
from torch.nn.attention.flex_attention import create_block_mask

from trainless.errors import InputError
from trainless.kernels import visibility

SIMPLE = {
    "full": "full",
    "causal": "causal",
    "left": "causal + padding",
    "minimum": "causal + padding",
    "keys": "full + padding",
    "window": "causal + window",
    "local": "full + window",
}


def whole(seen, truth):
    found = seen.rows(0, seen.lq)
    return torch.ones_like(truth) if found is None else found.expand(truth.shape[0], truth.shape[1], -1, -1)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_read_back_exactly(kind, shape):
    case = make(kind, shape)
    seen = case.seen()
    assert torch.equal(whole(seen, case.truth), case.truth)
    assert torch.equal(~(case.truth.any(-1)), _or_false(seen.empty(), case.truth))
    assert torch.equal(seen.seen().expand(case.truth.shape[:3]), case.truth.sum(-1))
    for i0, i1 in ((0, seen.lq), (seen.lq // 2, seen.lq), (0, 1)):
        lo, hi = seen.span(i0, i1)
        assert not case.truth[:, :, i0:i1, :lo].any() and not case.truth[:, :, i0:i1, hi:].any()
    added = seen.bias_at(torch.arange(seen.lq))
    if kind == "additive":
        assert torch.equal(added, case.added.masked_fill(~case.truth, 0))
    else:
        assert added is None


def _or_false(empty, truth):
    return torch.zeros_like(truth[..., 0]) if empty is None else empty.expand(truth.shape[:3])


@pytest.mark.parametrize("kind", SIMPLE)
def test_structure_is_found(kind):
    assert make(kind, (2, 4, 2, 30, 30, 8)).seen().kind == SIMPLE[kind]


@pytest.mark.parametrize("kind", ["left", "keys", "minimum"])
@pytest.mark.parametrize("lq", [12, 700])
def test_one_entry_out_of_place_is_seen(kind, lq):
    """Structure is proved over the whole mask, not sampled."""
    truth = make(kind, (2, 2, 2, lq, lq, 8)).mask
    for i, j in ((lq - 2, 1), (lq // 3, lq // 4), (3, lq - 1)):
        mask = truth.clone()
        value = mask[1, 0, i, j]
        mask[1, 0, i, j] = ~value if mask.dtype == torch.bool else 0.0 if value < 0 else -torch.inf
        seen = visibility(mask, causal=True, lq=lq, lk=lq)
        assert not seen.structured
        expect = mask if mask.dtype == torch.bool else mask == 0
        assert torch.equal(whole(seen, expect), expect)


def test_a_finite_value_in_an_additive_mask_is_kept():
    mask = torch.zeros(1, 1, 300, 300).masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf)
    assert visibility(mask, causal=False, lq=300, lk=300).kind == "causal"
    mask[0, 0, 290, 5] = 1e-6
    seen = visibility(mask, causal=False, lq=300, lk=300)
    assert seen.additive and seen.bias_at(torch.tensor([290]))[0, 0, 0, 5] == pytest.approx(1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(30, 30), (4, 21), (9, 5)])
def test_counts_are_of_real_rows(kind, lengths):
    lq, lk = lengths
    case = make(kind, (2, 4, 2, lq, lk, 8))
    real = torch.rand(2, lq) < 0.7
    want = (case.truth.any(1) & real[:, :, None]).sum(1)
    assert torch.equal(case.seen(real).counts(2), want)
    assert torch.equal(case.seen().counts(2), case.truth.any(1).sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_gathered_per_head(kind):
    case = make(kind, (2, 4, 2, 17, 23, 8))
    heads, rows = torch.tensor([3, 1]), torch.tensor([0, 5, 16])
    index = torch.randint(23, (2, 2, 6))
    found = case.seen().columns(index, rows, heads)
    truth = case.truth.expand(-1, 4, -1, -1)[:, heads][:, :, rows]
    want = truth.gather(-1, index[:, :, None].expand(-1, -1, 3, -1))
    assert torch.equal(torch.ones_like(want) if found is None else found.expand_as(want), want)


def test_a_flex_mask_is_recognised_or_evaluated():
    first = torch.tensor([0, 5])

    def padded(b, h, q, k):
        return (q >= k) & (k >= first[b])

    def documents(b, h, q, k):
        return (q >= k) & (q // 8 == k // 8)

    row, key = torch.arange(40)[:, None], torch.arange(40)[None]
    seen = visibility(create_block_mask(padded, 2, None, 40, 40, device="cpu"), causal=False, lq=40, lk=40)
    assert seen.kind == "causal + padding"
    truth = ((row >= key)[None] & (key[None] >= first[:, None, None]))[:, None]
    assert torch.equal(whole(seen, truth), truth)
    mask = create_block_mask(documents, 1, None, 40, 40, device="cpu")
    seen = visibility(mask, causal=False, lq=40, lk=40)
    assert seen.kind == "dense mask"
    truth = ((row >= key) & (row // 8 == key // 8))[None, None]
    assert torch.equal(whole(seen, truth), truth)
    assert torch.equal(seen.counts(1)[0], truth[0, 0].sum(0))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "additive"])
def test_a_pattern_comes_on_top(kind):
    case = make(kind, (2, 4, 2, 6, 15, 8))
    seen = case.seen().restrict(lambda q, k: (q - k) % 3 == 0)
    row, key = torch.arange(6)[:, None] + 9, torch.arange(15)[None]
    truth = case.truth & ((row - key) % 3 == 0)
    assert torch.equal(whole(seen, truth), truth)
    assert torch.equal(whole(seen.row_of_batch(1), truth[1:]), truth[1:])


def test_a_mask_changed_in_place_is_read_again():
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    assert visibility(mask, causal=False, lq=9, lk=9).kind == "causal"
    mask[..., :2] = False
    seen = visibility(mask, causal=False, lq=9, lk=9)
    assert seen.kind == "causal + padding" and torch.equal(whole(seen, mask), mask)


def test_a_mask_as_long_as_a_static_cache_is_cut():
    mask = torch.ones(1, 1, 4, 32, dtype=torch.bool).tril(6)
    seen = visibility(mask, causal=False, lq=4, lk=10)
    assert seen.kind == "causal" and torch.equal(whole(seen, mask[..., :10]), mask[..., :10])


def test_recognising_allocates_no_second_mask():
    mask = torch.ones(1, 1, 3000, 3000, dtype=torch.bool).tril()
    with Largest() as largest:
        assert visibility(mask, causal=False, lq=3000, lk=3000).kind == "causal"
    assert largest.elements < 3000 * 3000 / 4


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (torch.ones(1, 1, 3, 9, dtype=torch.bool), "(1, 1, 3, 9)"),
        (torch.ones(1, 1, 4, 8, dtype=torch.bool), "(1, 1, 4, 8)"),
        (torch.ones(1, 1, 4, 9, dtype=torch.int64), "int64"),
        ("causal", "str"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, named):
    with pytest.raises(InputError) as caught:
        visibility(mask, causal=False, lq=4, lk=9)
    assert named in str(caught.value)


def test_a_window_and_real_rows_are_checked():
    with pytest.raises(InputError, match="window=0"):
        visibility(None, causal=True, lq=4, lk=4, window=0)
    with pytest.raises(InputError, match="real"):
        visibility(None, causal=True, lq=4, lk=4, real=torch.ones(1, 5, dtype=torch.bool))
