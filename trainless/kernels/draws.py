"""Numbers drawn for tokens: a function of a seed, a head and a position, and of nothing else.

The three are mixed into 64 bits, x = seed · 0x9E3779B97F4A7C15 + head · 0xC2B2AE3D27D4EB4F + position ·
0x165667B19E3779F9 modulo 2^64, then twice x ^= x >> 32, x *= 0xD6E8FEB86659FD93, and x ^= x >> 32; the number is the
upper 53 bits, as a float in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

SEED, HEAD, POSITION, MIX = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93
LOW = 0xFFFFFFFF
UPPER = (1 << 53) - 1  # of what is left after a shift by 11


def whole(number: int) -> int:
    """A number modulo 2^64, as an int64 holds it."""
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number


def draws(seed: int, head: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1), float64, for every head and position, the same whatever else is in the batch."""
    return drawn(lots(seed, head), position)


def lots(seed: int, head: Tensor) -> Tensor:
    """What the seed and each head add to the mix, int64 shaped like ``head``."""
    return head * whole(HEAD) + whole(seed * SEED)


def drawn(lot: Tensor, position: Tensor) -> Tensor:
    """The numbers of positions, float64: integers that broadcast against what ``lots`` has given."""
    x = lot + position.long() * whole(POSITION)
    for _ in range(2):
        x = _folded(x) * whole(MIX)
    x = _folded(x)
    return ((x >> 11) & UPPER).to(torch.float64) / (1 << 53)


def _folded(x: Tensor) -> Tensor:
    return x ^ ((x >> 32) & LOW)
