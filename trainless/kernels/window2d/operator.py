"""``window2d`` as one operator of a compiled graph, which chooses its form when it runs.

The forms in torch are hundreds of small calls whose number follows from the grid, and the others are no calls of
torch at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import statistics_dtype
from .window import Window2d


@torch.library.custom_op("trainless::window2d_call", mutates_args=())
def window2d_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    rows: int,
    columns: int,
    radius: float,
    shape: str,
    dilation: int,
    text: int,
    text_first: bool,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``api.window2d``; the arguments between are those of ``Window2d``."""
    from . import api

    window = Window2d((rows, columns), radius, shape, dilation, text, text_first)
    extra = None if extra_key is None or extra_value is None else (extra_key, extra_value)
    out, lse = api.window2d(query, key, value, window=window, scale=scale, extra=extra)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


@window2d_call.register_fake
def _(query, key, value, scale, rows, columns, radius, shape, dilation, text, text_first, ek, ev):  # type: ignore[no-untyped-def]
    b, h, n, _ = query.shape
    out = query.new_empty(b, n, h, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(b, h, n, dtype=statistics_dtype(query))
