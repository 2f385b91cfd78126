"""``column_mass`` of a few chosen rows, which may differ from one row of the batch to the next.

Only those rows meet the keys, so the cost is theirs: 128 rows of 8192 cost a sixty-fourth of a pass over all.
Where the log-sum-exp of the rows is at hand it is used; otherwise the same products give it, so that a call
whose output comes from elsewhere is not computed a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..common import BLOCK, Terms, check_shapes, powers, shared_logits, statistics_dtype
from ..masks import Visibility

# Chosen rows at a time, whose visibility is written out, (rows, Lk) bool: fewer where they lie far from each other, so
# that early rows of a causal call meet only the keys that they see.
_ROWS, _FAR_ROWS = 128, 32


def chosen_mass(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    *,
    visibility: Visibility,
    terms: Terms,
    lse: Tensor | None = None,
    counted: bool = True,
) -> tuple[Tensor, Tensor]:
    """The probability that each key receives from the rows ``index``, and how many of those can see it.

    query (B, H, Lq, D), key (B, Hkv, Lk, D); index int64 (B, P), the query rows of each batch row, -1 for
    none; a row that is named twice counts twice. lse (B, H, Lq) as ``attention`` returns it, or None.

    Returns mass (B, H, Lk) in float32 (float64 for float64 input), and counts (B, Lk) int64: rows that see the
    key in any head; zeros unless ``counted``. Raises InputError on shapes that do not fit, or rows that do not exist.
    """
    check_shapes(query, key, None, visibility, terms)
    b, h, lq, _ = query.shape
    lk = key.shape[2]
    if index.dim() != 2 or index.shape[0] != b or index.dtype != torch.int64:
        raise InputError(f"rows {index.dtype} {tuple(index.shape)}: int64 (B={b}, rows) is needed")
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < max(lq, 1):
        raise InputError(f"rows from {int(index.min())} to {int(index.max())}: the call has {lq}; -1 is none")
    wide = statistics_dtype(query)
    mass = torch.zeros(b, h, lk, dtype=wide, device=query.device)
    counts = torch.zeros(b, lk, dtype=torch.int64, device=query.device)
    if lk == 0:
        return mass, counts
    for row in range(b):
        seen = visibility.row_of_batch(row)
        bias = terms.position_bias
        if bias is not None and bias.shape[0] > 1:
            bias = bias[row : row + 1]
        own = Terms(terms.scale, bias, terms.softcap, terms.sink_logits)
        rows = index[row]
        rows = (
            rows[rows >= 0].sort().values
        )  # early rows of a causal call see few keys: let them stand together
        far = len(rows) > 1 and int(rows[-1] - rows[0]) > 2 * len(rows)
        for part in rows.split(_FAR_ROWS if far else _ROWS) if len(rows) else ():
            hi = seen.span(int(part[0]), int(part[-1]) + 1)[1]
            if hi:
                known = None if lse is None else lse[row, :, part]
                _add(mass[row, :, :hi], query[row, :, part], key[row, :, :hi], seen, own, part, known)
                if not counted:
                    continue
                shown = seen.at(part, 0, hi)
                counts[row, :hi] += len(part) if shown is None else shown[0].any(0).sum(0)
    return mass, counts


def _add(
    mass: Tensor, query: Tensor, key: Tensor, seen: Visibility, terms: Terms, rows: Tensor, lse: Tensor | None
) -> None:
    """Add to ``mass`` (H, hi) the columns of the query rows (H, n, D) against key (Hkv, hi, D)."""
    h, n, d = query.shape
    hkv, hi, _ = key.shape
    share, wide = h // hkv, mass.dtype
    lanes = max(1, 4 * BLOCK // (share * n * hi))  # key heads per product
    for first in range(0, hkv, lanes):
        last = min(hkv, first + lanes)
        heads = slice(first * share, last * share)
        packed = query[heads].to(wide).reshape(last - first, share * n, d)
        z = torch.bmm(packed, key[first:last].to(wide).transpose(1, 2)).mul_(terms.scale)
        numbers = None if last - first == hkv else torch.arange(h, device=query.device)[heads]
        z = shared_logits(z.view(1, -1, n, hi), terms, seen, numbers, rows, 0, hi)[0]
        if lse is None and terms.sink_logits is None:
            p = z.softmax(-1)  # one pass; a row that sees nothing gives no numbers
            blind = p[..., :1].isnan()
            if p.is_cuda or bool(blind.any()):  # a device is not waited for
                p.masked_fill_(blind, 0)
            mass[heads] += p.sum(1)
            continue
        if lse is None:
            assert terms.sink_logits is not None
            sinks = terms.sink_logits[heads, None].to(wide)
            total = torch.logaddexp(z.logsumexp(-1), sinks)
        else:
            total = lse[heads].to(wide)
        blind = torch.isneginf(total)
        p = powers(z.sub_(total.masked_fill(blind, 0)[..., None]))
        mass[heads] += torch.bmm((~blind).to(wide)[:, None], p)[:, 0]
