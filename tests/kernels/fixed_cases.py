"""Packed buffers of fixed size in some state, and a token for them; shared by the tests of every form."""

from __future__ import annotations

import torch

from trainless.kernels.quant_kv import FixedPacked, fill, fixed_packed, quantise

# (B, H, Hkv, D, groups in use, of, group, waiting, ring, k_bits, v_bits)
SHAPES = [
    (2, 4, 2, 16, 2, 4, 32, 9, 48, 4, 4),
    (1, 6, 2, 32, 1, 2, 16, 3, 20, 8, 2),
    (1, 2, 1, 24, 0, 3, 32, 1, 40, 2, 4),
    (1, 2, 2, 16, 2, 2, 16, 5, 8, 16, 4),
]
IDS = ["B{}-H{}-K{}-D{}-{}of{}x{}-{}of{}-k{}v{}".format(*s) for s in SHAPES]


def make(shape, dtype=torch.float64) -> FixedPacked:
    """Rows of different age where there are several; what no token stands in is NaN, or a code of ones."""
    b, _, hkv, d, used, groups, group, waiting, ring, k_bits, v_bits = shape
    numbers = lambda n: torch.randn(b, hkv, n, d, dtype=torch.float64).to(dtype)  # noqa: E731
    buffers = fixed_packed(
        numbers(1), numbers(1), k_bits=k_bits, v_bits=v_bits, group=group, groups=groups, ring=ring
    )
    segment = None
    if used:
        both = (numbers(used * group).unflatten(2, (used, group)) for _ in range(2))
        segment = quantise(*both, k_bits, v_bits)
    lengths = waiting - torch.arange(b) % 2
    fill(buffers, segment, numbers(waiting), numbers(waiting), lengths.to(torch.int32))
    if b > 1 and used:
        buffers.packed[-1] -= group
        buffers.age[-1] -= group
    return buffers


def token(shape, dtype=torch.float64):
    """(query, key, value)."""
    b, h, hkv, d = shape[:4]
    return tuple(torch.randn(b, n, 1, d, dtype=torch.float64).to(dtype) for n in (h, hkv, hkv))


def copied(buffers: FixedPacked, dtype=None) -> FixedPacked:
    """The same state in memory of its own; floating-point tensors in another dtype if one is given."""
    change = lambda t: t.clone() if dtype is None or not t.is_floating_point() else t.to(dtype).clone()  # noqa: E731
    held = {n: None if t is None else t for n, t in vars(buffers).items()}
    return FixedPacked(**{n: change(t) if isinstance(t, torch.Tensor) else t for n, t in held.items()})
