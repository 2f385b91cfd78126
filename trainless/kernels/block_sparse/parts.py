"""Spans where causality and the pattern are all that hides a key: parts with and without a mask.

Keys that every row of a block of queries sees are one call without a mask; those at an edge, where rows differ,
are another; the log-sum-exp of the parts gives their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import Terms, head_groups, take
from ..lse.api import attention
from ..visibility import Visibility
from .patterns import Spans

Part = tuple[Tensor, Tensor, Visibility]  # keys, values, which rows see which
_LEAST, _MOST = 64, 256  # query rows of one block over a span


def simple(query: Tensor, key: Tensor, seen: Visibility, terms: Terms) -> bool:
    """Whether a causal call has nothing but causality and its pattern."""
    every = seen.keys is None or bool(seen.keys.all())
    square = seen.causal and seen.window is None and seen.structured and every and seen.offset >= 0
    return (
        square
        and terms.plain
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))
    )


def _together(query: Tensor, parts: Sequence[Part], scale: float, sinks: Tensor | None) -> Tensor:
    """Attention of query (B, h, n, D) over all keys of the parts, which are disjoint."""
    out, total = None, None
    for key, value, seen in parts:
        more, lse = attention(query, key, value, visibility=seen, scale=scale)
        if out is None or total is None:
            out, total = more, lse
            continue
        both = torch.logaddexp(total, lse)
        blind = torch.isneginf(both)
        out = out * torch.exp(total - both).masked_fill(blind, 0)[..., None]
        out = out + more * torch.exp(lse - both).masked_fill(blind, 0)[..., None]
        total = both
    assert out is not None and total is not None
    if sinks is not None:
        whole = torch.logaddexp(total, sinks.to(total.dtype).view(1, -1, 1))
        out = out * torch.exp(total - whole)[..., None]
    return out.to(query.dtype)


def span_parts(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, pattern: Spans, seen: Visibility, terms: Terms
) -> None:
    """Heads with the same span together: the sinks and the middle of the span, its start, its end."""
    (_, h, lq, _), (_, hkv, lk, _), offset, device = query.shape, key.shape, seen.offset, query.device
    by_span: dict[int, list[int]] = {}
    for head, span in enumerate(pattern.span.tolist()):
        by_span.setdefault(min(int(span), lk), []).append(head)
    for span, named in by_span.items():
        step = max(1, min(max(_LEAST, min(_MOST, span // 4)), lq))
        # Row r of a block sees its keys from r on at the start of the span.
        leaving = torch.ones(step, step, dtype=torch.bool, device=device).triu_()
        for key_heads, heads in head_groups(h, hkv, named):
            q, k, v = take(query, heads), take(key, key_heads), take(value, key_heads)
            sinks = None if terms.sink_logits is None else terms.sink_logits[heads]
            if span >= lk:
                out[:, heads] = _together(q, [(k, v, seen)], terms.scale, sinks)
                continue
            for i0 in range(0, lq, step):
                i1 = min(lq, i0 + step)
                n, near = i1 - i0, i0 + offset  # ``near``: the key that the first row stands on
                parts: list[Part] = [
                    (
                        k[:, :, near : near + n],
                        v[:, :, near : near + n],
                        Visibility(n, n, device, causal=True),
                    )
                ]
                if span < n:  # the end of the span is in the block itself
                    rows = torch.arange(n, device=device)
                    band = ((rows[:, None] - rows) < span) & (rows[:, None] >= rows)
                    band = band | ((rows + near < pattern.sinks) & (rows[:, None] >= rows))
                    parts = [(*parts[0][:2], Visibility(n, n, device, dense=band[None, None]))]
                first = max(0, near - span + 1)  # the first key that the first row sees
                every = max(0, min(near, near + n - span))  # from here to ``near`` all rows see all
                # Keys that leave the span row by row; those among the sinks stay.
                start, stop = max(first, min(pattern.sinks, every)), every
                if start < stop:
                    edge = leaving[:n, start - (near - span + 1) :][:, : stop - start]
                    shown = Visibility(n, stop - start, device, dense=edge[None, None])
                    parts.append((k[:, :, start:stop], v[:, :, start:stop], shown))
                held = min(pattern.sinks, every)
                if held and every < near:
                    both = [torch.cat([t[:, :, :held], t[:, :, every:near]], 2) for t in (k, v)]
                else:
                    low, high = (0, held) if held else (every, near)
                    both = [k[:, :, low:high], v[:, :, low:high]]
                if both[0].shape[2]:
                    parts.append((both[0], both[1], Visibility(n, both[0].shape[2], device)))
                out[:, heads, i0:i1] = _together(q[:, :, i0:i1], parts, terms.scale, sinks)
