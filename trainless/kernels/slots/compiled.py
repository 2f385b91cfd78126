"""A decode step over fixed slots with its bookkeeping as compiled loops: the products are torch's. See ``loops``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import openmp
from ..common import Terms
from ..lse import widened_product
from . import loops
from .state import GROUPS, SCORES, FixedSlots, SlotRule, SlotStep

ALONE = 1 << 15  # slots of all heads that are not worth a second thread
HOW = {name: n for n, name in enumerate(SCORES)}
SHARED = {name: n for n, name in enumerate(GROUPS)}


def decode(step: SlotStep) -> Tensor:
    """See ``api.slot_decode``: CPU tensors in float32 or half precision, contiguous buffers."""
    query, key, value, slots, rule, terms, real = step
    b, h, _, d = query.shape
    hkv, size = slots.positions.shape[1:]
    n, r = b * hkv, h // hkv
    threads = torch.get_num_threads() if n * size > ALONE else 1
    if real is not None:
        real = real.expand(b).contiguous()
    bias = query.new_empty(n, 1, size, dtype=torch.float32)
    _write(key.contiguous(), value.contiguous(), slots, real, bias, threads)
    z = _logits(query.reshape(n, r, d), slots.keys.view(n, size, d), bias, terms)
    if terms.sink_logits is not None:
        sink = terms.sink_logits.float().view(1, h, 1).expand(b, h, 1).reshape(n, r, 1)
        p = torch.softmax(torch.cat([z, sink], 2), 2)[..., :-1].contiguous()
    else:
        p = torch.softmax(z, 2)
        if real is not None:  # only then a row may be without a token
            p = p.nan_to_num_(0.0)
    out = widened_product(p, slots.values.view(n, size, -1))
    _settle(p, slots, rule, real, r, threads)
    return out.view(b, h, 1, -1).to(query.dtype)


def _logits(q: Tensor, keys: Tensor, bias: Tensor, terms: Terms) -> Tensor:
    """(n, r, S) in float32, -inf for slots that are empty."""
    if keys.dtype == torch.float32 and terms.softcap is None:
        return torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=terms.scale)
    z = widened_product(q.float() * terms.scale, keys.transpose(1, 2))
    if terms.softcap is not None:
        z = torch.tanh(z / terms.softcap) * terms.softcap
    return z.add_(bias)


def _write(
    key: Tensor, value: Tensor, slots: FixedSlots, real: Tensor | None, bias: Tensor, threads: int
) -> None:
    s = slots
    b, hkv, size, d = s.keys.shape
    width = key.element_size()
    tensors = (key, value, s.keys, s.values, s.positions, s.scores, s.free, s.age, real, bias)
    numbers = b, hkv, size, d * width, s.values.shape[3] * width, s.scores is not None, real is not None
    openmp.run(loops.write_part, (*numbers, *_addresses(tensors)), threads)


def _settle(p: Tensor, slots: FixedSlots, rule: SlotRule, real: Tensor | None, r: int, threads: int) -> None:
    s = slots
    b, hkv, size = s.positions.shape
    runs = 0 if s.never is None else s.never.shape[1]
    how = HOW[rule.score], SHARED[rule.gqa], rule.shared, rule.normalise
    tensors = (p, s.positions, s.scores, s.free, s.age, s.count, s.limit, s.recent, s.never, real)
    openmp.run(
        loops.settle_part, (b, hkv, r, size, *how, runs, real is not None, *_addresses(tensors)), threads
    )


def _addresses(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Of their memory; of some tensor's, at which nothing is read, in the place of one that there is not."""
    own = tensors[0]
    assert own is not None
    return [(own if t is None else t).data_ptr() for t in tensors]
