"""``trainless::packed_decode`` and ``trainless::pack_group``: steps on packed buffers of fixed size as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms, statistics_dtype
from ..dispatch import triton_reasons
from . import fixed_plain
from .fixed import FixedPacked

PARAMETERS = ("key_step", "key_min", "value_step", "value_min", "value_root")


@torch.library.custom_op(
    "trainless::packed_decode", mutates_args=("tail_key", "tail_value", "age", "tickets", "scores")
)
def packed_decode_op(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    packed_key: Tensor,
    packed_value: Tensor,
    key_step: Tensor | None,
    key_min: Tensor | None,
    value_step: Tensor | None,
    value_min: Tensor | None,
    value_root: Tensor | None,
    tail_key: Tensor,
    tail_value: Tensor,
    packed: Tensor,
    age: Tensor,
    tickets: Tensor,
    valid: Tensor | None,
    real: Tensor | None,
    sinks: Tensor | None,
    scores: Tensor | None,
    scale: float,
    softcap: float | None,
    k_bits: int,
    v_bits: int,
) -> tuple[Tensor, Tensor]:
    """See ``fixed_api.packed_decode``: the buffers of ``fixed.FixedPacked`` one by one."""
    buffers = FixedPacked(
        k_bits, v_bits, packed_key, packed_value, key_step, key_min, value_step, value_min, value_root, tail_key,
        tail_value, packed, age, tickets,
    )  # fmt: skip
    terms = Terms(scale, None, softcap, sinks)
    if not triton_reasons((query, packed_key, tail_key)):
        from . import fixed_triton

        if not fixed_triton.refuses(query, buffers, terms):
            return fixed_triton.decode(query, key, value, buffers, terms, valid, real, scores)
    return fixed_plain.decode(query, key, value, buffers, terms, valid, real, scores)


@packed_decode_op.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    tail_value = rest[10]
    assert isinstance(tail_value, Tensor)
    out = query.new_empty(*query.shape[:3], tail_value.shape[3])
    return out, query.new_empty(query.shape[:2], dtype=statistics_dtype(query))


@torch.library.custom_op(
    "trainless::pack_group", mutates_args=("packed_key", "packed_value", *PARAMETERS, "packed", "tickets")
)
def pack_group_op(
    packed_key: Tensor,
    packed_value: Tensor,
    key_step: Tensor | None,
    key_min: Tensor | None,
    value_step: Tensor | None,
    value_min: Tensor | None,
    value_root: Tensor | None,
    tail_key: Tensor,
    tail_value: Tensor,
    packed: Tensor,
    age: Tensor,
    tickets: Tensor,
    residual: Tensor,
    k_bits: int,
    v_bits: int,
) -> None:
    """See ``fixed_api.pack_group``."""
    buffers = FixedPacked(
        k_bits, v_bits, packed_key, packed_value, key_step, key_min, value_step, value_min, value_root, tail_key,
        tail_value, packed, age, tickets,
    )  # fmt: skip
    if not triton_reasons((tail_key, packed_key)) and {k_bits, v_bits} <= {2, 4, 8}:
        from . import fixed_triton

        fixed_triton.pack_group(buffers, residual)
    else:
        fixed_plain.pack_group(buffers, residual)


@pack_group_op.register_fake
def _(*given: object) -> None:
    return None
