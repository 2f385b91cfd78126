"""``block_sparse`` in torch: gather what takes part, and let ordinary attention do the rest.

A token subset becomes a shorter call per row of the batch: its kept queries and keys are still in order, so a
causal mask stays causal and the fused operator applies; r of the tokens cost r² of the dense call. Listed blocks
and spans become calls per block of queries, over the keys that its rows may see. A mask nearly doubles what a small
call costs, so where causality and the pattern are all there is, keys that every row sees come without one, those
at an edge apart from them, and the log-sum-exp of the parts puts them together: ``parts.py`` for spans, ``gathered.py``
for blocks, many blocks of queries at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..common import Terms, head_groups, pick_heads, statistics_dtype, take
from ..dense import Picked
from ..lse.api import attention
from ..visibility import Visibility
from .gathered import by_length
from .parts import simple, span_parts
from .patterns import Blocks, Pattern, Spans, Subset

# Query rows of one call over a span: few, or the calls look at many keys that most of their rows do not see.
_LEAST, _MOST = 64, 512


def block_sparse(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, *, visibility: Visibility, terms: Terms
) -> Tensor:
    """See ``api.block_sparse``."""
    b, h, lq, _ = query.shape
    out = query.new_zeros(b, h, lq, value.shape[3])
    if 0 in (b, h, lq, key.shape[2]):
        return out
    if isinstance(pattern, Spans):
        form = span_parts if simple(query, key, visibility, terms) else _spans
        form(out, query, key, value, pattern, visibility, terms)
        return out
    for batch in range(b):
        one = slice(batch, batch + 1)
        bias = terms.position_bias
        if bias is not None and bias.shape[0] > 1:
            bias = bias[one]
        part = (out[one], query[one], key[one], value[one])
        rest = (batch, visibility.row_of_batch(batch), replace(terms, position_bias=bias))
        if isinstance(pattern, Subset):
            _subset(*part, pattern, *rest)
        elif simple(query, key, visibility, terms) and (key.shape[2] - lq) % pattern.size == 0:
            by_length(*part, pattern, *rest)
        else:
            _blocks(*part, pattern, *rest)
    return out


def _subset(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Subset,
    batch: int,
    seen: Visibility,
    terms: Terms,
) -> None:
    """One row of the batch: a call of its kept queries over its kept keys."""
    rows = pattern.queries[batch if pattern.queries.shape[0] > 1 else 0].nonzero().flatten()
    offers = pattern.keys[batch if pattern.keys.shape[0] > 1 else 0]
    if seen.keys is not None:
        offers = offers & seen.keys[0]  # padding is nobody's key
    cols = offers.nonzero().flatten()
    if not len(rows) or not len(cols):
        return
    if len(rows) == query.shape[2] and len(cols) == key.shape[2]:
        inner, near = replace(seen, keys=None), terms
    else:
        inner = _gathered(seen, rows, cols)
        near = replace(terms, position_bias=_bias_at(terms.position_bias, None, rows, cols))
        query, key, value = query[:, :, rows], key[:, :, cols], value[:, :, cols]
    out[:, :, rows] = _attend(query, key, value, inner, near)


def _gathered(seen: Visibility, rows: Tensor, cols: Tensor) -> Visibility:
    """Which of the gathered ``rows`` see which of the gathered ``cols``, keys that exist all of them."""
    n, m = len(rows), len(cols)
    bare = Visibility(n, m, seen.device)
    if seen.structured and seen.window is None:
        if not seen.causal:
            return bare
        # In order, and each row next to its own key: the same causal mask, only shorter.
        if n <= m and torch.equal(cols[m - n :], rows + seen.offset):
            return replace(bare, causal=True)
    picked = Picked(seen, rows, cols)
    if not seen.additive:
        return replace(bare, dense=picked)
    every = torch.arange(n, device=seen.device)
    added = seen.dense[:, :, rows][..., cols]  # no larger than the mask that the model made
    return replace(bare, dense=added.masked_fill(~picked.at(every, 0, m), -torch.inf))


def _blocks(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Blocks,
    batch: int,
    seen: Visibility,
    terms: Terms,
) -> None:
    """One row of the batch, a block of queries at a time; heads with lists of their own get keys of their own."""
    (_, h, lq, _), (_, hkv, lk, _), size = query.shape, key.shape, pattern.size
    listed = pattern.index[batch if pattern.index.shape[0] > 1 else 0]  # (h|1, blocks, n)
    own = torch.arange(h, device=query.device)[:, None] // (h // hkv)
    within = torch.arange(size, device=query.device)
    for i0 in range(0, lq, size):
        i1 = min(lq, i0 + size)
        rows, blocks = torch.arange(i0, i1, device=query.device), listed[:, i0 // size]
        useful = blocks >= 0
        if seen.causal:
            useful &= blocks * size < i1 + seen.offset
        width = int(useful.sum(-1).max())
        if not width:
            continue
        blocks = torch.where(useful, blocks, -1).sort(-1, descending=True).values[:, :width].flip(-1)
        cols = (blocks[..., None] * size + within).flatten(1)  # (h|1, width * size)
        there = (blocks >= 0).repeat_interleave(size, 1) & (cols < lk)
        cols = cols.clamp(0, lk - 1)
        if len(cols) == 1:
            keep = there[0].nonzero().flatten()
            cols, there = cols[:, keep], there[:, keep]
            k, v = key[:, :, cols[0]], value[:, :, cols[0]]
        else:
            k, v = key[:, own, cols], value[:, own, cols]
        index = _per_head(cols[None], seen, h)
        allowed = there[None, :, None].expand(1, -1, i1 - i0, -1)
        shown = seen.columns(index, rows)
        if shown is not None:
            allowed = allowed & shown
        out[:, :, i0:i1] = _masked(
            query[:, :, i0:i1], k, v, allowed, seen.bias_columns(index, rows), None, rows, cols, terms
        )


def _spans(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, pattern: Spans, seen: Visibility, terms: Terms
) -> None:
    """Heads with the same span together, a block of queries at a time over the sinks and the span."""
    (b, h, lq, _), (_, hkv, lk, _), offset = query.shape, key.shape, seen.offset
    by_span: dict[int, list[int]] = {}
    for head, span in enumerate(pattern.span.tolist()):
        by_span.setdefault(min(int(span), lk), []).append(head)
    for span, named in by_span.items():
        for key_heads, heads in head_groups(h, hkv, named):
            q, k, v = take(query, heads), take(key, key_heads), take(value, key_heads)
            at = None if len(heads) == h else torch.as_tensor(heads, device=query.device)
            if span >= lk and at is None:
                out[:] = _attend(q, k, v, seen, terms)
                continue
            step = max(_LEAST, min(_MOST, span // 4, lq))
            for i0 in range(0, lq, step):
                i1 = min(lq, i0 + step)
                hi = max(0, min(lk, i1 + offset))
                lo = min(hi, max(0, i0 + offset - span + 1))
                sinks = min(pattern.sinks, lo)
                if sinks + hi - lo == 0:
                    continue
                rows = torch.arange(i0, i1, device=query.device)
                cols = torch.cat(
                    [torch.arange(sinks, device=rows.device), torch.arange(lo, hi, device=rows.device)]
                )
                if sinks == lo:
                    near_k, near_v = k[:, :, :hi], v[:, :, :hi]
                else:
                    near_k = torch.cat([k[:, :, :sinks], k[:, :, lo:hi]], 2)
                    near_v = torch.cat([v[:, :, :sinks], v[:, :, lo:hi]], 2)
                index = _per_head(cols.expand(b, 1, -1), seen, len(heads))
                allowed = pattern.allows(0, rows.new_tensor(heads[:1]), rows, cols, offset)[None]
                shown = seen.columns(index, rows, at)
                if shown is not None:
                    allowed = allowed & shown
                part = _masked(
                    q[:, :, i0:i1], near_k, near_v, allowed, seen.bias_columns(index, rows, at), at, rows, cols[None],
                    terms,
                )  # fmt: skip
                if at is None:
                    out[:, :, i0:i1] = part
                else:
                    out[:, at, i0:i1] = part


def _per_head(index: Tensor, seen: Visibility, heads: int) -> Tensor:
    """Keys (B, h|1, m), written out for every head where the mask differs from head to head."""
    return index if seen.dense is None or seen.dense.shape[1] == 1 else index.expand(-1, heads, -1)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    added: Tensor | None,
    heads: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    terms: Terms,
) -> Tensor:
    """Attention of some rows over gathered keys; allowed (B|1, h|1, n, m), added likewise, cols (h|1, m)."""
    inner = Visibility(query.shape[2], key.shape[2], query.device)
    if not bool(allowed.all()):
        inner = replace(inner, dense=allowed)
    bias = _bias_at(terms.position_bias, heads, rows, cols[0]) if len(cols) == 1 else None
    if terms.position_bias is not None and len(cols) > 1:
        whole = terms.position_bias.expand(-1, len(cols), -1, -1)
        whole = whole[:, :, rows] if whole.shape[2] > 1 else whole
        index = cols[None, :, None].expand(whole.shape[0], -1, whole.shape[2], -1)
        bias = whole.gather(3, index) if whole.shape[3] > 1 else whole
    if added is not None:
        bias = added if bias is None else bias + added.to(statistics_dtype(query))
    sinks = terms.sink_logits
    if sinks is not None and heads is not None:
        sinks = sinks[heads]
    return _attend(query, key, value, inner, replace(terms, position_bias=bias, sink_logits=sinks))


def _bias_at(bias: Tensor | None, heads: Tensor | None, rows: Tensor, cols: Tensor) -> Tensor | None:
    """Rows and keys, by number, of a bias that may be broadcast along any axis."""
    if bias is None:
        return None
    bias = pick_heads(bias, heads)
    bias = bias[:, :, rows] if bias.shape[2] > 1 else bias
    return bias[..., cols] if bias.shape[3] > 1 else bias


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, terms: Terms) -> Tensor:
    return attention(
        query, key, value, visibility=seen, scale=terms.scale, position_bias=terms.position_bias,
        softcap=terms.softcap, sink_logits=terms.sink_logits,
    )[0]  # fmt: skip
