"""Which tokens stay where the heads of a layer share one budget, or have one each."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(worth: Tensor) -> Tensor:
    """(B, Hkv, S): the place of each slot in its head by worth, 0 for the largest; among equals the newer one first."""
    length = worth.shape[2]
    order = length - 1 - worth.flip(2).sort(dim=2, descending=True, stable=True).indices
    place = torch.arange(length, device=worth.device).expand_as(order)
    return torch.empty_like(order).scatter_(2, order, place)


def own(worth: Tensor, limits: Tensor) -> Tensor:
    """bool (B, Hkv, S): the ``limits`` (B, Hkv) best of each head; worth: -inf in empty slots."""
    return (ranks(worth) < limits[..., None]) & (worth > -torch.inf)


def shared(worth: Tensor, even: Tensor, floor: float) -> Tensor:
    """bool (B, Hkv, S): the best Hkv · even[row] slots of each row, whatever head they are of.

    worth (B, Hkv, S), slots in the order of the text: inf where a token always stays, -inf in empty slots. even (B,):
    what each head would keep if all kept as much; at least floor · even of its best stay in every head. Among equals the
    newer token stays, then that of the first head.
    """
    b, hkv, length = worth.shape
    least = (even.to(torch.float64) * floor + 1e-9).long()[:, None, None]
    exists = worth > -torch.inf
    forced = (ranks(worth) < least) & exists
    flat = worth.masked_fill(forced, torch.inf).flip(2).transpose(1, 2).reshape(b, -1)
    order = flat.sort(dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    best = (place < (even * hkv)[:, None]).view(b, length, hkv).transpose(1, 2).flip(2)
    return best & exists
