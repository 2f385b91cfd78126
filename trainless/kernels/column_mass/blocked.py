"""``column_mass`` in torch, a few rows at a time.

Each block is one product per key head with the rows of all its query heads under each other, an
exponential in place and a sum. -lse rides along as one more feature of the query (against a key
feature of 1), so that the product already is z - lse; base 2, because exp2 is twice as fast as exp
on the CPU. float16 and bfloat16 inputs are multiplied in float32, so nothing is lost.

At 4096 causal tokens on an AVX2 core: 0.6 to 0.75 of the fused attention forward of the same shape, in
float32 and bfloat16; the form in ``fused.py`` takes 1.15 (benchmarks/attention_kernels.py).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..common import BLOCK, LOG2E, Terms, head_groups, powers, shared_logits, statistics_dtype, take
from ..visibility import Visibility

# Rows per product: more repack the keys less often, fewer keep the block in the cache.
_ROWS = 384
_KEYS = 4096
# Stands for "this row does not count": far below any logit, and finite, so that no product gives NaN.
NEVER = -1e30


def column_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    visibility: Visibility,
    terms: Terms,
    rows: Tensor | None = None,
    heads: list[int] | None = None,
    group: str | None = None,
) -> Tensor:
    """See ``api.column_mass``."""
    b, h, lq, _ = query.shape
    hkv, lk = key.shape[1], key.shape[2]
    wide = statistics_dtype(query)
    chosen = list(range(h)) if heads is None else heads
    out = torch.zeros(b, hkv if group == "sum" else len(chosen), lk, dtype=wide, device=query.device)
    if 0 in (b, lq, lk) or not chosen:
        return out
    negative = (-lse).to(wide)
    negative = torch.where(torch.isfinite(negative), negative, NEVER)
    if rows is not None:
        negative = torch.where(rows[:, None], negative, NEVER)
    place = {head: n for n, head in enumerate(chosen)}
    for keys, members in head_groups(h, hkv, heads):
        where = keys if group == "sum" else [place[i] for i in members]
        part = _uniform(
            take(query, members),
            take(key, keys).to(wide),
            take(negative, members),
            None if len(members) == h else torch.as_tensor(members, device=query.device),
            visibility,
            terms,
            group == "sum",
        )
        if where == list(range(out.shape[1])):
            out = part
        else:
            out[:, where] = part
    if visibility.structured and visibility.keys is not None:
        out.masked_fill_(~visibility.keys[:, None], 0)
    return out


def _uniform(
    query: Tensor,
    key: Tensor,
    negative: Tensor,
    heads: Tensor | None,
    seen: Visibility,
    terms: Terms,
    summed: bool,
) -> Tensor:
    """Every key head serves ``query.shape[1] / key.shape[1]`` of the given query heads."""
    b, h, lq, d = query.shape
    hkv, lk = key.shape[1], key.shape[2]
    share, wide = h // hkv, key.dtype
    simple = terms.plain and seen.structured
    factor = terms.scale * (LOG2E if simple else 1.0)
    out = torch.zeros(b, hkv if summed else h, lk, dtype=wide, device=query.device)
    # The feature against which -lse is multiplied; a soft-cap bends q·k first, so there it is added later.
    keys = torch.cat([key, key.new_ones(b, hkv, lk, 1)], -1) if simple else key
    keys = keys.flatten(0, 1).transpose(-1, -2)
    tile = min(lk, _KEYS)
    if simple:
        # One (batch row, key head) pair per product in long calls, several in short ones.
        step = min(lq, max(1, _ROWS // share))
        lanes = max(1, min(b * hkv, BLOCK // (share * step * tile)))
    else:
        lanes, step = b * hkv, max(1, min(lq, BLOCK // (b * h * tile)))
    buffer = torch.empty(lanes * share * step * tile, dtype=wide, device=query.device)
    for i0 in range(0, lq, step):
        i1 = min(lq, i0 + step)
        lo, hi = seen.span(i0, i1)
        n = share * (i1 - i0)
        packed = query.new_empty(b, hkv, share, i1 - i0, d + simple, dtype=wide)
        grouped = query[:, :, i0:i1].unflatten(1, (hkv, share))
        packed[..., :d].copy_(grouped)
        minus = negative[:, :, i0:i1]
        if simple:
            packed[..., d] = minus.unflatten(1, (hkv, share)) / terms.scale
        packed = packed.view(b * hkv, n, -1)
        for first, j0 in itertools.product(range(0, b * hkv, lanes), range(lo, hi, tile)):
            last, j1 = min(b * hkv, first + lanes), min(hi, j0 + tile)
            z = buffer[: (last - first) * n * (j1 - j0)].view(last - first, n, j1 - j0)
            if last - first == 1:  # a batched product over a batch of one is a third slower
                torch.mm(packed[first], keys[first, :, j0:j1], out=z[0])
            else:
                torch.bmm(packed[first:last], keys[first:last, :, j0:j1], out=z)
            # The scale multiplies finished sums, as it does where lse was made: the two then agree to the last
            # bit and cancel. Folded into the query it would save this pass and cost a digit.
            z.mul_(factor)
            if simple:
                z = _hide(z.exp2_().view(-1, i1 - i0, j1 - j0), seen, i0, i1, j0, j1)
            else:
                z = z.view(b, h, i1 - i0, j1 - j0)
                rows = torch.arange(i0, i1, device=query.device)
                z = shared_logits(z, terms, seen, heads, rows, j0, j1)
                z = powers(z.add_(minus[..., None]))
            z = z.view(last - first, -1, n if summed else i1 - i0, j1 - j0)
            out.view(b * hkv, -1, lk)[first:last, :, j0:j1] += z.sum(2)
    return out


def _hide(z: Tensor, seen: Visibility, i0: int, i1: int, lo: int, hi: int) -> Tensor:
    """Zero what causal order and window hide, in place, touching only the columns where they cut.

    z: (pairs, rows, hi - lo), already exponentials: hidden ones may be infinite, so they are overwritten.
    """
    first = i0 + seen.offset  # the key that row i0 stands on
    if seen.causal:
        edge = max(lo, first)
        z[..., edge - lo :].tril_(first - edge)
    elif seen.window is not None:
        z.tril_(first + seen.window - lo)
    if seen.window is not None:
        reach = seen.window - (1 if seen.causal else 0)
        stop = min(hi, i1 + seen.offset - reach)
        if stop > lo:
            z[..., : stop - lo].triu_(first - reach - lo)
    return z
