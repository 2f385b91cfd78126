"""The meaning of packed attention: everything dequantised, then dense softmax attention. For tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import Terms
from .fixed import FixedPacked
from .format import RAW, Segment, unpack


def dequantise(segment: Segment, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys (B, Hkv, slots, D) and values (B, Hkv, slots, Dv) of a segment."""

    def spread(table: Tensor) -> Tensor:
        """Parameters of groups, one row for every slot: (B, Hkv, slots, D)."""
        if segment.index is None:
            return table.to(dtype).repeat_interleave(segment.key.shape[3], 2)
        index = segment.index.long()[..., None].expand(*segment.index.shape, table.shape[-1])
        return table.to(dtype).gather(2, index)

    key, value = segment.key.flatten(2, 3), segment.value.flatten(2, 3)
    if segment.k_bits != RAW:
        assert segment.key_step is not None and segment.key_min is not None
        key = unpack(key, segment.k_bits).to(dtype) * spread(segment.key_step) + spread(segment.key_min)
    if segment.v_bits != RAW:
        assert segment.value_step is not None and segment.value_min is not None
        assert segment.value_root is not None
        step, least = (t.to(dtype).flatten(2, 3)[..., None] for t in (segment.value_step, segment.value_min))
        value = (unpack(value, segment.v_bits).to(dtype) * step + least) * spread(segment.value_root)
    return key.to(dtype), value.to(dtype)


def rows(
    query: Tensor, segments: Sequence[Segment], terms: Terms, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, Lq, Dv), probabilities (B, H, Lq, K) and lse (B, H, Lq), in the dtype of the query."""
    h = query.shape[1]
    both = [dequantise(s, query.dtype) for s in segments]
    key, value = torch.cat([k for k, _ in both], 2), torch.cat([v for _, v in both], 2)
    share = h // key.shape[1]
    z = query @ key.repeat_interleave(share, 1).mT * terms.scale
    if terms.softcap is not None:
        z = terms.softcap * torch.tanh(z / terms.softcap)
    if terms.position_bias is not None:
        z = z + terms.position_bias
    if valid is not None:
        z = z.masked_fill(~valid.repeat_interleave(h // valid.shape[1], 1), -torch.inf)
    lse = torch.logsumexp(z, -1)
    if terms.sink_logits is not None:
        lse = torch.where(
            lse.isneginf(), lse, torch.logaddexp(lse, terms.sink_logits.to(z.dtype)[None, :, None])
        )
    p = torch.exp(z - lse[..., None]).nan_to_num(0.0)
    return p @ value.repeat_interleave(share, 1), p, lse


def packed_decode(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    buffers: FixedPacked,
    terms: Terms,
    valid: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, log-sum-exp, probabilities) of a step on fixed buffers, row by row; see ``fixed_api.packed_decode``."""
    b, hkv = buffers.tail_key.shape[:2]
    slots, ring = buffers.slots, buffers.tail_key.shape[2]
    found = []
    for row in range(b):
        age = int(buffers.age[row])
        if key is not None and value is not None and (real is None or bool(real[row])):
            buffers.tail_key[row, :, age % ring] = key[row, :, 0]
            buffers.tail_value[row, :, age % ring] = value[row, :, 0]
            age += 1
            buffers.age[row] = age
        packed = int(buffers.packed[row])
        seen = torch.zeros(hkv, slots, dtype=torch.bool)
        seen[:, :packed] = True
        for token in range(packed, age):
            seen[:, slots - ring + token % ring] = True
        found.append(seen if valid is None else seen & valid[row])
    out, p, lse = rows(query, buffers.segments(), terms, torch.stack(found)[:, :, None])
    return out, lse[..., 0], p[:, :, 0]
