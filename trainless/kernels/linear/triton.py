# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``linear_attention``: two launches, sums over pieces of keys and products with them; and causal.

Without a causal mask the keys are cut into pieces, one program each. The last program of every CLUSTER pieces adds up
their sums, and the last cluster of a lane adds up those: always in the same order, the same bits every time. Then each
program holds the sums and walks over tiles of queries. The causal form cuts the keys likewise: a kernel between gives
every piece the sums of those before it, and a program begins with these and walks through its piece in chunks.
Registered as ``trainless::linear_reduce``, ``linear_apply`` and ``linear_causal``.

Features and sums are float32. For half-precision inputs each is the sum of two numbers of the inputs' type, and products
run in that type: twice as exact as TF32, and the inputs need not be widened.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import load_rows, width_of
from ..visibility import Visibility

CODES = {"elu": 0, "relu": 1, "softmax": 2}
SPANS = 264  # programs that share the keys, or the queries, of all heads: two per multiprocessor
CLUSTER = 8  # pieces whose sums one program adds up
BV = 64  # columns of the value that a program works on: sums of 128 x 64 fit into registers


@triton.jit
def features(x, valid, d, FEATURE: tl.constexpr, BD: tl.constexpr):
    """phi of rows of float32 (n, BD); zero in rows that do not count and past the width d."""
    inside = (tl.arange(0, BD) < d)[None, :]
    if FEATURE == 0:
        phi = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == 1:
        phi = tl.maximum(x, 0.0)
    else:
        z = tl.where(inside, x, float("-inf"))
        e = tl.exp(z - tl.max(z, 1)[:, None])
        phi = e / tl.sum(e, 1)[:, None]
    return tl.where(inside & valid[:, None], phi, 0.0)


