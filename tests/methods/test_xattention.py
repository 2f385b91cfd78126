"""XAttention: what its scores are worth, which blocks it reads, what it reports and refuses."""

from __future__ import annotations

import pytest
import torch
from oracle import models

import trainless
from trainless.kernels import Blocks, block_sparse, visibility
from trainless.patchers.xattention import XAttention

GIVEN = {"threshold": 0.6, "stride": 2, "block": 4}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _inputs(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(length)
    return 2 * torch.randn(1, 4, length, 8, dtype=torch.float64), torch.randn(
        1, 2, length, 8, dtype=torch.float64
    )


def test_more_of_the_attention_reads_more_blocks_and_never_less_than_asked():
    query, key = _inputs(70)
    last = torch.zeros(1, 4, 18, 18, dtype=torch.bool)
    for threshold in (0.2, 0.5, 0.8, 0.95, 1.0):
        method = XAttention(threshold, stride=2, block=4)
        kept = method.chosen(query, key, 8**-0.5)
        score, rows = method.scores(query, key, 8**-0.5)
        assert (kept | ~last).all()
        torch.testing.assert_close(score.sum(-1), rows.expand(1, 4, -1))
        assert ((score * kept).sum(-1) >= threshold * rows - 1e-9).all()
        last = kept
    assert torch.equal(last, torch.ones(18, 18).tril().bool().expand_as(last))


def test_with_a_stride_of_one_the_scores_are_the_attention_itself():
    query, key = _inputs(30)
    score, rows = XAttention(0.5, stride=1, block=4).scores(query, key, 8**-0.5)
    z = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    p = torch.softmax(z.masked_fill(~torch.ones(30, 30).tril().bool(), -torch.inf), -1)
    whole = torch.nn.functional.pad(p, (0, 2, 0, 2)).view(1, 4, 8, 4, 8, 4).sum((3, 5))
    torch.testing.assert_close(score, whole)
    assert rows.tolist() == [4] * 7 + [2]


def test_a_long_matrix_of_tiles_is_scored_in_pieces(monkeypatch: pytest.MonkeyPatch):
    method, (query, key) = XAttention(0.5, stride=2, block=4), _inputs(61)
    whole = method.scores(query, key, 0.3)
    monkeypatch.setattr("trainless.patchers.xattention.TILES", 1)
    for got, want in zip(method.scores(query, key, 0.3), whole, strict=True):
        torch.testing.assert_close(got, want)


def test_blocks_may_begin_at_each_row_of_the_batch():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 40, 8, dtype=torch.float64) for n in (4, 2, 2))
    keys = torch.arange(40) >= torch.tensor([[0], [13]])
    index = torch.tensor([[0, -1, -1], [0, 1, -1], [2, 0, -1], [1, 3, 2], [4, 0, 2]])[None, None]
    seen = visibility(keys[:, None, None] & torch.ones(40, 40).tril().bool(), causal=False, lq=40, lk=40)
    got = block_sparse(q, k, v, Blocks(index, 8, start=torch.tensor([0, 13])), visibility=seen, scale=0.5)
    for row, start in enumerate((0, 13)):
        n = 40 - start
        alone = (t[row : row + 1, :, start:] for t in (q, k, v))
        own = Blocks(index[:, :, : -(-n // 8)].clone(), 8)
        want = block_sparse(*alone, own, visibility=visibility(None, causal=True, lq=n, lk=n), scale=0.5)
        torch.testing.assert_close(got[row : row + 1, :, start:], want)
        assert not got[row, :, :start].any()


def test_the_report_says_which_share_was_read():
    model, ids = models.build("llama", seed=1), models.prompt(60)
    shares = []
    for threshold in (0.3, 0.7):
        with trainless.patched(model, "xattention", **{**GIVEN, "threshold": threshold}) as patch:
            model(ids)
            shares.append(patch.report().methods[0].read)
            assert f"{shares[-1]:.1%} of the blocks" in str(patch.report())
            assert patch.report().methods[0].kernels == {"block_sparse/blocked": 3}
    # A third of 15 blocks of rows' causal blocks are the first and their own.
    assert 29 / 120 <= shares[0] < shares[1] < 1


@pytest.mark.parametrize("family", ["mistral", "bert", "t5", "gemma2"])
def test_layers_that_it_is_not_made_for_are_refused_by_name(family: str):
    with pytest.raises(trainless.NoMatch, match=r"xattention.*(window|causal|bias|soft cap)"):
        trainless.patch(models.build(family), "xattention")


def test_masks_that_it_is_not_made_for_are_refused_by_name():
    model, ids = models.build("llama"), models.prompt(24)
    trainless.patch(model, "xattention", **GIVEN)
    mask = torch.ones_like(ids)
    mask[0, 9] = 0
    with pytest.raises(trainless.Unsupported, match=r"xattention.*(padding|mask)"):
        model(ids, attention_mask=mask)
    both = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    with pytest.raises(trainless.Unsupported, match=r"xattention.*not causal"):
        model(ids, attention_mask=both)


def test_soft_caps_that_a_module_does_not_tell_of_are_refused_at_the_call():
    model = models.build("gemma2", dtype=torch.float32)
    caps = [layer.self_attn.attn_logit_softcapping for layer in model.model.layers]
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    with trainless.patched(model, "xattention", threshold=0.5, stride=2, block=4):
        for layer, cap in zip(model.model.layers, caps, strict=True):
            layer.self_attn.attn_logit_softcapping = cap
        with pytest.raises(trainless.Unsupported, match="soft-capped"):
            model(models.prompt(20))
