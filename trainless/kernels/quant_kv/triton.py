# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of attention on packed keys and values: one program per (batch row, key head, span of slots).

Each program reads the codes of its slots once, for all query rows of the key head, and keeps a running maximum and
sum; the spans are merged by their log-sum-exp. Logits are written out as well: the caller makes probabilities of
them. Registered as ``trainless::packed_rows``. On an H100 a step is slower than a stock one, since a call is some
thirty launches (benchmarks/results/quant-decode-nvidia-h100-80gb-hbm3.md): what it saves there is memory. Products
of half precision run as TF32, to which packed numbers are exact enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..tiles import multiply
from .format import RAW, Segment, per_byte

SPAN = 1024  # slots per program, at most
TILE = 64  # slots of a tile
PROGRAMS = 528  # that a long cache is shared among: four for each multiprocessor of the largest GPUs


@triton.jit
def _packed(
    q, key, key_step, key_min, value, value_step, value_min, value_root, valid, logits, out, lse,
    r, d, kw, vw, size, groups, slots, span, spans, scale, softcap,
    KBITS: tl.constexpr, VBITS: tl.constexpr, KPER: tl.constexpr, VPER: tl.constexpr, VALID: tl.constexpr,
    EXACT: tl.constexpr, ONE: tl.constexpr, CAP: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BR)
    wide = tl.arange(0, BK)
    wide_v = tl.arange(0, BV)
    first = part * span
    best = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.full((BR,), 0.0, tl.float32)
    # One sum per run of channels that shares a place in its byte.
    acc0 = tl.zeros((BR, BV), tl.float32)
    acc1 = tl.zeros((BR, BV), tl.float32)
    acc2 = tl.zeros((BR, BV), tl.float32)
    acc3 = tl.zeros((BR, BV), tl.float32)
    for start in range(0, tl.minimum(span, slots - first), BN):  # no tile of slots that do not exist
        cols = first + start + tl.arange(0, BN)
        here = (cols < slots) & (start + tl.arange(0, BN) < span)
        group = cols // size
        at = lane * slots + cols
        z = tl.zeros((BR, BN), tl.float32)
        for p in tl.static_range(KPER):
            chan = p * kw + wide
            in_d = wide < kw
            query = tl.load(
                q + (lane * r + rows[:, None]) * d + chan[None, :],
                mask=(rows[:, None] < r) & in_d[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            raw = tl.load(key + at[:, None] * kw + wide[None, :], mask=here[:, None] & in_d[None, :], other=0)
            if KBITS == 16:
                k = raw.to(tl.float32)
            else:
                code = ((raw >> (KBITS * p)) & ((1 << KBITS) - 1)).to(tl.float32)
                if ONE:  # the slots of a tile are of one group: its steps are read once
                    where = (lane * groups + (first + start) // size) * d + chan
                    step = tl.load(key_step + where, mask=in_d, other=0.0).to(tl.float32)
                    least = tl.load(key_min + where, mask=in_d, other=0.0).to(tl.float32)
                    k = code * step[None, :] + least[None, :]
                else:
                    where = (lane * groups + group[:, None]) * d + chan[None, :]
                    seen = here[:, None] & in_d[None, :]
                    step = tl.load(key_step + where, mask=seen, other=0.0).to(tl.float32)
                    least = tl.load(key_min + where, mask=seen, other=0.0).to(tl.float32)
                    k = code * step + least
            z += multiply(query, tl.trans(k), EXACT)
        z = z * scale
        if CAP:
            e = tl.exp(-2.0 * tl.abs(z / softcap))
            t = (1.0 - e) / (1.0 + e)
            z = softcap * tl.where(z < 0, -t, t)
        shown = here[None, :] & (rows[:, None] < r)
        if VALID:
            ok = tl.load(valid + (lane * r + rows[:, None]) * slots + cols[None, :], mask=shown, other=0)
            z = tl.where(ok != 0, z, float("-inf"))
        z = tl.where(here[None, :], z, float("-inf"))
        tl.store(logits + (lane * r + rows[:, None]) * slots + cols[None, :], z, mask=shown)
        top = tl.maximum(best, tl.max(z, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp(best - safe)
        w = tl.exp(z - safe[:, None])
        total = total * fade + tl.sum(w, 1)
        best = top
        for p in tl.static_range(VPER):
            in_v = wide_v < vw
            raw = tl.load(
                value + at[:, None] * vw + wide_v[None, :], mask=here[:, None] & in_v[None, :], other=0
            )
            if VBITS == 16:
                v = raw.to(tl.float32)
            else:
                code = ((raw >> (VBITS * p)) & ((1 << VBITS) - 1)).to(tl.float32)
                step = tl.load(value_step + at, mask=here, other=0.0).to(tl.float32)
                least = tl.load(value_min + at, mask=here, other=0.0).to(tl.float32)
                if ONE:
                    of = (
                        value_root + (lane * groups + (first + start) // size) * (vw * VPER) + p * vw + wide_v
                    )
                    root = tl.load(of, mask=in_v, other=0.0).to(tl.float32)
                    v = (code * step[:, None] + least[:, None]) * root[None, :]
                else:
                    of = (
                        value_root + (lane * groups + group[:, None]) * (vw * VPER) + p * vw + wide_v[None, :]
                    )
                    root = tl.load(of, mask=here[:, None] & in_v[None, :], other=0.0).to(tl.float32)
                    v = (code * step[:, None] + least[:, None]) * root
            add = multiply(w, v, EXACT)
            if p == 0:
                acc0 = acc0 * fade[:, None] + add
            if p == 1:
                acc1 = acc1 * fade[:, None] + add
            if p == 2:
                acc2 = acc2 * fade[:, None] + add
            if p == 3:
                acc3 = acc3 * fade[:, None] + add
    norm = tl.where(total > 0, total, 1.0)
    tl.store(
        lse + (lane * spans + part) * r + rows,
        tl.where(total > 0, best + tl.log(norm), float("-inf")), mask=rows < r,
    )  # fmt: skip
    base = out + ((lane * spans + part) * r + rows[:, None]) * (vw * VPER) + wide_v[None, :]
    inside = (rows[:, None] < r) & (wide_v[None, :] < vw)
    tl.store(base, acc0 / norm[:, None], mask=inside)
    if VPER > 1:
        tl.store(base + vw, acc1 / norm[:, None], mask=inside)
    if VPER > 2:
        tl.store(base + 2 * vw, acc2 / norm[:, None], mask=inside)
        tl.store(base + 3 * vw, acc3 / norm[:, None], mask=inside)


def _span(lanes: int, slots: int) -> int:
    """Slots per program: short enough that there are programs for all multiprocessors."""
    share = -(-slots * lanes // (PROGRAMS * TILE)) * TILE
    return min(SPAN, max(2 * TILE, share))


@torch.library.custom_op("trainless::packed_rows", mutates_args=())
def packed_rows_op(
    query: Tensor,
    key: Tensor,
    key_step: Tensor | None,
    key_min: Tensor | None,
    value: Tensor,
    value_step: Tensor | None,
    value_min: Tensor | None,
    value_root: Tensor | None,
    valid: Tensor | None,
    k_bits: int,
    v_bits: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, Hkv, r, D); one segment's tensors; valid (B, Hkv, r, slots).

    Returns logits (B, Hkv, r, slots), and per span the output (B, Hkv, spans, r, Dv) and log-sum-exp.
    """
    b, hkv, r, d = query.shape
    groups, size, kw = key.shape[2:]
    vw, slots = value.shape[4], groups * size
    kper, vper = per_byte(k_bits), per_byte(v_bits)
    span = _span(b * hkv, slots)
    spans = max(1, triton.cdiv(slots, span))
    logits = torch.empty(b, hkv, r, slots, dtype=torch.float32, device=query.device)
    out = torch.empty(b, hkv, spans, r, vw * vper, dtype=torch.float32, device=query.device)
    lse = torch.empty(b, hkv, spans, r, dtype=torch.float32, device=query.device)
    none = query
    given = [
        t.contiguous() if t is not None else none
        for t in (key, key_step, key_min, value, value_step, value_min, value_root)
    ]
    mask = none if valid is None else valid.contiguous().view(torch.uint8)
    _packed[(b * hkv, spans)](
        query.contiguous(), *given, mask, logits, out, lse,
        r, d, kw, vw, size, groups, slots, span, spans, scale, softcap or 1.0,
        KBITS=k_bits, VBITS=v_bits, KPER=kper, VPER=vper, VALID=valid is not None, CAP=softcap is not None,
        EXACT=query.dtype == torch.float32, ONE=groups == 1 or (size % TILE == 0 and span % TILE == 0),
        BR=max(16, triton.next_power_of_2(r)), BN=TILE,
        BK=max(16, triton.next_power_of_2(kw)), BV=max(16, triton.next_power_of_2(vw)),
    )  # fmt: skip
    return logits, out, lse


@packed_rows_op.register_fake
def _(
    query,
    key,
    key_step,
    key_min,
    value,
    value_step,
    value_min,
    value_root,
    valid,
    k_bits,
    v_bits,
    scale,
    softcap,
):
    b, hkv, r, _ = query.shape
    slots = key.shape[2] * key.shape[3]
    spans = max(1, -(-slots // _span(b * hkv, slots)))
    wide = value.shape[4] * per_byte(v_bits)
    make = lambda *shape: query.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return make(b, hkv, r, slots), make(b, hkv, spans, r, wide), make(b, hkv, spans, r)


def rows(
    query: Tensor, segments: Sequence[Segment], terms: Terms, valid: Tensor | None = None, lse: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``api.packed_rows``."""
    b, h, lq, d = query.shape
    hkv = segments[0].key.shape[1]
    share = h // hkv
    q = query.reshape(b, hkv, share * lq, d)
    if valid is not None:
        seen = valid.unflatten(1, (hkv, -1)) if valid.shape[1] == h else valid[:, :, None]
        valid = seen.expand(b, hkv, share, lq, valid.shape[3]).reshape(b, hkv, share * lq, -1)
    logits: list[Tensor] = []
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    start = 0
    for s in segments:
        if not s.slots:
            continue
        mine = None if valid is None else valid[..., start : start + s.slots]
        found = packed_rows_op(
            q, s.key, s.key_step, s.key_min, s.value, s.value_step, s.value_min, s.value_root, mine,
            s.k_bits, s.v_bits, terms.scale, terms.softcap,
        )  # fmt: skip
        for into, tensor in zip((logits, outs, sums), found, strict=True):
            into.append(tensor)
        start += s.slots
    weights, parts = torch.cat(sums, 2), torch.cat(outs, 2)
    total = torch.logsumexp(weights, 2)
    share_of = torch.exp(weights - total[:, :, None]).nan_to_num(0.0)[..., None]
    out = (parts * share_of).sum(2)
    p = torch.exp(torch.cat(logits, 3) - total[..., None]).nan_to_num(0.0)
    return out.view(b, h, lq, -1).to(query.dtype), p.view(b, h, lq, -1), total.view(b, h, lq) if lse else None


assert RAW == 16  # written out in the kernel
