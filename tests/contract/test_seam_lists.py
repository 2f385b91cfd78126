"""Patterns given as listed blocks and spans: the kernel that computes nothing else, and the dense rule elsewhere."""

import pytest
import torch

import trainless
from trainless import seams
from trainless.kernels import Blocks, Spans

from .reference import attention_of, softmax_over
from .test_seams import _logits, _run
from .tools import EXACT, build, same, wide
from .toys import near, registered, toy

CALLS = [20, 1, 1]
SPAN = [3, 5, 9, 40]


def _lists(b, lq, lk, heads=4):
    """int64 (b, heads, row blocks, key blocks), a list for each row of the batch and each head; -1 at places."""
    rows, keys = -(-lq // 16), -(-lk // 16)
    index = torch.arange(keys).expand(b, heads, rows, keys).clone()
    index[:, 1::2, -1, 0] = -1  # odd heads lose the first block in the last block of rows
    if b > 1:
        index[1, 0, :, -1] = -1
    return index


def _blocks(call):
    b, _, _, lq, lk = call.shape
    return Blocks(_lists(b, lq, lk), 16)


def _spans(call):
    return Spans(torch.tensor(SPAN), sinks=2)


def _allowed(name, b, lq, lk):
    """bool (b, 4, lq, lk), pair by pair."""
    found = torch.zeros(b, 4, lq, lk, dtype=torch.bool)
    index = _lists(b, lq, lk)
    for n in range(b):
        for head in range(4):
            for i in range(lq):
                for j in range(lk):
                    gap = i + lk - lq - j
                    if name == "blocks":
                        found[n, head, i, j] = j // 16 in index[n, head, i // 16].tolist()
                    else:
                        found[n, head, i, j] = gap >= 0 and (gap < SPAN[head] or j < 2)
    return found


def _dense(name, more=None, statistic=None):
    def attention(module, query, key, value, seen, scaling, kwargs):
        z, cap = _logits(query, key, scaling), kwargs.get("softcap")
        z = z if cap is None else cap * torch.tanh(z / cap)
        b, _, lq, lk = seen.shape
        if not (statistic and lq == 1):
            seen = seen & _allowed(name, b, lq, lk)
        if more is not None:
            seen = seen & more(torch.arange(lq)[:, None] + lk - lq, torch.arange(lk)[None])
        return softmax_over(z, seen) @ value

    return attention


MAKE = {"blocks": _blocks, "spans": _spans}


def _method(name, **given):
    return toy("lists", lambda site: [seams.Pattern(lambda call, *_: MAKE[name](call), **given)])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "single"])
def test_the_kernel_is_reached_and_exact(name, family, padded):
    if family == "gemma2" and not padded:
        pytest.skip("one shape for the soft-cap")
    model = build(family)
    with attention_of(model, _dense(name)):
        want = _run(model, padded, CALLS)
    with registered(_method(name)), trainless.patched(model, "toy_lists") as patch, wide(model):
        same(_run(model, padded, CALLS), want, EXACT)
        report = patch.report().methods[0]
        if (name, family) == ("spans", "gemma2"):  # masks with a window of their own may leave the dense rule
            assert report.kernels["block_sparse/blocked"] >= 1 and report.kernels["rows"] == 6
        else:
            assert report.kernels == {"block_sparse/blocked": 3, "rows": 6} and report.acted == 9
        assert patch.verify()


@pytest.mark.parametrize("name", MAKE)
def test_beside_another_pattern_or_statistics_the_rule_is_the_same(name):
    model = build("llama")
    with attention_of(model, _dense(name, near)):
        want = _run(model, True, CALLS)
    close = toy("near", lambda site: [seams.Pattern(lambda call, stats, state: seams.Pairs(near))])
    watch = toy("watch", lambda site: [seams.Observe(lambda *_: None, needs={"lse", "column_max"})])
    for company, said in ((close, "another pattern"), (watch, "statistics or an edit")):
        if company is watch:
            with attention_of(model, _dense(name)):
                want = _run(model, True, CALLS)
        with registered(_method(name), company), trainless.patched(model, "toy_lists") as patch:
            with trainless.patched(model, company.name):
                same(_run(model, True, CALLS), want, EXACT)
                report = patch.report().methods[0]
        assert not any(kernel.startswith("block_sparse") for kernel in report.kernels)
        assert any(f"block_sparse: the call has {said}" in why for why in report.reasons.values())


