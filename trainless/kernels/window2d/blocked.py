"""``window2d`` in torch: small tiles of the grid, each against its halo, with memory for one row of tiles.

A tile of 8 x 4 query tokens can see no further than a rectangle of keys around it. Keys of the eight grid
rows and their halo are copied once, column by column, so that the rectangle of every tile is one run of
memory and the tiles of a row differ only in where their run starts: a batched product over overlapping
views. What a tile shows of its rectangle is the same for all tiles inside the grid, so one small additive
mask serves them all; tiles at a border have fewer keys and masks of their own. Text and extra keys are a
dense product of their own, merged by log-sum-exp. Query tokens need no order of their own in memory: the
copies that bring a row of tiles together are a few per cent of the time, less than permuting the whole
sequence once and undoing it.

32 rows per tile are what the fused operator of the CPU takes at a time; larger tiles see more keys for
nothing (benchmarks/window2d.py prints the distance to what the pairs alone would allow).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..common import BLOCK, statistics_dtype
from ..dispatch import FUSED_CPU_DTYPES
from .window import Window2d

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
TILE = (8, 4)  # rows and columns of the query tokens of a tile
STRIP = 8 << 20  # bytes of keys and values that are gathered at a time; the heads of a strip are cut to that


@dataclass(frozen=True)
class TileRun:
    """``count`` tiles along one axis: tile i has the queries [q0, q1) and the keys [k0, k1), both plus i * step."""

    q0: int
    q1: int
    k0: int
    k1: int
    count: int = 1
    step: int = 0


def runs(size: int, tile: int, reach: int) -> list[TileRun]:
    """Tiles that cover an axis of ``size`` tokens: those with a whole halo as one run, wider ones beside it."""
    inside = max(0, (size - 2 * reach) // tile)
    if inside <= 1:
        return _even(0, size, 2 * tile, size, reach)
    # What is left over is shared between both ends: every tile of its own is a call of its own.
    first = (size - inside * tile) // 2
    last = first + inside * tile
    run = TileRun(first, first + tile, first - reach, first + tile + reach, inside, tile)
    return [*_even(0, first, 2 * tile, size, reach), run, *_even(last, size, 2 * tile, size, reach)]


def _even(start: int, stop: int, widest: int, size: int, reach: int) -> list[TileRun]:
    """As few tiles as it takes, of nearly the same width."""
    count = -(-(stop - start) // widest)
    cuts = [start + (stop - start) * n // count for n in range(count + 1)] if count else []
    return [_cut(a, b, size, reach) for a, b in pairwise(cuts)]


def _cut(q0: int, q1: int, size: int, reach: int) -> TileRun:
    return TileRun(q0, q1, max(0, q0 - reach), min(size, q1 + reach))


def window2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window2d,
    scale: float,
    extra: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``api.window2d``. Differentiable; the fused operator is left out then."""
    b, h = query.shape[:2]
    out = query.new_empty(b, window.tokens, h, value.shape[3]).transpose(1, 2)
    lse = torch.empty(b, h, window.tokens, dtype=statistics_dtype(query), device=query.device)
    if 0 in (b, h):
        return out, lse
    first, stop = window.image
    text = slice(0, first) if window.text_first else slice(stop, None)
    beside = _beside(key[:, :, text], value[:, :, text], extra)
    if window.text:
        out[:, :, text], lse[:, :, text] = _attention(query[:, :, text], key, value, None, scale)
    maps = [t[:, :, first:stop].unflatten(2, window.grid) for t in (query, key, value, out, lse[..., None])]
    n = window.dilation
    # A dilated window is an ordinary one on each of the grids that every n-th row and column make.
    for y in range(min(n, window.grid[0])):
        for x in range(min(n, window.grid[1])):
            q, k, v, o, s = (m[:, :, y::n, x::n] for m in maps)
            part = replace(window, grid=(q.shape[2], q.shape[3]), dilation=1)
            _image(q, k, v, o, s, beside, part, scale)
    return out, lse


