"""Extra keys with a bias on their logits: beside scales, masks, caches and windows, and biases that do not fit."""

import pytest
import torch

import trainless
from trainless.errors import InputError
from trainless.seams import ExtraKeys, Keys, Scale

from . import test_windows, toys
from .reference import softmax_over
from .test_seams import _check
from .test_windows import Window
from .test_windows import _check as check_vit
from .tools import build
from .toys import toy, with_toys

HEADS, FACTOR = 4, 0.5


def _bias(layer, rows):
    """(1, H, rows, 3): another number for each head, row and key, of both signs."""
    g = torch.Generator().manual_seed(90 + layer)
    column = torch.randn(1, HEADS, 1, 3, generator=g, dtype=torch.float64)
    return column * torch.linspace(1, 2, rows, dtype=torch.float64)[:, None]


def _keys(site):
    def value(call, stats, state):
        key, value = (t.expand(call.shape[0], -1, -1, -1) for t in toys.extra(site.layer))
        rows = call.shape[3]
        return ExtraKeys(key, value, toys.visible_extra(rows), bias=_bias(site.layer, rows))

    return [Keys(value)]


def _image_keys(site):
    def value(call, stats, state):
        key, value = (t.expand(call.shape[0], -1, -1, -1) for t in toys.extra(site.layer, 4))
        return ExtraKeys(key, value, rows=(1, 26), bias=_bias(site.layer, 25))

    return [Keys(value)]


def _by_row(rows):
    return torch.linspace(0.5, 1.5, rows, dtype=torch.float64)[:, None]


def _given(bias):
    def make(site):
        return [
            Keys(lambda call, stats, state: ExtraKeys(call.key[:, :, :2], call.value[:, :, :2], bias=bias))
        ]

    return make


Biased, BiasedImage = toy("biased_keys", _keys), toy("biased_image_keys", _image_keys)
Half = toy("half", lambda site: [Scale(constant=FACTOR)])
PerRow = toy("per_row", lambda site: [Scale(lambda call, stats, state: _by_row(call.shape[3]))])


def _dense(factor):
    """Logits of all keys, the bias added to those of the extra ones, all of it times ``factor(rows)``."""

    def attention(module, query, key, value, seen, scaling, kwargs):
        lq, layer = query.shape[2], module.layer_idx
        k, v = (t.expand(len(query), -1, -1, -1).repeat_interleave(2, 1) for t in toys.extra(layer))
        beside = query @ k.mT * scaling + _bias(layer, lq)
        logits = torch.cat([query @ key.mT * scaling, beside], 3) * factor(lq)
        seen = torch.cat([seen, toys.visible_extra(lq).expand(*seen.shape[:3], 3)], 3)
        return softmax_over(logits, seen) @ torch.cat([value, v], 2)

    return attention


@pytest.mark.parametrize("calls", [[22], [14, 1, 1, 5, 1]], ids=["whole", "cached"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@with_toys(Biased)
def test_extra_keys_with_a_bias(padded, calls):
    _check("toy_biased_keys", _dense(lambda rows: 1.0), padded, calls)


@pytest.mark.parametrize("scale", ["half", "per_row"])
@with_toys(Biased, Half, PerRow)
def test_a_scale_multiplies_the_bias_too(scale):
    factor = (lambda rows: FACTOR) if scale == "half" else _by_row
    _check(["toy_biased_keys", f"toy_{scale}"], _dense(factor), True, [14, 1, 1, 5, 1])


def _vit_dense(factor):
    layers = iter(range(3))

    def attention(module, query, key, value, all_, scaling, kwargs):
        layer = next(layers)
        k, v = (t.expand(len(query), -1, -1, -1) for t in toys.extra(layer, 4))
        beside = query @ k.mT * scaling
        beside[:, :, 1:] += _bias(layer, 25)
        more = torch.ones(26, 3, dtype=torch.bool)
        more[0] = False
        seen = torch.cat([all_ & test_windows.SEEN, more.expand(*all_.shape[:3], 3)], 3)
        logits = torch.cat([query @ key.mT * scaling, beside], 3) * factor
        return softmax_over(logits, seen) @ torch.cat([value, v], 2)

    return attention


@with_toys(Window, BiasedImage, PerRow)
def test_some_rows_of_a_window_see_keys_with_a_bias():
    check_vit(["toy_window", "toy_biased_image_keys"], _vit_dense(1.0), "window2d/blocked")
    names = ["toy_window", "toy_biased_image_keys", "toy_per_row"]
    check_vit(names, _vit_dense(_by_row(26)), "window2d/blocked")


@with_toys(Biased)
def test_verify_computes_the_bias_in_full():
    found = trainless.patch(build("llama"), "toy_biased_keys").verify()
    (result,) = [check for check in found.checks if check.name == "result"]
    assert result.status == "ok" and "(keys)" in result.detail, str(found)


WRONG = {
    "rows": torch.zeros(HEADS, 3, 2),
    "keys": torch.zeros(3),
    "heads": torch.zeros(1, 2, 1, 2),
    "dims": torch.zeros(1, 1, 1, 1, 2),
    "dtype": torch.zeros(2, dtype=torch.int64),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bias_that_does_not_fit_is_refused(wrong):
    with_toys(toy("wrong_bias", _given(WRONG[wrong])))(_refused)()


def _refused():
    model = build("llama")
    patch = trainless.patch(model, "toy_wrong_bias")
    with pytest.raises(InputError, match="extra keys: bias of"):
        model(torch.arange(1, 23)[None])
    patch.remove()