@pytest.mark.parametrize("name", MAKE)
def test_chosen_from_statistics(name):
    """A dynamic pattern in the prefill: statistics first, then the kernel."""
    model = build("llama")
    with attention_of(model, _dense(name, statistic=True)):
        want = _run(model, True, CALLS)
    chosen = _method(
        name, needs=lambda call, state: {"row_entropy"} if call.fresh else (),
        statistics=frozenset({"row_entropy"}), lookahead=True,
    )  # fmt: skip
    with registered(chosen), trainless.patched(model, "toy_lists") as patch:
        same(_run(model, True, CALLS), want, EXACT)
        assert patch.report().methods[0].kernels["block_sparse/blocked"] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda call: Blocks(torch.zeros(1, 1, 5, 1, dtype=torch.int64), 16), "toy_lists: index"),
        (lambda call: Blocks(torch.zeros(1, 1, 2, 1, dtype=torch.int64), 10), "toy_lists: size=10"),
        (lambda call: Blocks(torch.full((1, 1, 2, 1), 7), 16), "toy_lists: key blocks 7 to 7"),
        (lambda call: Spans(torch.tensor([1, 2])), "toy_lists: span"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, said):
    model = build("llama", layers=1)
    wrong = toy("lists", lambda site: [seams.Pattern(lambda call, *_: given(call))])
    with registered(wrong), trainless.patched(model, "toy_lists"):
        with pytest.raises(trainless.InputError, match=said):
            _run(model, False, [20])


def test_spans_where_nothing_is_causal_are_refused():
    model = build("bert")
    spans = toy("lists", lambda site: [seams.Pattern(lambda call, *_: _spans(call))])
    with registered(spans), trainless.patched(model, "toy_lists"):
        with pytest.raises(trainless.InputError, match="toy_lists: spans reach back from each row"):
            model(torch.arange(1, 21)[None])


@pytest.mark.parametrize("kind", ["spans", "pairs"])
def test_a_cache_that_has_dropped_keys_is_refused_by_name(kind):
    model = build("llama", layers=1)
    pairs = toy("lists", lambda site: [seams.Pattern(lambda *_: seams.Pairs(lambda q, k: q - k < 4))])
    with registered(_method("spans") if kind == "spans" else pairs):
        with trainless.patched(model, "h2o", heavy=4, recent=3), trainless.patched(model, "toy_lists"):
            with pytest.raises(
                trainless.Unsupported, match=r"h2o: .* has a static pattern, which knows keys by"
            ):
                _run(model, False, CALLS)


def test_scales_are_told_how_many_keys_each_head_and_row_sees():
    """Extra keys that differ by batch row and head."""
    seen = []
    shown = torch.rand(2, 4, 12, 3, generator=torch.Generator().manual_seed(0)) < 0.5

    def extra(call, *_):
        key = torch.zeros(2, call.key.shape[1], 3, call.key.shape[3], dtype=call.key.dtype)
        return seams.ExtraKeys(key, key, visible=shown)

    def scale(call, *_):
        seen.append(call.facts["visible_keys"])
        return 1.0

    model = build("llama", layers=1)
    with registered(toy("lists", lambda site: [seams.Keys(extra), seams.Scale(scale)])):
        with trainless.patched(model, "toy_lists"), torch.no_grad():
            model(torch.arange(1, 25).view(2, 12))
    rest = seen[0][..., 0] - shown.sum(-1)
    assert torch.equal(rest, rest[:1, :1].expand_as(rest))