def _beside(key: Tensor, value: Tensor, extra: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Keys and values that every image token sees: the text's and the extra ones."""
    if extra is None or not extra[0].shape[2]:
        return (key, value) if key.shape[2] else None
    return torch.cat([key, extra[0]], 2), torch.cat([value, extra[1]], 2)


def _image(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    beside: tuple[Tensor, Tensor] | None,
    window: Window2d,
    scale: float,
) -> None:
    """Fill ``out`` and ``lse`` (B, H, rows, columns, ·) of one grid."""
    b, h, rows, columns, _ = query.shape
    share, reach = h // key.shape[1], window.reach
    across = runs(columns, TILE[1], reach)
    tall = min(rows, TILE[0] + 2 * reach)
    group = max(1, STRIP // (2 * b * tall * columns * key.shape[4] * key.element_size()))
    hidden: dict[TileRun, Tensor] = {}
    known: tuple[int, ...] = ()
    for top in range(0, rows, TILE[0]):
        down = _cut(top, min(top + TILE[0], rows), rows, reach)
        place = (down.q0 - down.k0, down.q1 - down.q0, down.k1 - down.k0)
        if place != known:  # rows of tiles at the same distance from the borders share their masks
            known, hidden = place, {run: _mask(window, down, run, query) for run in across}
        for g in range(0, key.shape[1], group):
            keys = slice(g, g + group)
            heads = slice(g * share, (g + group) * share)
            _row(
                _strip(query[:, heads, down.q0 : down.q1]), _strip(key[:, keys, down.k0 : down.k1]),
                _strip(value[:, keys, down.k0 : down.k1]), out[:, heads, down.q0 : down.q1],
                lse[:, heads, down.q0 : down.q1],
                None if beside is None else (beside[0][:, keys], beside[1][:, keys]),
                across, hidden, scale,
            )  # fmt: skip


def _strip(rows: Tensor) -> Tensor:
    """(B, H, rows, columns, D) column by column: (B * H, columns, rows, D), contiguous."""
    return rows.transpose(2, 3).flatten(0, 1).contiguous()


def _row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    beside: tuple[Tensor, Tensor] | None,
    across: list[TileRun],
    hidden: dict[TileRun, Tensor],
    scale: float,
) -> None:
    """One row of tiles. query, key, value: strips; out, lse: (B, H, rows, columns, ·), written."""
    tall, b = query.shape[2], out.shape[0]
    other = None if beside is None else _to_beside(query, *beside, b, scale)
    for run in across:
        q, k, v = _tiles(query, run, keys=False), _tiles(key, run, keys=True), _tiles(value, run, keys=True)
        found, total = _attention(q, k, v, hidden[run], scale)
        # (tiles, B * H, columns * rows, D) -> (B * H, columns of all tiles, rows, D)
        found, total = (
            t.transpose(0, 1).unflatten(2, (-1, tall)).flatten(1, 2) for t in (found, total[..., None])
        )
        stop = run.q0 + found.shape[1]
        if other is not None:
            found, total = _merge(found, total, *(t[:, run.q0 : stop] for t in other))
        for target, made in ((out, found), (lse, total)):
            target[:, :, :, run.q0 : stop] = made.transpose(1, 2).unflatten(0, (b, -1))


def _tiles(strip: Tensor, run: TileRun, keys: bool) -> Tensor:
    """The tiles of a run as (tiles, heads, tokens of a tile, D): a view of the strip, in which tiles overlap."""
    heads, _, rows, d = strip.shape
    start, stop = (run.k0, run.k1) if keys else (run.q0, run.q1)
    of_column, of_head = strip.stride(1), strip.stride(0)
    return strip.as_strided(
        (run.count, heads, (stop - start) * rows, d), (run.step * of_column, of_head, d, 1),
        strip.storage_offset() + start * of_column,
    )  # fmt: skip


def _to_beside(query: Tensor, key: Tensor, value: Tensor, batch: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of a strip of queries (B * H, columns, rows, D) to the keys that all of them see, as strips."""
    q = query.flatten(1, 2).unflatten(0, (batch, -1))
    found, total = _attention(q, key, value, None, scale)
    sizes = query.shape[1:3]
    return found.flatten(0, 1).unflatten(1, sizes), total.flatten(0, 1).unflatten(1, sizes)[..., None]


def _merge(one: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: a mean, weighted by their sums. Exact."""
    wide = lse.dtype
    share = torch.sigmoid(lse - other_lse)
    return torch.lerp(other.to(wide), one.to(wide), share), torch.logaddexp(lse, other_lse)


def _mask(window: Window2d, down: TileRun, across: TileRun, query: Tensor) -> Tensor:
    """(1, 1, tokens of a tile, keys): 0 where a tile shows a key and -inf where it does not; column by column."""
    spans = [(r.q0, r.q1) for r in (across, down)] + [(r.k0, r.k1) for r in (across, down)]
    qx, qy, kx, ky = (torch.arange(a, b, device=query.device) for a, b in spans)
    dx = (qx[:, None] - kx).view(len(qx), 1, len(kx), 1)
    dy = (qy[:, None] - ky).view(1, len(qy), 1, len(ky))
    seen = window.near(dy, dx).reshape(1, 1, len(qx) * len(qy), len(kx) * len(ky))
    return seen.new_zeros(seen.shape, dtype=statistics_dtype(query)).masked_fill_(~seen, -torch.inf)


# ---------------------------------------------------------------- one dense product


def _fits(query: Tensor) -> str | None:
    """Why the fused operator of the CPU cannot take these queries, or None."""
    if query.device.type != "cpu":
        return f"fused: no operator for {query.device.type}"
    if query.dtype not in FUSED_CPU_DTYPES:
        return f"fused: dtype {query.dtype}"
    if torch.is_grad_enabled() and query.requires_grad:
        return "fused: gradients are asked for"
    return None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp of (B, H, Lq, D) on (B, Hkv, Lk, D); every row sees something."""
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if _fits(query) is None and not gradients and value.shape[3] == query.shape[3]:
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        out, lse = _flash(query, key, value, 0.0, False, attn_mask=hidden, scale=scale)
        return out, lse
    wide = statistics_dtype(query)
    b, h, lq, d = query.shape
    hkv, lk = key.shape[1], key.shape[2]
    outs, sums = [], []
    step = max(1, BLOCK // max(1, b * h * lk))
    for i in range(0, lq, step):
        rows = query[:, :, i : i + step].to(wide)
        n = rows.shape[2]
        z = (rows.reshape(b, hkv, -1, d) @ key.to(wide).transpose(2, 3)).view(b, h, n, lk) * scale
        z = z if hidden is None else z + hidden[:, :, i : i + step]
        total = z.logsumexp(-1)
        weights = (z - total[..., None]).exp().view(b, hkv, -1, lk)
        outs.append((weights @ value.to(wide)).view(b, h, n, -1))
        sums.append(total)
    return torch.cat(outs, 2), torch.cat(sums, 2)
