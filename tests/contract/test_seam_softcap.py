"""Extra keys in a model that soft-caps its logits get the cap as its own keys do, before their bias."""

import torch

import trainless
from trainless import seams

from . import toys
from .reference import attention_of, softmax_over
from .test_seams import CUTS, _logits, _run
from .tools import EXACT, build, same, wide
from .toys import registered, toy


def _bias(layer, batch, rows):
    g = torch.Generator().manual_seed(90 + layer)
    return torch.randn(batch, 4, rows, 3, generator=g, dtype=torch.float64) * 2


def _keys(site):
    def value(call, stats, state):
        batch, _, _, rows, _ = call.shape
        key, held = (8 * t.expand(batch, -1, -1, -1) for t in toys.extra(site.layer))
        return seams.ExtraKeys(key, held, toys.visible_extra(rows), bias=_bias(site.layer, batch, rows))

    return [seams.Keys(value)]


def _dense(module, query, key, value, seen, scaling, kwargs):
    batch, h, lq, _ = query.shape
    k, v = (
        8 * t.expand(batch, -1, -1, -1).repeat_interleave(h // 2, 1) for t in toys.extra(module.layer_idx)
    )
    cap = kwargs["softcap"]
    z = cap * torch.tanh(_logits(query, torch.cat([key, k], 2), scaling) / cap)
    z[..., -3:] += _bias(module.layer_idx, batch, lq)
    seen = torch.cat([seen.expand(batch, h, -1, -1), toys.visible_extra(lq).expand(batch, h, -1, -1)], 3)
    return softmax_over(z, seen) @ torch.cat([value, v], 2)


@CUTS
def test_extra_keys_get_the_soft_cap(calls):
    model = build("gemma2")
    with attention_of(model, _dense):
        want = _run(model, True, calls)
    with registered(toy("capped", _keys)), trainless.patched(model, "toy_capped") as patch, wide(model):
        same(_run(model, True, calls), want, EXACT)
        assert patch.verify()
