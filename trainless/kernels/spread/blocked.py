"""``spread`` in torch, a block of rows and keys at a time: what it holds is linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import BLOCK, Terms, head_groups, shared_logits, statistics_dtype, take
from ..visibility import Visibility

_KEYS = 4096
# Stands for the log-sum-exp of a row that does not count: far above any logit, and finite.
NEVER = 1e30
NAMES = ("row_entropy", "row_max", "column_max", "column_entropy")


class Spread(NamedTuple):
    """A call of ``spread`` whose arguments have been checked; see ``api.spread``. The sink of ``terms`` is in lse."""

    query: Tensor
    key: Tensor
    lse: Tensor
    wanted: Collection[str]
    visibility: Visibility
    terms: Terms
    rows: Tensor | None = None
    heads: list[int] | None = None


@dataclass
class Parts:
    """Sums and maxima over some of the rows or keys; parts that share no pair add up.

    row_sum (B, h, Lq) and column_sum (B, h, Lk): sums of p·log p; row_max, column_max: largest p; mass (B, h, Lk): sum
    of p over rows. None: not wanted.
    """

    row_sum: Tensor | None = None
    row_max: Tensor | None = None
    column_sum: Tensor | None = None
    column_max: Tensor | None = None
    mass: Tensor | None = None

    @staticmethod
    def zeros(wanted: Collection[str], b: int, h: int, lq: int, lk: int, like: Tensor) -> Parts:
        def made(name: str, length: int) -> Tensor | None:
            return like.new_zeros(b, h, length) if name in wanted else None

        spread_over_rows = "column_entropy"
        return Parts(
            made("row_entropy", lq), made("row_max", lq), made(spread_over_rows, lk), made("column_max", lk),
            made(spread_over_rows, lk),
        )  # fmt: skip

    def add(self, p: Tensor, log_p: Tensor, rows: slice, keys: slice) -> None:
        """A block of probabilities (B, h, rows, keys), and their logarithms where they are not 0."""
        if self.row_sum is not None or self.column_sum is not None:
            product = torch.where(p > 0, p * log_p, 0)
            if self.row_sum is not None:
                self.row_sum[:, :, rows] += product.sum(3)
            if self.column_sum is not None:
                self.column_sum[:, :, keys] += product.sum(2)
        if self.mass is not None:
            self.mass[:, :, keys] += p.sum(2)
        if self.row_max is not None:
            self.row_max[:, :, rows] = torch.maximum(self.row_max[:, :, rows], p.amax(3))
        if self.column_max is not None:
            self.column_max[:, :, keys] = torch.maximum(self.column_max[:, :, keys], p.amax(2))

    def beside(self, other: Parts) -> Parts:
        """These and the parts of the same rows with further keys, which come behind."""

        def joined(name: str, how: str) -> Tensor | None:
            one, two = getattr(self, name), getattr(other, name)
            if one is None:
                return None
            if how == "keys":
                return torch.cat([one, two], 2)
            whole: Tensor = one + two if how == "sum" else torch.maximum(one, two)
            return whole

        return Parts(
            joined("row_sum", "sum"), joined("row_max", "max"), joined("column_sum", "keys"),
            joined("column_max", "keys"), joined("mass", "keys"),
        )  # fmt: skip

    def finished(self) -> dict[str, Tensor]:
        """The statistics by name."""
        found: dict[str, Tensor] = {}
        if self.row_sum is not None:
            found["row_entropy"] = (-self.row_sum).clamp_min(0)
        if self.row_max is not None:
            found["row_max"] = self.row_max
        if self.column_max is not None:
            found["column_max"] = self.column_max
        if self.column_sum is not None and self.mass is not None:
            # With q = p / m, the sum of -q·log q is log m - (sum of p·log p) / m.
            mass = self.mass.masked_fill(self.mass == 0, 1)
            found["column_entropy"] = (mass.log() - self.column_sum / mass).clamp_min(0)
        return found


def spread_parts(asked: Spread) -> Parts:
    """The parts of ``api.spread`` for these keys."""
    query, key, lse, wanted, visibility, terms, rows, heads = asked
    b, h, lq, _ = query.shape
    hkv, lk = key.shape[1], key.shape[2]
    wide = statistics_dtype(query)
    chosen = list(range(h)) if heads is None else heads
    whole = Parts.zeros(wanted, b, len(chosen), lq, lk, query.new_empty(0, dtype=wide))
    if 0 in (b, lq, lk) or not chosen:
        return whole
    lse = lse.to(wide)
    lse = torch.where(torch.isfinite(lse), lse, NEVER)
    if rows is not None:
        lse = torch.where(rows[:, None], lse, NEVER)
    place = {head: n for n, head in enumerate(chosen)}
    for keys, members in head_groups(h, hkv, heads):
        at = [place[i] for i in members]
        some = _uniform(
            take(query, members), take(key, keys).to(wide), take(lse, members),
            None if len(members) == h else torch.as_tensor(members, device=query.device),
            visibility, terms, Parts.zeros(wanted, b, len(members), lq, lk, lse),
        )  # fmt: skip
        for name, part in vars(some).items():
            if part is not None:
                getattr(whole, name)[:, at] = part
    return whole


def _uniform(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    heads: Tensor | None,
    seen: Visibility,
    terms: Terms,
    parts: Parts,
) -> Parts:
    """Every key head serves ``query.shape[1] / key.shape[1]`` of the given query heads."""
    b, h, lq, _ = query.shape
    hkv, lk = key.shape[1], key.shape[2]
    tile = min(lk, _KEYS)
    step = max(1, min(lq, BLOCK // (b * h * tile)))
    for i0 in range(0, lq, step):
        i1 = min(lq, i0 + step)
        index = torch.arange(i0, i1, device=query.device)
        packed = query[:, :, i0:i1].to(key.dtype).unflatten(1, (hkv, h // hkv)).flatten(2, 3)
        lo, hi = seen.span(i0, i1)
        for j0 in range(lo, hi, tile):
            j1 = min(hi, j0 + tile)
            # The scale multiplies finished sums, as it does where lse was made.
            z = (packed @ key[:, :, j0:j1].transpose(-1, -2)).mul_(terms.scale)
            z = shared_logits(z.view(b, h, i1 - i0, j1 - j0), terms, seen, heads, index, j0, j1)
            log_p = z.sub_(lse[:, :, i0:i1, None])
            parts.add(log_p.exp(), log_p, slice(i0, i1), slice(j0, j1))
    return parts
