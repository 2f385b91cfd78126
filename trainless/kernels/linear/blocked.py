"""``linear_attention`` in torch, for any device: sums over blocks of keys, then products with blocks of queries.

Without a causal mask these are two products of 2·N·d·Dv operations each. Queries and keys are widened and
mapped a block at a time, into buffers that stay in the processor's cache, so that the inputs are read once
and the output is written once. Sums are kept in float32 (float64 for float64 input) and are means in the end:
a plain sum over 50,000 keys leaves the range of float16.

With a causal mask the queries go by in chunks: pairs inside a chunk are weighed outright, all earlier keys
are in the running sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import statistics_dtype
from ..visibility import Visibility
from .reference import features

BUFFER = (
    1 << 18
)  # entries of a buffer: 1 MiB in float32; half of it and twice it cost the same on an AVX2 core
CHUNK = 128  # queries that are weighed against their own keys at a time; a power of two near the usual widths


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility, feature: str, eps: float
) -> Tensor:
    """See ``api.linear_attention``."""
    if visibility.causal:
        return _causal(query, key, value, visibility, feature, eps)
    # A graph that is being compiled has no blocks either: their number would be a part of it.
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    ):
        return _whole(query, key, value, visibility, feature, eps)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    b, h, lq, d = query.shape
    # Few rows of the batch at a time, so that blocks are long enough for the products.
    rows = max(1, BUFFER // max(1, h * d * min(512, max(lq, key.shape[2]))))
    for at in range(0, b, rows):
        part = slice(at, at + rows)
        keys = visibility.keys
        if keys is not None and keys.shape[0] > 1:
            keys = keys[part]
        state, total = _reduce(key[part], value[part], keys, feature)
        _apply(query[part], state, total, feature, eps, out[part])
    return out


# ---------------------------------------------------------------- without a causal mask


def _reduce(key: Tensor, value: Tensor, keys: Tensor | None, feature: str) -> tuple[Tensor, Tensor]:
    """Means over the keys that exist: of phi(k) vᵀ, (B·Hkv, D, Dv), and of phi(k), (B·Hkv, D, 1)."""
    b, hkv, lk, d = key.shape
    wide = statistics_dtype(key)
    state = key.new_zeros(b * hkv, d, value.shape[3], dtype=wide)
    total = key.new_zeros(b * hkv, d, 1, dtype=wide)
    step = _step(b * hkv * max(d, value.shape[3]))
    mapped, spare = (key.new_empty(b, hkv, min(step, lk), d, dtype=wide) for _ in range(2))
    held = value.new_empty(*mapped.shape[:3], value.shape[3], dtype=wide)
    for lo in range(0, lk, step):
        n = min(step, lk - lo)
        phi = _map(key[:, :, lo : lo + n], _front(mapped, n), _front(spare, n), feature)
        block = value[:, :, lo : lo + n]
        if keys is not None:
            hidden = ~keys[:, None, lo : lo + n, None]
            phi.masked_fill_(hidden, 0)
            block = _front(held, n).copy_(block).masked_fill_(hidden, 0)
        elif block.dtype != wide:
            block = _front(held, n).copy_(block)
        phi = phi.flatten(0, 1)
        state.baddbmm_(phi.transpose(1, 2), block.flatten(0, 1))
        total += phi.sum(1)[..., None]
    if keys is None:
        return state.div_(max(1, lk)), total.div_(max(1, lk))
    count = keys.sum(1).clamp(min=1).to(wide).expand(b).repeat_interleave(hkv)[:, None, None]
    return state.div_(count), total.div_(count)


def _apply(query: Tensor, state: Tensor, total: Tensor, feature: str, eps: float, out: Tensor) -> None:
    """out = phi(q) state / (phi(q)·total + eps), written into ``out``."""
    b, h, lq, d = query.shape
    groups, dv = state.shape[0], state.shape[2]
    share, wide = b * h // groups, state.dtype
    both = torch.cat([state, total], 2)  # one product gives what stands above and below the line
    step = _step(b * h * max(d, dv))
    mapped, spare = (query.new_empty(b, h, min(step, lq), d, dtype=wide) for _ in range(2))
    products = query.new_empty(groups, share * min(step, lq), dv + 1, dtype=wide)
    for lo in range(0, lq, step):
        n = min(step, lq - lo)
        phi = _map(query[:, :, lo : lo + n], _front(mapped, n), _front(spare, n), feature)
        found = products.view(-1)[: groups * share * n * (dv + 1)].view(groups, share * n, dv + 1)
        torch.bmm(phi.view(groups, share * n, d), both, out=found)
        found = found.view(b, h, n, dv + 1)
        weight = found[..., dv:].add_(eps)
        if eps == 0:
            weight.masked_fill_(weight == 0, 1)
        torch.div(found[..., :dv], weight, out=out[:, :, lo : lo + n])


def _map(x: Tensor, into: Tensor, spare: Tensor, feature: str) -> Tensor:
    """``features(x)`` in the buffer ``into``, without further memory."""
    into.copy_(x)
    if feature == "elu":
        torch.clamp(into, min=0, out=spare)
        return into.clamp_(max=0).exp_().add_(spare)
    if feature == "relu":
        return into.relu_()
    return into.copy_(torch.softmax(into, -1, out=spare))


def _front(buffer: Tensor, n: int) -> Tensor:
    """The beginning of a buffer (B, heads, step, width) as a contiguous (B, heads, n, width)."""
    b, h, step, d = buffer.shape
    return buffer if n == step else buffer.view(-1)[: b * h * n * d].view(b, h, n, d)


def _step(per_token: int) -> int:
    return max(64, BUFFER // max(1, per_token))


def _whole(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, feature: str, eps: float) -> Tensor:
    """The two products outright, for gradients: widened copies of all inputs, still linear in the length."""
    wide = statistics_dtype(query)
    b, h, lq, d = query.shape
    hkv, lk = key.shape[1:3]
    phi_k, v = features(key.to(wide), feature), value.to(wide)
    count: Tensor | float = float(max(1, lk))
    if seen.keys is not None:
        hidden = ~seen.keys[:, None, :, None]
        phi_k, v = phi_k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        count = seen.keys.sum(1).clamp(min=1).to(wide)[:, None, None, None]
    state, total = phi_k.transpose(2, 3) @ v / count, phi_k.sum(2)[..., None] / count
    phi_q = features(query.to(wide), feature).reshape(b, hkv, -1, d)
    return _divided(phi_q @ state, phi_q @ total + eps).view(b, h, lq, -1).to(query.dtype)


def _divided(products: Tensor, weight: Tensor) -> Tensor:
    """products / weight; zero where nothing weighs anything."""
    return products / weight.masked_fill(weight == 0, 1)


# ---------------------------------------------------------------- with a causal mask


def _causal(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, feature: str, eps: float) -> Tensor:
    b, h, lq, d = query.shape
    hkv, dv = key.shape[1], value.shape[3]
    share, offset, wide = h // hkv, seen.offset, statistics_dtype(query)
    state = key.new_zeros(b * hkv, d, dv, dtype=wide)
    total = key.new_zeros(b * hkv, d, 1, dtype=wide)
    held = key.new_zeros(b, dtype=wide)  # keys in the sums, per batch row

    def load(lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor]:
        """phi of keys [lo, hi), their values, and which of them exist (B, hi - lo)."""
        phi, v = features(key[:, :, lo:hi].to(wide), feature), value[:, :, lo:hi].to(wide)
        exist = key.new_ones(b, hi - lo, dtype=wide)
        if seen.keys is not None:
            there = seen.keys[:, lo:hi].expand(b, -1)
            phi, v = (t.masked_fill(~there[:, None, :, None], 0) for t in (phi, v))
            exist = there.to(wide)
        return phi.flatten(0, 1), v.flatten(0, 1), exist

    for lo in range(0, offset, 4 * CHUNK):
        phi, v, exist = load(lo, min(offset, lo + 4 * CHUNK))
        state, total = state + phi.transpose(1, 2) @ v, total + phi.sum(1)[..., None]
        held = held + exist.sum(1)
    blind = min(lq, max(0, -offset))  # more queries than keys: the first ones see nothing
    found = [query.new_zeros(b, h, blind, dv)] if blind else []
    for row in range(blind, lq, CHUNK):
        n = min(CHUNK, lq - row)
        phi_k, v, exist = load(row + offset, row + offset + n)
        phi_q = features(query[:, :, row : row + n].to(wide), feature).reshape(b * hkv, share * n, d)
        weights = (
            (phi_q @ phi_k.transpose(1, 2)).view(b * hkv, share, n, n).tril().view(b * hkv, share * n, n)
        )
        products = weights @ v + phi_q @ state
        weight = weights.sum(-1, keepdim=True) + phi_q @ total
        count = (held[:, None] + exist.cumsum(1)).clamp(min=1)[:, None, None, :, None]  # (B, 1, 1, n, 1)
        shape = (b, hkv, share, n)
        out = _divided(products.view(*shape, dv) / count, weight.view(*shape, 1) / count + eps)
        found.append(out.reshape(b, h, n, dv).to(query.dtype))
        state, total = state + phi_k.transpose(1, 2) @ v, total + phi_k.sum(1)[..., None]
        held = held + exist.sum(1)
    return torch.cat(found, 2) if found else query.new_zeros(b, h, 0, dv)
