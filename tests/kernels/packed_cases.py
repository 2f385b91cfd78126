"""Packed segments with a tail, and what attention on them should give, written out in float64 apart from the package."""

from __future__ import annotations

import torch

from trainless.kernels.quant_kv import Segment, quantise, raw

# (B, H, Hkv, Lq, D, groups, size, k_bits, v_bits): odd sizes, groups of heads, one token, tiers as they are
SHAPES = [
    (2, 4, 2, 1, 8, 3, 5, 4, 4),
    (1, 6, 2, 3, 16, 1, 77, 8, 2),
    (2, 2, 2, 2, 24, 4, 16, 2, 8),
    (1, 4, 1, 1, 8, 2, 3, 16, 4),
    (1, 2, 1, 5, 12, 2, 7, 4, 16),
    (1, 1, 1, 1, 8, 1, 1, 2, 2),
]
IDS = ["B{}-H{}-K{}-Q{}-D{}-{}x{}-k{}v{}".format(*s) for s in SHAPES]


def naive(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A vector rounded to 2**bits levels between its ends."""
    if bits == 16:
        return x
    step = (x.max() - x.min()) / (2**bits - 1)
    return x if step == 0 else torch.round((x - x.min()) / step) * step + x.min()


def read_back(key: torch.Tensor, value: torch.Tensor, k_bits: int, v_bits: int):
    """Keys and values (S, D) of one group of one head, number by number."""
    key = torch.stack([naive(c, k_bits) for c in key.unbind(1)], 1)
    if v_bits < 16:
        root = value.abs().amax(0).sqrt()
        value = torch.stack([naive(t, v_bits) for t in (value / root).unbind(0)]) * root
    return key, value


class Case:
    def __init__(self, shape, dtype=torch.float64, holes: bool = False, tail: int = 3):
        b, h, hkv, lq, d, groups, size, self.k_bits, self.v_bits = shape
        make = lambda *s: torch.randn(*s, dtype=torch.float64).to(dtype)  # noqa: E731
        self.key, self.value = make(b, hkv, groups, size, d), make(b, hkv, groups, size, d)
        self.near, self.query = (make(b, hkv, tail, d), make(b, hkv, tail, d)), make(b, h, lq, d)
        exists = torch.rand(b, hkv, groups, size) < 0.7
        exists[..., 0] = True
        self.exists = exists if holes else None
        self.segment = quantise(self.key, self.value, self.k_bits, self.v_bits, self.exists)
        self.segments: list[Segment] = [self.segment, raw(*self.near)]
        self.valid = None
        if holes:
            new = torch.ones(b, hkv, tail, dtype=torch.bool)
            self.valid = torch.cat([exists.flatten(2), new], 2)[:, :, None]

    def truth(self, scale: float, softcap=None, bias=None, sinks=None):
        """(output, probabilities, lse), dense."""
        b, hkv, groups, size, d = self.key.shape
        key, value = torch.zeros(2, b, hkv, groups, size, d, dtype=torch.float64)
        for i in range(b):
            for j in range(hkv):
                for g in range(groups):
                    on = torch.ones(size, dtype=torch.bool) if self.exists is None else self.exists[i, j, g]
                    found = read_back(
                        self.key[i, j, g, on].double(),
                        self.value[i, j, g, on].double(),
                        self.k_bits,
                        self.v_bits,
                    )
                    key[i, j, g, on], value[i, j, g, on] = found
        key = torch.cat([key.flatten(2, 3), self.near[0].double()], 2)
        value = torch.cat([value.flatten(2, 3), self.near[1].double()], 2)
        return dense(self.query.double(), key, value, scale, softcap, bias, sinks, self.valid)


def dense(query, key, value, scale, softcap=None, bias=None, sinks=None, valid=None):
    share = query.shape[1] // key.shape[1]
    z = query @ key.repeat_interleave(share, 1).mT * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z if bias is None else z + bias
    if valid is not None:
        z = z.masked_fill(~valid.repeat_interleave(share, 1), -torch.inf)
    lse = z.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[None, :, None])
    p = torch.exp(z - lse[..., None])
    return p @ value.repeat_interleave(share, 1), p, lse
