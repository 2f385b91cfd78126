"""``group_mass``: checks, and the choice of a form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..common import Terms, check_shapes
from ..dispatch import Choice, triton_reasons
from ..lse.api import triton_shape_reasons
from ..visibility import Visibility
from . import blocked

MOST = 8  # groups that the Triton form takes


def choose(query: Tensor, key: Tensor, *, visibility: Visibility, count: int) -> Choice:
    """Which form ``group_mass`` runs for this call."""
    why = triton_reasons((query, key)) + triton_shape_reasons(query, key, visibility)
    if count > MOST:
        why += (f"triton: {count} groups, more than {MOST}",)
    return Choice("blocked", why) if why else Choice("triton")


def group_mass(
    query: Tensor,
    key: Tensor,
    *,
    groups: Tensor,
    count: int,
    rows: Tensor | None = None,
    lse: Tensor | None = None,
    visibility: Visibility,
    scale: float,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How much of its probability each row has on each group of keys.

    query (B, H, Lq, D), key (B, Hkv, Lk, D), see ``attention``. groups: integers (B, 1|Hkv, Lk), the group
    (1 to ``count``) that each key belongs to, 0 for none. rows: bool (B, Lq), the rows asked about, None for
    all; the others cost nothing. lse (B, H, Lq): what the logits are normalised by, None to find it out.

    Returns masses (B, H, Lq, count) and lse (B, H, Lq), in float32 (float64 for float64 input); in rows
    that were not asked about 0 and -inf, as in rows that see nothing. Raises InputError on shapes that do
    not fit.
    """
    terms = Terms(scale, position_bias, softcap, sink_logits)
    check_shapes(query, key, None, visibility, terms)
    b, h, lq, _ = query.shape
    hkv, lk = key.shape[1:3]
    if (
        groups.is_floating_point() or groups.dtype == torch.bool
        or tuple(groups.shape) not in {(b, 1, lk), (b, hkv, lk)}
    ):  # fmt: skip
        raise InputError(
            f"groups {groups.dtype} {tuple(groups.shape)}: integers {(b, 1, lk)} or {(b, hkv, lk)} are needed"
        )
    if count < 1:
        raise InputError(f"count={count}: name at least one group")
    if rows is not None and (rows.dtype != torch.bool or tuple(rows.shape) != (b, lq)):
        raise InputError(f"rows {rows.dtype} {tuple(rows.shape)}: bool {(b, lq)} is needed")
    if lse is not None and tuple(lse.shape) != (b, h, lq):
        raise InputError(f"lse {tuple(lse.shape)} does not fit {(b, h, lq)}")
    options: dict[str, Any] = {"groups": groups, "count": count, "rows": rows, "lse": lse, "terms": terms}
    if choose(query, key, visibility=visibility, count=count).name == "triton":
        from .triton import group_mass as on_triton

        return on_triton(query, key, visibility=visibility, **options)
    return blocked.group_mass(query, key, visibility=visibility, **options)
