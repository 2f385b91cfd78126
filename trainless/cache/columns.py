"""What a layer holds, laid out in the columns that a model's own mask is about.

While a patch is on a model, the engine attends to a compressed layer and knows which of its slots exist. Once it is
gone, or the cache is given to a model without it, the stock attention applies the model's mask as it is, and that
mask has the size that the first layer reports: all ``seen`` columns, or those from some ``offset`` on. A layer
fits if the tokens that it still holds are exactly the real ones among these columns, in every row. All layers
that share the mask have to agree on the offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

Pads = Sequence[tuple[int, int]]  # runs of columns that are padding, ascending


def runs(real: Tensor, start: int = 0) -> list[list[tuple[int, int]]]:
    """Runs of padding in each row of ``real`` (B, n) bool, whose first column is number ``start``."""
    found = []
    for row in real.tolist():
        pads: list[tuple[int, int]] = []
        for column, there in enumerate(row, start):
            if not there:
                first = pads.pop()[0] if pads and pads[-1][1] == column else column
                pads.append((first, column + 1))
        found.append(pads)
    return found


def joined(before: Pads, after: Pads) -> list[tuple[int, int]]:
    """Runs of earlier columns, then those of later ones."""
    if before and after and before[-1][1] == after[0][0]:
        return [*before[:-1], (before[-1][0], after[0][1]), *after[1:]]
    return [*before, *after]


def cut(pads: Pads, length: int) -> list[tuple[int, int]]:
    """What is left of the runs in the first ``length`` columns."""
    return [(a, min(b, length)) for a, b in pads if a < length]


def real_columns(pads: Pads, seen: int, device: Any = None) -> Tensor:
    """The columns of one row that are no padding, ascending."""
    real = torch.ones(seen, dtype=torch.bool)
    for a, b in pads:
        real[a:b] = False
    return real.nonzero()[:, 0].to(device)


def admissible(
    pads: Sequence[Pads], counts: Sequence[int], ages: Sequence[int], seen: int
) -> tuple[int, int]:
    """The least and the largest offset at which the kept tokens are the real ones from there on, in every row.

    counts: tokens kept per row, ages: real tokens seen. The least is above the largest when there is none.
    """
    low, high = 0, seen
    for row, (count, age) in enumerate(zip(counts, ages, strict=True)):
        gone, mine = age - count, pads[row] if pads else []
        if gone:
            low = max(low, _column(mine, gone - 1) + 1)
        if count:
            high = min(high, _column(mine, gone))
    return low, high


def _column(pads: Pads, number: int) -> int:
    """The column of the real token ``number`` of a row."""
    for a, b in pads:
        if a > number:
            break
        number += b - a
    return number


def placed(layer: Any, positions: Tensor, parts: Sequence[Tensor], offset: int) -> tuple[Tensor, Tensor]:
    """keys and values (B, Hkv, slots, D) in the columns ``offset``…``seen``, zero in those of padding."""
    b, hkv, slots = positions.shape
    width = layer.seen - offset
    order = positions.argsort(dim=2, stable=True)
    rank = torch.empty_like(order).scatter_(
        2, order, torch.arange(slots, device=order.device).expand_as(order)
    )
    pads = layer.pads or [[]] * b
    tables = []
    for row in range(b):
        real = real_columns(pads[row], layer.seen, positions.device)
        kept = real[len(real) - layer.counts[row] :] - offset
        # Empty slots come first in the order, and go into one column too many, which is cut off again.
        tables.append(torch.nn.functional.pad(kept, (slots - len(kept), 0), value=width))
    columns = torch.stack(tables)[:, None].expand(b, hkv, slots).gather(2, rank)[..., None]
    full = [
        t.new_zeros(b, hkv, width + 1, t.shape[3]).scatter_(2, columns.expand(*t.shape), t)[:, :, :width]
        for t in parts
    ]
    return full[0], full[1]


def agreed(cache: Any) -> int:
    """The offset that all layers of ``cache`` with the same mask agree on; 0 where they do not."""
    low, high = 0, 1 << 62
    for held in cache.layers:
        layer: Any = held
        if not isinstance(held, CacheLayerMixin) or getattr(layer, "is_sliding", False):
            continue
        least, most = 0, 0
        if hasattr(layer, "admissible") and layer.evicted:
            if layer.standing:
                continue  # the engine attends to it, by a mask of its own
            least, most = layer.admissible()
        low, high = max(low, least), min(high, most)
    return low if low <= high else 0


def reported(cache: Any, seen: int) -> int:
    """From which column on the mask of the call under way is, which comes after ``seen`` tokens."""
    for layer in cache.layers:
        said = getattr(layer, "reported", None)
        if said is not None and said[0] == seen:
            return int(said[1])
    return 0


def misfit(standing: bool, cache: Any, low: int, high: int) -> str:
    """Why the model's own mask does not fit, and what to do."""
    if standing:
        return (
            "this cache has dropped tokens under a patch, and it was given to a model without that patch; patch this "
            "model as well, or start a new cache"
        )
    if low > high:
        why = "the rows of this padded batch hold different numbers of tokens, or from different places"
    elif cache is None:
        why = "this layer was taken out of its cache"
    else:
        why = "the layers of this cache hold different numbers of tokens, or the mask was made by hand"
    return (
        f"{why}, and the patch that masks the difference is off, so that the model's own mask cannot fit; pause a "
        "patch instead of removing it in the middle of a sequence, or start a new cache"
    )
