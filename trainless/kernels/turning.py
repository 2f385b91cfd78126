"""Rotary turns by a whole number of positions, from tables: what a cached key needs that is presented elsewhere."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

NEAR = 256  # distances in the first table; the second goes in steps of so many


class Turn(NamedTuple):
    """Turns by 0 … reach - 1 positions: channel j of a key becomes k_j · cos + k_partner(j) · sin, sin with its sign.

    near (NEAR, 2, D), far (n, 2, D): cos and sin of each distance below NEAR, and of each multiple of NEAR; float32, or
    float64 for float64 keys.
    partner (D,) int32. Channels that do not turn have cos 1 and sin 0.
    """

    near: Tensor
    far: Tensor
    partner: Tensor

    @property
    def reach(self) -> int:
        return NEAR * self.far.shape[0]

    def __call__(self, keys: Tensor, distances: Tensor) -> Tensor:
        """keys (B, Hkv, S, D) turned by distances (B, Hkv, S) int, in float32 (float64 for a float64 key)."""
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        distances = distances.long()
        near, far = self.near.to(wide)[distances % NEAR], self.far.to(wide)[distances // NEAR]
        cos = far[..., 0, :] * near[..., 0, :] - far[..., 1, :] * near[..., 1, :]
        sin = far[..., 1, :] * near[..., 0, :] + far[..., 0, :] * near[..., 1, :]
        keys = keys.to(wide)
        return keys * cos + keys.index_select(3, self.partner.long()) * sin


class Rotates(Protocol):
    """A model's own rotation, and the same as tables."""

    def __call__(self, keys: Tensor, steps: Tensor) -> Tensor:
        """keys (B, Hkv, L, D) turned by steps (B, Hkv, L) int."""
        ...

    def turn(self, keys: Tensor, reach: int) -> Turn | None:
        """Tables for such keys and distances up to ``reach``; None where it cannot be told by tables."""
        ...