@triton.jit
def load_keys(k, v, keys, at, cols, k_n, k_d, v_n, v_d, keys_k, lk, d, dv,
              FEATURE: tl.constexpr, KEYS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """(phi(k), v, exists) of the keys ``cols``; keys that do not exist are zero in both."""
    there = cols < lk
    if KEYS:
        there = there & (tl.load(keys + cols * keys_k, mask=there, other=0) != 0)
    phi = features(load_rows(k, cols, k_n, k_d, there, d, BD).to(tl.float32), there, d, FEATURE, BD)
    value = load_rows(v + at * v_d, cols, v_n, v_d, there, dv - at, BV)
    return phi, value, there


@triton.jit
def halves(x, like):
    """x of float32 as (high, low) of the type of ``like``, whose sum is x to twice its digits."""
    high = x.to(like.dtype)
    return high, (x - high.to(tl.float32)).to(like.dtype)


@triton.jit
def times_values(x, value, acc, EXACT: tl.constexpr):
    """acc + x @ value: x of float32, value of the inputs' type."""
    if EXACT:
        return tl.dot(x, value, acc, input_precision="ieee")
    high, low = halves(x, value)
    return tl.dot(high, value, tl.dot(low, value, acc))


@triton.jit
def times(x, y, acc, like, EXACT: tl.constexpr):
    """acc + x @ y, both of float32."""
    if EXACT:
        return tl.dot(x, y, acc, input_precision="ieee")
    x_high, x_low = halves(x, like)
    y_high, y_low = halves(y, like)
    return tl.dot(x_high, y_high, tl.dot(x_high, y_low, tl.dot(x_low, y_high, acc)))


@triton.jit
def add_up(first, step, count, BD: tl.constexpr, BV: tl.constexpr):
    """(sums (BD, BV), of features (BD,), number of keys) of ``count`` records, ``step`` numbers apart, in order."""
    rows, wide = tl.arange(0, BD), tl.arange(0, BV)
    sums = tl.zeros((BD, BV), tl.float32)
    mean = tl.zeros((BD,), tl.float32)
    keys = 0.0
    for record in range(count):
        at = first + record * step
        sums += tl.load(at + rows[:, None] * BV + wide[None, :])
        mean += tl.load(at + BD * BV + rows)
        keys += tl.load(at + BD * BV + BD)
    return sums, mean, keys


@triton.jit
def put(at, sums, mean, keys, BD: tl.constexpr, BV: tl.constexpr):
    """One such record."""
    rows, wide = tl.arange(0, BD), tl.arange(0, BV)
    tl.store(at + rows[:, None] * BV + wide[None, :], sums)
    tl.store(at + BD * BV + rows, mean)
    tl.store(at + BD * BV + BD, keys)


@triton.jit
def _reduce(
    k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d, keys, keys_b, keys_k, records, tickets, state, total,
    hkv, lk, d, dv, origin, span, pieces, clusters, each,
    FEATURE: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, CLUSTER: tl.constexpr,
):  # fmt: skip
    """records (lanes, tiles of the value, pieces, each); with WHOLE also the means over all pieces: state, total."""
    part, lane, at = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    b, g = lane // hkv, lane % hkv
    acc = tl.full((BD, BV), 0.0, tl.float32)
    mean = tl.full((BD,), 0.0, tl.float32)
    count = tl.full((BN,), 0.0, tl.float32)
    begin = origin + part * span
    for start in range(begin, tl.minimum(begin + span, lk), BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        phi, value, there = load_keys(
            k + b * k_b + g * k_h, v + b * v_b + g * v_h, keys + b * keys_b, at, tl.where(cols < 0, lk, cols),
            k_n, k_d, v_n, v_d, keys_k, lk, d, dv, FEATURE, KEYS, BD, BV,
        )  # fmt: skip
        acc = times_values(tl.trans(phi), value, acc, EXACT)
        mean += tl.sum(phi, 0)
        count += tl.where(there, 1.0, 0.0)
    tile = lane * tl.num_programs(2) + tl.program_id(2)
    base = records + tile * pieces * each
    put(base + part * each, acc, mean, tl.sum(count, 0), BD, BV)
    if WHOLE:
        tl.debug_barrier()
        own = tickets + tile * (1 + clusters)
        cluster = part // CLUSTER
        many = tl.minimum(pieces - cluster * CLUSTER, CLUSTER)
        if tl.atomic_add(own + 1 + cluster, 1) == many - 1:
            lead = base + cluster * CLUSTER * each
            acc, mean, found = add_up(lead, each, many, BD, BV)
            tl.debug_barrier()
            put(lead, acc, mean, found, BD, BV)
            tl.debug_barrier()
            if tl.atomic_add(own, 1) == clusters - 1:
                acc, mean, found = add_up(base, CLUSTER * each, clusters, BD, BV)
                found = tl.maximum(found, 1.0)
                rows, wide = tl.arange(0, BD), at + tl.arange(0, BV)
                where = state + (lane * d + rows[:, None]) * dv + wide[None, :]
                tl.store(where, acc / found, mask=(rows[:, None] < d) & (wide[None, :] < dv))
                if at == 0:
                    tl.store(total + lane * d + rows, mean / found, mask=rows < d)


@triton.jit
def _apply(
    q, q_b, q_h, q_n, q_d, state, total, out,
    heads, share, lq, d, dv, eps,
    FEATURE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Tiles of BM queries, as many apart as there are programs of a lane; the sums stay where they are."""
    lane, at = tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    b, h = lane // heads, lane % heads
    g = lane // share
    inside, wide = tl.arange(0, BD), at + tl.arange(0, BV)
    where = state + (g * d + inside[:, None]) * dv + wide[None, :]
    sums = tl.load(where, mask=(inside[:, None] < d) & (wide[None, :] < dv), other=0.0)
    mean = tl.load(total + g * d + inside, mask=inside < d, other=0.0)
    high, low = sums, sums
    if not EXACT:
        high = sums.to(q.dtype.element_ty)
        low = (sums - high.to(tl.float32)).to(q.dtype.element_ty)
    for first in range(tl.program_id(0) * BM, lq, tl.num_programs(0) * BM):
        rows = first + tl.arange(0, BM).to(tl.int64)
        x = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, rows < lq, d, BD).to(tl.float32)
        phi = features(x, rows < lq, d, FEATURE, BD)
        weight = tl.sum(phi * mean[None, :], 1) + eps
        if EXACT:
            found = tl.dot(phi, high, input_precision="ieee")
        else:
            big = phi.to(high.dtype)
            small = (phi - big.to(tl.float32)).to(high.dtype)
            found = tl.dot(big, high, tl.dot(big, low, tl.dot(small, high)))
        found = found / tl.where(weight == 0, 1.0, weight)[:, None]
        tl.store(
            out + (lane * lq + rows[:, None]) * dv + wide[None, :], found.to(out.dtype.element_ty),
            mask=(rows[:, None] < lq) & (wide[None, :] < dv),
        )  # fmt: skip


@triton.jit
def _sums_before(parts, each, pieces, BS: tl.constexpr):
    """parts (lanes, pieces, each): every piece becomes the sum of those before it, in place and always in order."""
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    base = parts + tl.program_id(1).to(tl.int64) * pieces * each + at
    so_far = tl.full((BS,), 0.0, tl.float32)
    for piece in range(0, pieces):
        where = base + piece * each
        mine = tl.load(where, mask=at < each, other=0.0)
        tl.store(where, so_far, mask=at < each)
        so_far += mine


@triton.jit
def _causal(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d, keys, keys_b, keys_k, out,
    records, heads, share, lq, lk, d, dv, origin, span, pieces, each, eps,
    FEATURE: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr, CUT: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    lane, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    b, h = lane // heads, lane % heads
    g = h // share
    offset = lane * 0 + (lk - lq)  # a single token is a constant to the compiler, which has no type to change
    acc = tl.full((BD, BV), 0.0, tl.float32)
    total = tl.full((BD,), 0.0, tl.float32)
    held = 0.0
    wide = at + tl.arange(0, BV)
    part = tl.program_id(2).to(tl.int64)
    if CUT:
        tile = (b * (heads // share) + g) * tl.num_programs(1) + tl.program_id(1)
        acc, total, held = add_up(records + (tile * pieces + part) * each, 0, 1, BD, BV)
    # Chunks of keys in step with the queries that come with them; the first ones have keys only. Key c
    # comes with query c - offset, so a chunk of keys that starts at a multiple of BN meets its own queries.
    begin = origin + part * span
    for start in range(begin, tl.minimum(begin + span, lk), BN):
        cols = start + tl.arange(0, BN).to(tl.int64)
        rows = cols - offset
        phi, value, there = load_keys(
            k + b * k_b + g * k_h, v + b * v_b + g * v_h, keys + b * keys_b, at, tl.where(cols < 0, lk, cols),
            k_n, k_d, v_n, v_d, keys_k, lk, d, dv, FEATURE, KEYS, BD, BV,
        )  # fmt: skip
        asked = (rows >= 0) & (rows < lq)
        x = load_rows(q + b * q_b + h * q_h, rows, q_n, q_d, asked, d, BD).to(tl.float32)
        phi_q = features(x, asked, d, FEATURE, BD)
        lower = cols[:, None] >= cols[None, :]
        none = tl.zeros((BN, BN), tl.float32)
        weights = tl.where(lower, times(phi_q, tl.trans(phi), none, value, EXACT), 0.0)
        products = times(phi_q, acc, tl.zeros((BN, BV), tl.float32), value, EXACT)
        products = times_values(weights, value, products, EXACT)
        weight = tl.sum(weights, 1) + tl.sum(phi_q * total[None, :], 1)
        count = tl.maximum(held + tl.sum(tl.where(lower & there[None, :], 1.0, 0.0), 1), 1.0)
        below = weight / count + eps
        found = products / count[:, None] / tl.where(below == 0, 1.0, below)[:, None]
        tl.store(
            out + (lane * lq + rows[:, None]) * dv + wide[None, :], found.to(out.dtype.element_ty),
            mask=asked[:, None] & (wide[None, :] < dv),
        )  # fmt: skip
        acc = times_values(tl.trans(phi), value, acc, EXACT)
        total += tl.sum(phi, 0)
        held += tl.sum(tl.where(there, 1.0, 0.0), 0)


def _keys(query: Tensor, keys: Tensor | None) -> tuple[Tensor, int, int]:
    """The key mask as bytes with its strides; without one a pointer that is never read."""
    if keys is None:
        return query, 0, 0
    return keys.view(torch.uint8), 0 if keys.shape[0] == 1 else keys.stride(0), keys.stride(1)


@torch.library.custom_op("trainless::linear_reduce", mutates_args=())
def linear_reduce_op(key: Tensor, value: Tensor, keys: Tensor | None, feature: int) -> tuple[Tensor, Tensor]:
    """Means over the keys that exist: of phi(k) vᵀ, (B, Hkv, D, Dv), and of phi(k), (B, Hkv, D); float32."""
    b, hkv, lk, d = key.shape
    dv, width = value.shape[3], width_of(d)
    bn = 64 if width <= 128 else 32
    tiles = triton.cdiv(dv, BV)
    pieces = max(1, min(triton.cdiv(lk, 4 * bn), SPANS // max(1, b * hkv * tiles)))
    span = triton.cdiv(triton.cdiv(lk, pieces), bn) * bn
    pieces = triton.cdiv(lk, span)
    clusters, each = triton.cdiv(pieces, CLUSTER), _record(width)
    records = torch.empty(b * hkv * tiles, pieces, each, dtype=torch.float32, device=key.device)
    tickets = torch.zeros(b * hkv * tiles, 1 + clusters, dtype=torch.int32, device=key.device)
    state = torch.empty(b, hkv, d, dv, dtype=torch.float32, device=key.device)
    total = torch.empty(b, hkv, d, dtype=torch.float32, device=key.device)
    mask, mask_b, mask_k = _keys(key, keys)
    _reduce[(pieces, b * hkv, tiles)](
        key, *key.stride(), value, *value.stride(), mask, mask_b, mask_k, records, tickets, state, total,
        hkv, lk, d, dv, 0, span, pieces, clusters, each,
        FEATURE=feature, KEYS=keys is not None, EXACT=key.dtype == torch.float32, WHOLE=True, BN=bn, BD=width, BV=BV,
        CLUSTER=CLUSTER,
    )  # fmt: skip
    return state, total


def _record(width: int) -> int:
    """Numbers of a record of sums, rounded up so that each begins at a multiple of 64 bytes."""
    return triton.cdiv(width * BV + width + 1, 16) * 16


@linear_reduce_op.register_fake
def _(key, value, keys, feature):
    b, hkv, _, d = key.shape
    state = key.new_empty(b, hkv, d, value.shape[3], dtype=torch.float32)
    return state, key.new_empty(b, hkv, d, dtype=torch.float32)


@torch.library.custom_op("trainless::linear_apply", mutates_args=())
def linear_apply_op(query: Tensor, state: Tensor, total: Tensor, eps: float, feature: int) -> Tensor:
    """phi(q) state / (phi(q)·total + eps): (B, H, Lq, Dv) in the dtype of ``query``."""
    b, h, lq, d = query.shape
    dv, width = state.shape[3], width_of(d)
    bm, tiles = 64 if width <= 128 else 32, triton.cdiv(dv, BV)
    programs = max(1, min(triton.cdiv(lq, bm), triton.cdiv(2 * SPANS, b * h * tiles)))
    out = torch.empty(b, h, lq, dv, dtype=query.dtype, device=query.device)
    _apply[(programs, b * h, tiles)](
        query, *query.stride(), state.contiguous(), total.contiguous(), out,
        h, h // state.shape[1], lq, d, dv, eps,
        FEATURE=feature, EXACT=query.dtype == torch.float32, BM=bm, BD=width, BV=BV,
    )  # fmt: skip
    return out


@linear_apply_op.register_fake
def _(query, state, total, eps, feature):
    return query.new_empty(*query.shape[:3], state.shape[3])


@torch.library.custom_op("trainless::linear_causal", mutates_args=())
def linear_causal_op(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, eps: float, feature: int
) -> Tensor:
    """The causal form: (B, H, Lq, Dv) in the dtype of ``query``."""
    b, h, lq, d = query.shape
    lk, dv = value.shape[2:]
    hkv, width, bn = key.shape[1], width_of(d), 32
    chunk = bn if width <= 64 else bn // 2  # longer ones do not fit into registers
    exact, wide = query.dtype == torch.float32, triton.cdiv(dv, BV)
    out = torch.empty(b, h, lq, dv, dtype=query.dtype, device=query.device)
    mask, mask_b, mask_k = _keys(query, keys)
    # Queries before the first key have chunks too: those begin at a negative number.
    origin = min(lk - lq, 0)
    pieces = max(1, min(triton.cdiv(lk - origin, 4 * bn), SPANS // max(1, b * h * wide)))
    span = triton.cdiv(triton.cdiv(lk - origin, pieces), bn) * bn
    pieces = triton.cdiv(lk - origin, span)
    records, each = out, _record(width)  # never read with one piece
    if pieces > 1:
        records = torch.empty(b * hkv * wide, pieces, each, dtype=torch.float32, device=key.device)
        _reduce[(pieces, b * hkv, wide)](
            key, *key.stride(), value, *value.stride(), mask, mask_b, mask_k, records, records, records, records,
            hkv, lk, d, dv, origin, span, pieces, 1, each,
            FEATURE=feature, KEYS=keys is not None, EXACT=exact, WHOLE=False, BN=bn, BD=width, BV=BV, CLUSTER=CLUSTER,
        )  # fmt: skip
        _sums_before[(triton.cdiv(each, 256), b * hkv * wide)](records, each, pieces, BS=256)
    _causal[(b * h, wide, pieces)](
        query, *query.stride(), key, *key.stride(), value, *value.stride(), mask, mask_b, mask_k, out,
        records, h, h // hkv, lq, lk, d, dv, origin, span, pieces, each, eps,
        FEATURE=feature, KEYS=keys is not None, EXACT=exact, CUT=pieces > 1, BN=chunk, BD=width, BV=BV,
        num_warps=4 if width <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return out


@linear_causal_op.register_fake
def _(query, key, value, keys, eps, feature):
    return query.new_empty(*query.shape[:3], value.shape[3])


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, feature: str, eps: float
) -> Tensor:
    """See ``api.linear_attention``."""
    keys = visibility.keys
    keys = None if keys is None else keys.expand(query.shape[0], -1)
    if visibility.causal:
        return linear_causal_op(query, key, value, keys, eps, CODES[feature])
    state, total = linear_reduce_op(key, value, keys, CODES[feature])
    return linear_apply_op(query, state, total, eps, CODES[feature])
