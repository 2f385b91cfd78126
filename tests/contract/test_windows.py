"""A pattern that is a window on a grid: by its own kernel, beside other seams, and where the kernel cannot."""

import pytest
import torch
from oracle import models

import trainless
from trainless.kernels import Window2d
from trainless.kernels.window2d import blocked
from trainless.seams import ExtraKeys, Keys, Pattern, Scale

from . import toys
from .reference import attention_of
from .test_seams import plain
from .tools import EXACT, same
from .toys import toy, with_toys

SIDE = 5  # a vision tower of 5 × 5 patches behind one class token, which stands where text would
WINDOW = Window2d((SIDE, SIDE), 2, text=1)
SEEN = WINDOW.visible(torch.arange(26)[:, None], torch.arange(26)[None])


def _pattern(window):
    return lambda site: [Pattern(lambda call, stats, state: window)]


def _image_keys(site):
    def value(call, stats, state):
        key, value = (t.expand(call.shape[0], -1, -1, -1) for t in toys.extra(site.layer, 4))
        return ExtraKeys(key, value, rows=(1, 26))

    return [Keys(value)]


COUNTS = []


def _by_count(site):
    def value(call, stats, state):
        COUNTS.append(call.facts["visible_keys"])
        return call.facts["visible_keys"].to(call.query.dtype).log()

    return [Scale(value)]


Window, Whole = toy("window", _pattern(WINDOW)), toy("whole", _pattern(Window2d((SIDE, SIDE), 9, text=1)))
ImageKeys, ByCount = toy("image_keys", _image_keys), toy("by_count", _by_count)
OfOther = toy("of_other", _pattern(Window2d((3, 3), 2)))


def _vit():
    model = models.build("vit", image_size=8 * SIDE)
    return model, {"pixel_values": torch.randn(2, 3, 8 * SIDE, 8 * SIDE, dtype=torch.float64)}


@torch.no_grad()
def _check(names, attention, kernel, reason=""):
    model, given = _vit()
    stock = model(**given).last_hidden_state
    with attention_of(model, attention):
        want = model(**given).last_hidden_state
    patches = [trainless.patch(model, name) for name in names]
    same([model(**given).last_hidden_state], [want], EXACT)
    report = patches[0].report().methods[0]
    assert report.fired == report.acted == 3 and set(report.kernels) == {kernel}
    assert reason in report.reasons.get(kernel, "")
    assert (want - stock).abs().max() > 1e-4
    for patch in patches:
        patch.remove()
    same([model(**given).last_hidden_state], [stock])


def _restricted(seen=SEEN):
    return lambda module, q, k, v, all_, scaling, kw: plain(module, q, k, v, all_ & seen, scaling, kw)


def _with_keys(seen):
    """The image's rows see three keys more; the class token does not."""

    def attention(module, query, key, value, all_, scaling, kwargs):
        layer = next(_LAYERS)
        k, v = (t.expand(query.shape[0], -1, -1, -1) for t in toys.extra(layer, 4))
        more = torch.ones(26, 3, dtype=torch.bool)
        more[0] = False
        whole = torch.cat([all_ & seen, more.expand(*all_.shape[:3], 3)], 3)
        return plain(module, query, torch.cat([key, k], 2), torch.cat([value, v], 2), whole, scaling, kwargs)

    return attention


_LAYERS = iter(range(0))


@pytest.fixture(autouse=True)
def _from_the_first_layer():
    global _LAYERS
    _LAYERS = iter(range(3))
    COUNTS.clear()


@with_toys(Window)
def test_a_window_runs_on_its_own_kernel():
    _check(["toy_window"], _restricted(), "window2d/blocked")


@with_toys(Window, ImageKeys)
def test_extra_keys_of_the_image_go_into_the_kernel(monkeypatch):
    given = []
    kernel = blocked.window2d
    monkeypatch.setattr(blocked, "window2d", lambda *a, **k: given.append(k["extra"]) or kernel(*a, **k))
    _check(["toy_window", "toy_image_keys"], _with_keys(SEEN), "window2d/blocked")
    assert len(given) == 3 and all(extra[0].shape[2] == 3 for extra in given)


@with_toys(ImageKeys)
def test_extra_keys_for_some_rows_without_a_window():
    _check(["toy_image_keys"], _with_keys(torch.ones(26, 26, dtype=torch.bool)), "lse/fused")


@with_toys(Window, toys.Near)
def test_a_window_and_another_pattern_intersect_without_the_kernel():
    seen = SEEN & toys.near(torch.arange(26)[:, None], torch.arange(26)[None])
    _check(["toy_window", "toy_near"], _restricted(seen), "lse/fused", "another pattern")


@with_toys(Window, toys.Observe)
def test_statistics_of_a_window_are_those_of_its_pairs():
    toys.SEEN.clear()
    _check(["toy_window", "toy_observe"], _restricted(), "lse/fused", "statistics")
    rows = torch.ones(2, 4, 26, dtype=torch.float64)
    torch.testing.assert_close(toys.SEEN[0].column_mass[0].sum(-1), rows.sum(-1), rtol=0, atol=1e-9)


@with_toys(Window, ByCount)
def test_a_scale_knows_how_many_keys_the_window_leaves():
    def attention(module, q, k, v, all_, scaling, kwargs):
        z = q @ k.mT * scaling * SEEN.sum(1, keepdim=True).double().log()
        return z.masked_fill(~SEEN, -torch.inf).softmax(-1) @ v

    _check(["toy_window", "toy_by_count"], attention, "window2d/blocked")
    assert torch.equal(COUNTS[0].flatten(), SEEN.sum(1))


@with_toys(Window, ImageKeys, toys.Near, ByCount)
@torch.no_grad()
def test_keys_are_counted_through_every_pattern_and_with_the_extra_ones():
    model, given = _vit()
    for name in ("toy_window", "toy_image_keys", "toy_near", "toy_by_count"):
        trainless.patch(model, name)
    model(**given)
    near = toys.near(torch.arange(26)[:, None], torch.arange(26)[None])
    want = (SEEN & near).sum(1) + torch.tensor([0] + [3] * 25)
    assert torch.equal(COUNTS[0].flatten(), want)


@with_toys(Window)
@torch.no_grad()
def test_a_mask_is_kept_beside_the_window():
    """BERT with padding: the pattern falls back to its predicate."""
    model, given = models.build("bert"), models.inputs("bert", length=26)
    padded = given["attention_mask"]
    assert not padded.all()
    with attention_of(model, _restricted()):
        want = model(**given).last_hidden_state
    with trainless.patched(model, "toy_window") as patch:
        got = model(**given).last_hidden_state
        report = patch.report().methods[0]
    same([got[padded.bool()]], [want[padded.bool()]], EXACT)
    assert set(report.kernels) == {"lse/fused"} and "mask" in report.reasons["lse/fused"]


@with_toys(OfOther)
@torch.no_grad()
def test_a_window_over_other_tokens_is_an_error():
    model, given = _vit()
    with (
        trainless.patched(model, "toy_of_other"),
        pytest.raises(trainless.InputError, match=r"9 tokens.*26 queries"),
    ):
        model(**given)
