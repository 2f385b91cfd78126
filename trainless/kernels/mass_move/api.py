"""``mass_move``: checks, and the choice of a form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InputError
from ..column_mass import RowScale
from ..common import Terms, check_heads, check_shapes
from ..dispatch import Choice, triton_reasons
from ..lse.api import triton_shape_reasons
from ..visibility import Visibility
from . import blocked


def choose(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, terms: Terms, target: Tensor | None
) -> Choice:
    """Which form ``mass_move`` runs for this call."""
    why = triton_reasons((query, key, value)) + triton_shape_reasons(query, value, visibility)
    if target is not None:
        why += ("triton: a target other than all the remaining keys",)
    return Choice("blocked", why) if why else Choice("triton")


def mass_move(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    source: Tensor,
    keep: float | Tensor,
    target: Tensor | None = None,
    rows: Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    visibility: Visibility,
    scale: float,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    row_scale: RowScale | None = None,
) -> Tensor:
    """The output that attention would have if keys in ``source`` kept ``keep`` of their probability.

    The freed part goes to ``target``, in proportion to what each of its keys has; None means every other
    key that the row sees. Proportions inside each group and the sum of a row stay. A row stays as it is
    where it sees no target, where it is not in ``rows``, and where keep is 1.

    query, key, value: the call, see ``attention``. out (B, H, Lq, Dv), lse (B, H, Lq): its results, of the
    same scale, bias, cap and sinks. heads: the h query heads to edit, None for all. source, target: bool
    (B, h, Lk), disjoint. keep: a number in [0, 1] or a tensor broadcastable to (B, h, Lq). rows: bool
    (B, 1|h, Lq). row_scale: how ``out`` was normalised, (B, H, Lq), where ``attention_and_mass`` made it.

    Returns a new tensor like ``out`` (``out`` itself when no head has a source); heads that are not chosen
    are the same bits. Computed in float32 (float64 for float64 input) and cast once. Raises InputError on
    shapes that do not fit.
    """
    terms = Terms(scale, position_bias, softcap, sink_logits)
    check_shapes(query, key, value, visibility, terms)
    b, h, lq, _ = query.shape
    chosen = check_heads(heads, h)
    count, lk = h if chosen is None else len(chosen), key.shape[2]
    for name, mask in (("source", source), ("target", target)):
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (b, count, lk)):
            raise InputError(f"{name} {mask.dtype} {tuple(mask.shape)}: bool {(b, count, lk)} is needed")
    if rows is not None and (rows.dtype != torch.bool or not _broadcasts(rows, (b, count, lq))):
        raise InputError(f"rows {rows.dtype} {tuple(rows.shape)}: bool {(b, count, lq)} is needed")
    if isinstance(keep, Tensor):
        if keep.dim() and not _broadcasts(keep, (b, count, lq)):
            raise InputError(
                f"keep {tuple(keep.shape)}: something broadcastable to {(b, count, lq)} is needed"
            )
    elif not 0 <= keep <= 1:
        raise InputError(f"keep={keep}: a part of the probability, from 0 to 1")
    if tuple(out.shape[:3]) != (b, h, lq) or tuple(lse.shape) != (b, h, lq):
        raise InputError(f"out {tuple(out.shape)} and lse {tuple(lse.shape)} do not fit {(b, h, lq)}")
    name = choose(query, key, value, visibility=visibility, terms=terms, target=target).name
    if name == "triton":
        from .triton import mass_move as on_triton

        return on_triton(
            query, key, value, out, lse, source=source, keep=keep, rows=rows, heads=chosen,
            visibility=visibility, terms=terms,
        )  # fmt: skip
    return blocked.mass_move(
        query, key, value, out, lse, source=source, keep=keep, target=target, rows=rows, heads=chosen,
        visibility=visibility, terms=terms, row_scale=row_scale,
    )  # fmt: skip


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.dim() == len(shape) and all(n in (1, m) for n, m in zip(tensor.shape, shape, strict=True))
