"""``trainless::moved_row``: one row with moved probability as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Terms
from ..dispatch import compiled_form, numba_reasons
from .reference import MovedRow
from .reference import moved_row as in_torch

LOOPED = (torch.float32, torch.bfloat16, torch.float16)


def unlooped(row: MovedRow) -> tuple[str, ...]:
    """Why the loops that Numba compiles cannot do a row; empty when they can."""
    query, key, value = row.query, row.key, row.value
    if query.dtype not in LOOPED or not query.dtype == key.dtype == value.dtype:
        return (f"numba: one dtype of at most 32 bits is needed, got {query.dtype} and {key.dtype}",)
    if why := numba_reasons((query, key, value)):
        return why
    if key.stride()[2:] != (key.shape[3], 1) or value.stride()[2:] != (value.shape[3], 1):
        return ("numba: tokens of a head do not lie one behind the other",)
    return compiled_form(__package__)[1]


@torch.library.custom_op("trainless::moved_row", mutates_args=())
def moved_row_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    source: Tensor,
    visible: Tensor | None,
    sinks: Tensor | None,
    heads: list[int] | None,
    keep: float,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """See ``api.moved_row``."""
    named = None if heads is None else tuple(heads)
    row = MovedRow(query, key, value, source, keep, Terms(scale, None, softcap, sinks), visible, named)
    if not query.is_cuda and not unlooped(row):
        form = compiled_form(__package__)[0]
        assert form is not None
        looped: Tensor = form.moved_row(row)
        return looped
    return in_torch(row)


@moved_row_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
