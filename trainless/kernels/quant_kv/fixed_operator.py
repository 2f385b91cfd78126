"""``trainless::packed_decode`` and ``trainless::pack_group``: steps on packed buffers of fixed size as operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import Terms, statistics_dtype
from ..dispatch import triton_reasons
from . import fixed_plain
from .fixed import FixedPacked, Stepping
from .steps import choosing


def decode(
    query: Tensor, key: Tensor | None, value: Tensor | None, buffers: FixedPacked, terms: Terms, how: Stepping
) -> tuple[Tensor, Tensor]:
    """See ``fixed_api.packed_decode``: attend, and pack a group of the rows that are due then."""
    if choosing.on_triton(query, (buffers,), terms):
        from . import fixed_triton

        valid = how.valid[0] if how.valid else None
        found = fixed_triton.decode(query, key, value, buffers, terms, valid, how.real, how.scores)
        due = how.need > 0
    else:
        out, lse, due = choosing.step(query, key, value, (buffers,), terms, how)
        found = out, lse
    if due and how.residual is not None:
        pack_group(buffers, how.residual)
    return found


def pack_group(buffers: FixedPacked, residual: Tensor) -> None:
    """See ``fixed_api.pack_group``."""
    if not triton_reasons((buffers.tail_key, buffers.key)) and {buffers.k_bits, buffers.v_bits} <= {2, 4, 8}:
        from . import fixed_pack

        fixed_pack.pack_group(buffers, residual)
    else:
        fixed_plain.pack_group(buffers, residual)


@torch.library.custom_op("trainless::packed_decode", mutates_args=("buffers", "scores"))
def packed_decode_op(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    buffers: Sequence[Tensor],
    valid: Tensor | None,
    real: Tensor | None,
    sinks: Tensor | None,
    scores: Tensor | None,
    residual: Tensor | None,
    scale: float,
    softcap: float | None,
    bits: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """See ``fixed_api.packed_decode``: the tensors of ``fixed.FixedPacked`` in their order, and its two bits."""
    (held,) = FixedPacked.of(bits, buffers)
    how = Stepping((valid,), real, scores, False, 0 if residual is None else held.size, residual)
    return decode(query, key, value, held, Terms(scale, None, softcap, sinks), how)


@packed_decode_op.register_fake
def _(
    query: Tensor, key: Tensor | None, value: Tensor | None, buffers: Sequence[Tensor], *rest: object
) -> tuple[Tensor, Tensor]:
    width = buffers[-4].shape[3]  # the values of the ring
    return query.new_empty(*query.shape[:3], width), query.new_empty(
        query.shape[:2], dtype=statistics_dtype(query)
    )


@torch.library.custom_op("trainless::pack_group", mutates_args=("buffers",))
def pack_group_op(buffers: Sequence[Tensor], residual: Tensor, bits: Sequence[int]) -> None:
    """See ``fixed_api.pack_group``."""
    pack_group(FixedPacked.of(bits, buffers)[0], residual)


@pack_group_op.register_fake
def _(*given: object) -> None:
    return None
