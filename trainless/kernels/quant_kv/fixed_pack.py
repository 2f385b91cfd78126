# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of packing one more group of a cache of fixed size: one launch, which decides on the device what is due.

The codes are those of ``format.quantise`` up to the last digit of a square root. Not timed on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..split import last_lane
from .fixed import FixedPacked


@triton.jit
def _code(x, least, step, BITS: tl.constexpr):
    """Codes of x by parameters as they are stored: rounded to the nearest, halves to the even one."""
    found = tl.div_rn(x - least, tl.where(step > 0, step, 1.0))
    # Adding and taking away 1.5 · 2^23 leaves no room for a fraction.
    found = (found + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(found, 0.0), (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def _pack(
    key, key_step, key_min, value, value_step, value_min, value_root, tail_k, tail_v, packed, age, tickets, residual,
    hkv, groups, ring,
    D: tl.constexpr, DV: tl.constexpr, SIZE: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The oldest group of the ring of one lane into codes, if its row is due."""
    lane = tl.program_id(0).to(tl.int64)
    batch = lane // hkv
    held, seen = tl.load(packed + batch), tl.load(age + batch)
    due = (seen - held >= tl.load(residual + batch) + SIZE) & (held < groups * SIZE)
    if due:
        kw: tl.constexpr = D * KBITS // 8
        vw: tl.constexpr = DV * VBITS // 8
        tokens = tl.arange(0, BS)
        there = tokens < SIZE
        place = lane * ring + (held + tokens) % ring
        group = lane * groups + held // SIZE
        slot = group * SIZE + tokens
        wide = tl.arange(0, BK)
        byte = tl.zeros((BS, BK), tl.int32)
        inside = there[:, None] & (wide < kw)[None, :]
        for p in tl.static_range(8 // KBITS):
            x = tl.load(tail_k + place[:, None] * D + (p * kw + wide)[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            low = tl.min(tl.where(inside, x, float("inf")), 0)
            high = tl.max(tl.where(inside, x, float("-inf")), 0)
            step = tl.div_rn(high - low, (1 << KBITS) - 1.0).to(key_step.dtype.element_ty)
            least = low.to(key_min.dtype.element_ty)
            tl.store(key_step + group * D + p * kw + wide, step, mask=wide < kw)
            tl.store(key_min + group * D + p * kw + wide, least, mask=wide < kw)
            byte |= _code(x, least.to(tl.float32)[None, :], step.to(tl.float32)[None, :], KBITS) << (
                KBITS * p
            )
        tl.store(key + slot[:, None] * kw + wide[None, :], byte.to(tl.uint8), mask=inside)
        wide_v = tl.arange(0, BV)
        inside_v = there[:, None] & (wide_v < vw)[None, :]
        low_v = tl.full((BS,), float("inf"), tl.float32)
        high_v = tl.full((BS,), float("-inf"), tl.float32)
        for p in tl.static_range(8 // VBITS):
            of = tail_v + place[:, None] * DV + (p * vw + wide_v)[None, :]
            x = tl.load(of, mask=inside_v, other=0.0).to(tl.float32)
            root = tl.sqrt_rn(tl.max(tl.abs(x), 0)).to(value_root.dtype.element_ty)
            root = tl.where(root.to(tl.float32) > 0, root.to(tl.float32), 1.0)
            tl.store(
                value_root + group * DV + p * vw + wide_v,
                root.to(value_root.dtype.element_ty),
                mask=wide_v < vw,
            )
            x = tl.div_rn(x, root[None, :] + tl.zeros((BS, BV), tl.float32))
            low_v = tl.minimum(low_v, tl.min(tl.where(inside_v, x, float("inf")), 1))
            high_v = tl.maximum(high_v, tl.max(tl.where(inside_v, x, float("-inf")), 1))
        step_v = tl.div_rn(high_v - low_v, (1 << VBITS) - 1.0).to(value_step.dtype.element_ty)
        least_v = low_v.to(value_min.dtype.element_ty)
        tl.store(value_step + slot, step_v, mask=there)
        tl.store(value_min + slot, least_v, mask=there)
        byte_v = tl.zeros((BS, BV), tl.int32)
        for p in tl.static_range(8 // VBITS):
            of = tail_v + place[:, None] * DV + (p * vw + wide_v)[None, :]
            x = tl.load(of, mask=inside_v, other=0.0).to(tl.float32)
            root = tl.sqrt_rn(tl.max(tl.abs(x), 0)).to(value_root.dtype.element_ty)
            root = tl.where(root.to(tl.float32) > 0, root.to(tl.float32), 1.0)
            x = tl.div_rn(x, root[None, :] + tl.zeros((BS, BV), tl.float32))
            found = _code(x, least_v.to(tl.float32)[:, None], step_v.to(tl.float32)[:, None], VBITS)
            byte_v |= found << (VBITS * p)
        tl.store(value + slot[:, None] * vw + wide_v[None, :], byte_v.to(tl.uint8), mask=inside_v)
    if last_lane(tickets, batch, hkv):
        if due:
            tl.store(packed + batch, held + SIZE)


def pack_group(buffers: FixedPacked, residual: Tensor) -> None:
    """See ``fixed_api.pack_group``: one launch, whose programs end at once where nothing is due."""
    f = buffers
    b, hkv, ring, d = f.tail_key.shape
    dv = f.tail_value.shape[3]
    power = triton.next_power_of_2
    _pack[(b * hkv,)](
        f.key, f.key_step, f.key_min, f.value, f.value_step, f.value_min, f.value_root, f.tail_key, f.tail_value,
        f.packed, f.age, f.tickets, residual, hkv, f.key.shape[2], ring,
        D=d, DV=dv, SIZE=f.size, KBITS=f.k_bits, VBITS=f.v_bits, BS=power(f.size), BK=power(f.key.shape[4]),
        BV=power(f.value.shape[4]), num_warps=8,
    )  # fmt: skip
