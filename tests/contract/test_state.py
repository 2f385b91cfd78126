"""State belongs to a sequence: fresh every time, apart when interleaved, right when a cache is moved."""

import copy

import pytest
import torch
from oracle import models, replay
from transformers import DynamicCache

import trainless
from trainless.cache import CompressingLayer, StatefulMixin

from .cases import LANGUAGE, Case, named
from .tools import EXACT, build, dense, same

pytestmark = pytest.mark.ways

ON_LLAMA = [c for c in LANGUAGE if "llama" in c.families]
STEPS = [14, 1, 1, 3, 1]


class Feed:
    """One sequence batch fed by hand, so that two can take turns and caches can be moved between calls."""

    def __init__(self, model, ids, mask=None, cache=None):
        self.model, self.ids, self.at = model, ids, 0
        self.mask = torch.ones_like(ids) if mask is None else mask
        self.padded = mask is not None
        self.cache = DynamicCache() if cache is None else cache

    def call(self, size: int) -> torch.Tensor:
        start, self.at = self.at, self.at + size
        positions = self.mask.cumsum(1).sub(1).clamp_min(0)
        return self.model(
            self.ids[:, start : self.at],
            attention_mask=self.mask[:, : self.at] if self.padded else None,
            position_ids=positions[:, start : self.at],
            past_key_values=self.cache,
        ).logits

    def rows(self, index: list[int]) -> "Feed":
        """The same feed for a choice of rows, sharing nothing but the model; the cache is left to the caller."""
        moved = Feed(self.model, self.ids[index], self.mask[index] if self.padded else None, self.cache)
        moved.at = self.at
        return moved


def _whole(case: Case, ids, mask=None) -> list[torch.Tensor]:
    model = build("llama")
    with dense(model, "llama", case):
        return replay(model, None, ids, mask, STEPS)


def _patched(case: Case):
    model = build("llama")
    trainless.patch(model, case.method, **case.parameters)
    return model


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_interleaved_sequences_do_not_mix(case: Case):
    model = _patched(case)
    first, second = models.prompt(20, 1), torch.cat([models.prompt(20, 2), models.prompt(20, 3)])
    want = _whole(case, first), _whole(case, second)
    feeds = Feed(model, first), Feed(model, second)
    for number, size in enumerate(STEPS):
        for feed, expected in zip(feeds, want, strict=True):
            same([feed.call(size)], [expected[number]], EXACT)


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_a_second_generate_starts_afresh(case: Case):
    model = build("llama", dtype=torch.float32, exact=False)
    trainless.patch(model, case.method, **case.parameters)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    long, short = models.prompt(18, 1), models.prompt(15, 2)
    first = model.generate(long, **options)
    between = model.generate(short, **options)
    again = model.generate(long, **options)
    assert torch.equal(first.sequences, again.sequences)
    same(first.logits, again.logits)
    same(between.logits, model.generate(short, **options).logits)


@pytest.mark.parametrize(**named(ON_LLAMA))
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("when", [1, 2], ids=["after-prefill", "after-a-step"])
def test_a_moved_cache_is_right(case: Case, padded: bool, when: int):
    """Deepcopied, reordered, repeated and cut caches go on as sequences fed alone would."""
    model = _patched(case)
    ids, mask = models.left_padded([20, 16]) if padded else (models.left_padded([20, 20])[0], None)
    real = torch.ones_like(ids) if mask is None else mask
    want = _whole(case, ids, mask)
    feed = Feed(model, ids, mask)
    for size in STEPS[:when]:
        feed.call(size)
    moves = {
        "copy": (lambda c: None, [0, 1]),
        "reorder": (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        "select": (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    }
    for name, (move, index) in moves.items():
        cache = copy.deepcopy(feed.cache)
        move(cache)
        moved = feed.rows(index)
        moved.cache = cache
        if name == "select" and padded:
            moved.mask, moved.padded = moved.mask.contiguous(), True
        start = sum(STEPS[:when])
        for number in range(when, len(STEPS)):
            size = STEPS[number]
            seen = real[index][:, start : start + size].bool()
            same([moved.call(size)[seen]], [want[number][index][seen]], EXACT)
            start += size
    for number in range(when, len(STEPS)):  # the original was not disturbed
        start = sum(STEPS[:number])
        seen = real[:, start : start + STEPS[number]].bool()
        same([feed.call(STEPS[number])[seen]], [want[number][seen]], EXACT)


def _stock_reset_empties() -> bool:
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    cache.reset()
    return cache.get_seq_length() == 0


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_a_reset_cache_is_a_new_one(case: Case):
    model = _patched(case)
    ids = models.prompt(20, 7)
    want = _whole(case, ids)
    cache = DynamicCache()
    other = Feed(model, torch.cat([models.prompt(20, 8), models.prompt(20, 9)]), None, cache)
    for size in STEPS:
        other.call(size)
    ours = all(isinstance(layer, CompressingLayer | StatefulMixin) for layer in cache.layers)
    if not ours and not _stock_reset_empties():
        pytest.skip("stock layers are among these, and this transformers does not empty them (5.17)")
    cache.reset()
    feed = Feed(model, ids, None, cache)
    same([feed.call(size) for size in STEPS], want, EXACT)


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_caches_hold_tensors_and_not_the_model(case: Case):
    model = _patched(case)
    feed = Feed(model, models.prompt(20))
    for size in STEPS:
        feed.call(size)
    for layer in feed.cache.layers:
        if not isinstance(layer, CompressingLayer | StatefulMixin):
            continue
        held = list(vars(layer).values())
        held += [t for s in layer.states.values() for t in s.tensors.values()]
        assert not any(isinstance(v, torch.nn.Module | trainless.Patch) for v in held)
        copied = copy.deepcopy(layer)
        own, other = ((getattr(one, "ragged", None) or one).keys for one in (layer, copied))
        assert other.data_ptr() != own.data_ptr()


@pytest.mark.parametrize(**named([c for c in ON_LLAMA if c.main]))
def test_a_filled_cache_from_before_the_patch_is_refused_or_right(case: Case):
    """A method that keeps state says that it never saw these tokens; others just go on."""
    model = build("llama")
    feed = Feed(model, models.prompt(20))
    feed.call(14)
    trainless.patch(model, case.method, **case.parameters)
    if case.method in ("attn_temperature", "head_gain", "xattention"):
        feed.call(1)
        return
    with pytest.raises(trainless.InputError, match=r"already holds 14 tokens"):
        feed.call(1)


@pytest.mark.parametrize(**named([c for c in ON_LLAMA if c.evicts]))
def test_after_removal_a_compressed_cache_returns_what_it_holds(case: Case):
    model = build("llama")
    patch = trainless.patch(model, case.method, **case.parameters)
    feed = Feed(model, models.prompt(20))
    feed.call(14)
    held = [copy.deepcopy(layer.kept()) for layer in feed.cache.layers]
    patch.remove()
    if not case.even or case.by_head:  # every layer, or head, has chosen how many tokens it keeps
        with pytest.raises(trainless.Unsupported, match="different numbers of tokens"):
            feed.call(1)
        return
    for step in range(3):
        out = feed.call(1)
        assert torch.isfinite(out).all()
        assert feed.cache.get_seq_length() == 15 + step
    for layer, before in zip(feed.cache.layers, held, strict=True):
        assert layer.kept() == [[[*h, 14, 15, 16] for h in row] for row in before], "it stopped evicting"
