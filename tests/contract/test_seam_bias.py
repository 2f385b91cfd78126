"""A bias on the logits of extra keys: against attention written out in float64, beside scales, and at misuse."""

import pytest
import torch

import trainless
from trainless import seams
from trainless.engine.extra_keys import merge_extra
from trainless.kernels.window2d import Window2d

from . import toys
from .reference import attention_of, softmax_over
from .test_seams import CUTS, PADDED, _logits, _run
from .tools import CALLS, EXACT, build, same, wide
from .toys import registered, toy


def _bias(layer, batch, rows, last=False):
    """(B, H, rows, 3), of which one entry in five hides its key."""
    g = torch.Generator().manual_seed(90 + layer)
    bias = torch.randn(batch, 4, rows, 3, generator=g, dtype=torch.float64) * 2
    bias[..., 1] = bias[..., 1].masked_fill(torch.arange(rows)[:, None].T % 5 == 3, -torch.inf)
    return bias


def _some(bias=None):
    def value(call, stats, state):
        batch, _, _, rows, _ = call.shape
        key, held = (t.expand(batch, -1, -1, -1) for t in toys.extra(call.site.layer))
        made = _bias(call.site.layer, batch, rows) if bias is None else bias
        return seams.ExtraKeys(key, held, toys.visible_extra(rows), bias=made)

    return toy("biased", lambda site: [seams.Keys(value)])


def _dense(factor=1.0):
    def attention(module, query, key, value, seen, scaling, kwargs):
        batch, h, lq, _ = query.shape
        k, v = (
            t.expand(batch, -1, -1, -1).repeat_interleave(h // 2, 1) for t in toys.extra(module.layer_idx)
        )
        z, cap = _logits(query, torch.cat([key, k], 2), scaling), kwargs.get("softcap")
        z = z if cap is None else cap * torch.tanh(z / cap)
        bias = _bias(module.layer_idx, batch, lq)
        z[..., -3:] += bias
        more = toys.visible_extra(lq).expand(batch, h, -1, -1) & ~bias.isneginf()
        seen = torch.cat([seen.expand(batch, h, -1, -1), more], 3)
        z = z.masked_fill(~seen, 0) * factor
        return softmax_over(z, seen) @ torch.cat([value, v], 2)

    return attention


@CUTS
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_bias_on_extra_keys(family, calls):
    model = build(family)
    with attention_of(model, _dense()):
        want = _run(model, True, calls)
    with registered(_some()), trainless.patched(model, "toy_biased") as patch, wide(model):
        same(_run(model, True, calls), want, EXACT)
        assert patch.verify()


@PADDED
def test_scales_multiply_it_with_the_logits(padded):
    per_row = toy("rows", lambda site: [seams.Scale(lambda call, stats, state: _ramp(call.shape[3]))])
    for name, factor in (("attn_temperature", lambda lq: 0.5), ("toy_rows", _ramp)):
        model = build("llama")

        def dense(module, query, *rest, factor=factor):
            return _dense(factor(query.shape[2]))(module, query, *rest)

        with attention_of(model, dense):
            want = _run(model, padded, CALLS)
        given = {"temperature": 2.0} if name == "attn_temperature" else {}
        with registered(_some(), per_row), trainless.patched(model, name, **given):
            with trainless.patched(model, "toy_biased"):
                same(_run(model, padded, CALLS), want, EXACT)


def _ramp(rows):
    return torch.linspace(0.5, 1.5, rows, dtype=torch.float64)[:, None]


def test_beside_the_kernel_of_a_window():
    """The window keeps its kernel; keys with a bias are merged behind it."""
    from trainless.engine.patterns import extra_of_image

    torch.manual_seed(0)
    window = Window2d((4, 4), 1.5)
    made = [torch.randn(1, 2, 3, 8, dtype=torch.float64) for _ in range(2)]
    plain = seams.ExtraKeys(*made, rows=window.image)
    biased = seams.ExtraKeys(*made, rows=window.image, bias=torch.randn(1, 1, 16, 3, dtype=torch.float64))
    inside, others = extra_of_image(window, [plain, biased])
    assert inside is not None and inside[0].shape[2] == 3 and others == [biased]
    query, key = torch.randn(1, 2, 16, 8, dtype=torch.float64), torch.randn(1, 2, 16, 8, dtype=torch.float64)
    z = query @ key.mT * 0.3
    call = seams.AttentionCall(query, key, key, scaling=0.3)
    out, lse = merge_extra(call, z.softmax(-1) @ key, z.logsumexp(-1), [biased])
    both = torch.cat([z, query @ made[0].mT * 0.3 + biased.bias], -1)
    torch.testing.assert_close(out, both.softmax(-1) @ torch.cat([key, made[1]], 2))
    torch.testing.assert_close(lse, both.logsumexp(-1))


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (
            torch.zeros(5),
            r"toy_biased: a bias \(1, 1, 1, 5\) of extra keys does not broadcast to \(3, 4, 14, 3\)",
        ),
        (torch.zeros(2, 1, 1, 1, 1), "does not broadcast"),
        (torch.ones(3, dtype=torch.bool), r"tensor of torch.bool; give a float tensor"),
        (0.5, "is a float; give a float tensor"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused_by_name(bias, said):
    model = build("llama", layers=1)
    with registered(_some(bias)), trainless.patched(model, "toy_biased"):
        with pytest.raises(trainless.InputError, match=said):
            _run(model, True, CALLS)
