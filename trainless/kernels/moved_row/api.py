"""``moved_row``: checks, and the choice of a form."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..dispatch import Choice, compiled_form, triton_reasons, watched
from .operator import moved_row_op, unlooped
from .reference import MovedRow
from .reference import moved_row as in_torch


def choose(row: MovedRow) -> Choice:
    """Which form ``moved_row`` runs for this call."""
    why = (*triton_reasons((row.query, row.key)), "triton: there is no such kernel")
    unlike = unlooped(row)
    return Choice("torch", (*why, *unlike)) if unlike else Choice("numba", why)


def moved_row(row: MovedRow) -> Tensor:
    """Attention (B, H, 1, Dv) of one query row, in which keys in ``source`` keep ``keep`` of their probability.

    What is freed goes to every other key that the row sees, in proportion to what each has; a row that sees none of
    those stays as it is, as heads do that are not named. query (B, H, 1, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv).
    source: bool (B, h, Lk), a row for each of the h heads that are named. keep: a number from 0 to 1. visible: bool
    (1 or B, 1 or H, 1, Lk), None for all keys.

    In float32 at least, cast once. One registered operator, ``trainless::moved_row``; on the CPU loops that Numba
    compiles, which read keys in half precision as they lie and are called past the operator unless somebody looks at
    operators. Raises InputError when shapes do not fit.
    """
    _check(row)
    if not row.query.is_cuda:
        if not unlooped(row):
            form = compiled_form(__package__)[0]
            assert form is not None
            looped: Tensor = form.moved_row(row)
            return looped
        if not watched(row[:4]):
            return in_torch(row)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in row[:3]):
        return in_torch(row)
    heads = None if row.heads is None else list(row.heads)
    terms = row.terms
    out: Tensor = moved_row_op(
        row.query, row.key, row.value, row.source, row.visible, terms.sink_logits, heads, row.keep, terms.scale,
        terms.softcap,
    )  # fmt: skip
    return out


def _check(row: MovedRow) -> None:
    (b, h, rows, d), (kb, hkv, lk, kd) = row.query.shape, row.key.shape
    count = h if row.heads is None else len(row.heads)
    if (rows, kb, kd) != (1, b, d) or not hkv or h % hkv or row.value.shape[:3] != row.key.shape[:3]:
        raise InputError(
            f"moved_row: query {tuple(row.query.shape)}, key {tuple(row.key.shape)} and value "
            f"{tuple(row.value.shape)} do not fit; one row is needed"
        )
    if row.source.dtype != torch.bool or row.source.shape != (b, count, lk):
        raise InputError(
            f"source {row.source.dtype} {tuple(row.source.shape)}: bool {(b, count, lk)} is needed"
        )
    if row.heads and not 0 <= min(row.heads) <= max(row.heads) < h:
        raise InputError(f"heads={row.heads}: numbers from 0 to {h - 1} are needed")
    if not 0 <= row.keep <= 1:
        raise InputError(f"keep={row.keep}: a part of the probability, from 0 to 1")
    seen = row.visible
    if seen is not None and (
        seen.dtype != torch.bool or seen.dim() != 4 or seen.shape[0] not in (1, b) or seen.shape[1] not in (1, h)
        or seen.shape[2:] != (1, lk)
    ):  # fmt: skip
        raise InputError(
            f"visible {seen.dtype} {tuple(seen.shape)}: bool {(b, h, 1, lk)} is needed, or 1 in a place"
        )
    if row.terms.position_bias is not None:
        raise InputError("moved_row: a bias on the logits is not supported")
