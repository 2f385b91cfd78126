# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``group_mass``: one program per tile of asked rows, which walks over the keys once.

Rows are picked by number, so that those nobody asked about cost nothing. Registered as
``trainless::group_mass``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..tiles import finish, launch, load_rows, mask_arguments, mask_operands, product, width_of
from ..visibility import Visibility


@triton.jit
def _group_mass(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d,
    mass, lse, given, groups, g_b, g_h, index, filled, sinks,
    heads, share, lq, lk, d, scale,
    softcap, window, keys, keys_b, keys_k, hidden,
    mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, GIVEN: tl.constexpr, EXACT: tl.constexpr,
    COUNT: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1).to(tl.int64)
    b, h = lane // heads, lane % heads
    slot = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = slot < tl.load(filled + b)
    rows = tl.load(index + b * lq + slot, mask=slot < lq, other=0)
    offset = lk - lq
    query = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, here, d, BD)
    number = tl.arange(0, BG)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.full((BM,), 0.0, tl.float32)
    held = tl.full((BM, BG), 0.0, tl.float32)
    # No row of the tile sees a key behind its last one.
    hi = lk
    if CAUSAL:
        hi = tl.minimum(lk, tl.max(tl.where(here, rows, -1), 0) + offset + 1)
    for start in range(0, hi, BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        key = load_rows(k + b * k_b + (h // share) * k_h, cols, k_n, k_d, cols < lk, d, BD)
        z = finish(
            product(query, key, EXACT) * scale, rows, cols, cols < lk, b, h, lq, lk, offset,
            softcap, window, keys, keys_b, keys_k, hidden,
            mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
            CAUSAL, WINDOW, CAP, KEYS, MASK, BIAS,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(z - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        of = tl.load(groups + b * g_b + (h // share) * g_h + cols, mask=cols < lk, other=0)
        held = held * shrink[:, None]
        for g in tl.static_range(COUNT):
            some = tl.sum(tl.where((of == g + 1)[None, :], p, 0.0), 1)
            held += tl.where((number == g)[None, :], some[:, None], 0.0)
        top = higher
    blind = top == float("-inf")
    base = tl.where(blind, 0.0, top)
    if GIVEN:
        final = tl.load(given + lane * lq + rows, mask=here, other=0.0)
        blind = blind | (final == float("-inf"))
        final = tl.where(blind, 0.0, final)
        held = held * tl.exp(base - final)[:, None]
    else:
        if SINKS:
            sink = tl.load(sinks + h).to(tl.float32)
            higher = tl.maximum(base, sink)
            shrink = tl.exp(base - higher)
            total = total * shrink + tl.exp(sink - higher)
            held = held * shrink[:, None]
            base = higher
        divisor = tl.where(blind, 1.0, total)
        final = base + tl.log(divisor)
        held = held / divisor[:, None]
    part = tl.where(blind[:, None], 0.0, held)
    at = mass + (lane * lq + rows)[:, None] * COUNT + number[None, :]
    tl.store(at, part, mask=here[:, None] & (number < COUNT)[None, :])
    tl.store(lse + lane * lq + rows, tl.where(blind, float("-inf"), final), mask=here)


@torch.library.custom_op("trainless::group_mass", mutates_args=())
def group_mass_op(
    query: Tensor,
    key: Tensor,
    groups: Tensor,
    count: int,
    rows: Tensor | None,
    given: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    keys: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """groups (B, 1|Hkv, Lk) int32; rows (B, Lq) bool; given (B, H, Lq) float32."""
    b, h, lq, d = query.shape
    lk = key.shape[2]
    mass = torch.zeros(b, h, lq, count, dtype=torch.float32, device=query.device)
    lse = torch.full((b, h, lq), -torch.inf, dtype=torch.float32, device=query.device)
    asked = torch.ones(b, lq, dtype=torch.bool, device=query.device) if rows is None else rows
    # Asked rows first, in order: no size has to come back to the host.
    index = torch.argsort(asked.to(torch.uint8), dim=1, descending=True, stable=True)
    width = width_of(d)
    sizes = launch("group_mass", width, query)
    groups = groups.contiguous()
    _group_mass[(triton.cdiv(lq, sizes["BM"]), b * h)](
        query, *query.stride(), key, *key.stride(), mass, lse,
        lse if given is None else given.contiguous(), groups, groups.stride(0),
        0 if groups.shape[1] == 1 else groups.stride(1), index, asked.sum(1),
        query if sinks is None else sinks.contiguous(),
        h, h // key.shape[1], lq, lk, d, scale,
        **mask_arguments(query, softcap, causal, window, keys, mask, bias),
        SINKS=sinks is not None, GIVEN=given is not None, EXACT=query.dtype == torch.float32,
        COUNT=count, BG=triton.next_power_of_2(count), BD=width, **sizes,
    )  # fmt: skip
    return mass, lse


@group_mass_op.register_fake
def _(query, key, groups, count, rows, given, scale, causal, window, keys, mask, bias, softcap, sinks):
    b, h, lq, _ = query.shape
    return (
        query.new_empty(b, h, lq, count, dtype=torch.float32),
        query.new_empty(b, h, lq, dtype=torch.float32),
    )


def group_mass(
    query: Tensor,
    key: Tensor,
    *,
    groups: Tensor,
    count: int,
    rows: Tensor | None,
    lse: Tensor | None,
    visibility: Visibility,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """See ``api.group_mass``."""
    found: tuple[Tensor, Tensor] = group_mass_op(
        query, key, groups.to(torch.int32), count, rows, None if lse is None else lse.float(), terms.scale,
        *mask_operands(visibility), terms.position_bias, terms.softcap, terms.sink_logits,
    )  # fmt: skip
    return found
