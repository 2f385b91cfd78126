"""The meaning of ``moved_row`` in torch, in the dtype of statistics; what runs where the loops cannot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import Terms
from ..lse import row_probabilities, widened_product


class MovedRow(NamedTuple):
    """A call of ``moved_row``; see there. terms: no bias. heads: query heads that ``source`` is about, None for all."""

    query: Tensor
    key: Tensor
    value: Tensor
    source: Tensor
    keep: float
    terms: Terms
    visible: Tensor | None = None
    heads: tuple[int, ...] | None = None


def moved_row(row: MovedRow) -> Tensor:
    """See ``api.moved_row``."""
    query, key, value, source, keep, terms, visible, heads = row
    b, h, _, _ = query.shape
    hkv, lk, width = value.shape[1:]
    p = row_probabilities(
        query, key, valid=visible, scale=terms.scale, softcap=terms.softcap, sink_logits=terms.sink_logits
    )
    own = p if heads is None else p[:, list(heads)]
    sources = source[:, :, None]
    freed = (own * sources).sum(-1, keepdim=True) * (1 - keep)
    room = (own * ~sources).sum(-1, keepdim=True)
    grown = 1 + freed / room.clamp_min(torch.finfo(p.dtype).tiny)
    # A row that sees no other key has nowhere to put what is freed, and stays as it is.
    own = torch.where(room > 0, torch.where(sources, own * keep, own * grown), own)
    if heads is None:
        p = own
    else:
        p[:, list(heads)] = own
    out = widened_product(p.view(b * hkv, h // hkv, lk), value.reshape(b * hkv, lk, width))
    return out.view(b, h, 1, width).to(query.dtype)
