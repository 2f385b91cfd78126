"""From a rule of precision to contributions: the part that quantising methods share. Not a method itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.quant_kv import per_byte
from ..seams import Quantise, Site, check_bits


def width_refusal(rule: Quantise, site: Site) -> str | None:
    """Why the heads of ``site`` cannot be packed by ``rule``, or None."""
    shape = site.facts.get("cache_shape") or (0, site.head_dim, site.head_dim)
    for width, tiers in zip(shape[1:], (rule.k_bits, rule.v_bits), strict=True):
        for bits in tiers:
            if width is not None and width % per_byte(bits):
                return f"{width} channels of {bits} bits are not a whole number of bytes"
    return None


def check_tiers(bits: tuple[int, int], first: str) -> None:
    """Raise InputError unless ``bits`` are widths of codes, and those of the ``first`` tokens no smaller."""
    for name, width in zip((f"bits: {first}", "bits: others"), bits, strict=True):
        check_bits(name, width)
    if bits[0] < bits[1]:
        raise InputError(
            f"bits={bits!r}: {first} tokens would be held at fewer bits than the others; the width of the "
            f"{first} ones comes first: {bits[::-1]!r}"
        )


def best_share(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """bool (B, h, W): the ``count`` (B, h) highest of ``score`` among the marked; ties go to the newer."""
    ranked = score.masked_fill(~among, -torch.inf)
    width = ranked.shape[2]
    order = width - 1 - ranked.flip(2).sort(dim=2, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(2, order, torch.arange(width, device=order.device).expand_as(order))
    return (rank < count[..., None]) & among
