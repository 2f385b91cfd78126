"""``window2d`` as compiled loops on patches of sixteen query tokens: tensors in, tensors out. See ``loops``."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import InputError
from .. import openmp
from . import loops
from .window import Window2d

COPIES = (
    8 << 20
)  # bytes of keys and values that are copied at a time; more where one head, or the threads, need it
PATCHES = ((4, 4), (2, 8), (8, 2), (1, 16), (16, 1))  # rows and columns of the query tokens of a patch


def window2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window2d,
    scale: float,
    extra: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``api.window2d``: float32, bfloat16 or float16, and one width of all heads, a multiple of 8."""
    b, h, n, d = query.shape
    hkv = key.shape[1]
    if d % 8 or not d or key.shape != value.shape or n != window.tokens or h % hkv:
        raise InputError(f"window2d: no loop for query {tuple(query.shape)} and value {tuple(value.shape)}")
    out = query.new_empty(b, n, h, d).transpose(1, 2)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=query.device)
    if 0 in (b, h):
        return out, lse
    share = h // hkv
    group = max(1, COPIES // (8 * b * n * d), 4 * torch.get_num_threads() // (b * share * _items(window)))
    for g in range(0, hkv, group):
        keys, heads = slice(g, g + group), slice(g * share, (g + group) * share)
        beside = None if extra is None else (extra[0][:, keys], extra[1][:, keys])
        q, o, s = query[:, heads], out[:, heads], lse[:, heads]
        _heads(q, key[:, keys], value[:, keys], o, s, beside, window, scale)
    return out, lse


def _heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extra: tuple[Tensor, Tensor] | None,
    window: Window2d,
    scale: float,
) -> None:
    """Fill ``out`` and ``lse`` (B, H, L, ·) of some heads."""
    (b, h, n, d), hkv = query.shape, key.shape[1]
    q = query if query.dtype == torch.float32 and query.stride(3) == 1 else _packed(query)
    # Strided keys of one head would share a few sets of the caches, because strides are often powers of two.
    k, v = _packed(key), _packed(value)
    ek, ev = (k[:, :, :0], v[:, :, :0]) if extra is None else (_packed(extra[0]), _packed(extra[1]))
    o = out if out.dtype == torch.float32 else torch.empty_like(q)
    ty, tx = _patch(window)
    seen, runs = near(replace(window, text=0), ty, tx)
    factor = torch.tensor([scale / loops.LN2], dtype=torch.float32, device=q.device)
    # The loops look at addresses only.
    for t, heads, count in ((q, h, n), (o, h, n), (k, hkv, n), (v, hkv, n), (ek, hkv, ek.shape[2]),
                            (ev, hkv, ek.shape[2]), (lse[..., None].expand(b, h, n, d), h, n)):  # fmt: skip
        if t.shape != (b, heads, count, d) or t.dtype != torch.float32:
            raise InputError(
                f"window2d: {tuple(t.shape)} in {t.dtype} where {(b, heads, count, d)} is needed"
            )
    images = b * h * _items(window)
    items = images + b * h * -(-window.text // loops.LANES)
    numbers = (
        h, hkv, d, n, window.image[0], *window.grid, window.dilation, ty, tx, _down(window), window.text,
        *_places(q), *_places(o), *_places(lse),
        k.data_ptr(), v.data_ptr(), ek.data_ptr(), ev.data_ptr(), ek.shape[2],
        images, items, seen.data_ptr(), *seen.shape, runs.data_ptr(), factor.data_ptr(),
    )  # fmt: skip
    assert len(numbers) == loops.NUMBERS
    openmp.run(loops.part, numbers, torch.get_num_threads() if items > 1 else 1)
    if o is not out:
        out.copy_(o)


def _packed(tensor: Tensor) -> Tensor:
    """In float32, head by head and token by token."""
    return tensor.detach().to(torch.float32).contiguous()


def _places(tensor: Tensor) -> tuple[int, ...]:
    """Address, and steps of batch, head and token in bytes."""
    return (tensor.data_ptr(), *(tensor.element_size() * step for step in tensor.stride()[:3]))


def _sides(window: Window2d) -> list[int]:
    """Rows and columns of the largest of the grids that a dilation makes of one."""
    return [-(-side // window.dilation) for side in window.grid]


def _patch(window: Window2d) -> tuple[int, int]:
    """The patch with which the fewest keys are computed."""

    def cost(patch: tuple[int, int]) -> int:
        axes = zip(_sides(window), patch, strict=True)
        return math.prod(-(-side // own) * min(side, own + 2 * window.reach) for side, own in axes)

    return min(PATCHES, key=cost)


def _down(window: Window2d) -> int:
    """Rows of patches of such a grid."""
    return -(-_sides(window)[0] // _patch(window)[0])


def _items(window: Window2d) -> int:
    """Rows of patches of one head: what is handed to a thread at a time."""
    rows, columns = (min(window.dilation, side) for side in window.grid)
    return rows * columns * _down(window)


@functools.lru_cache(maxsize=32)
def near(window: Window2d, ty: int, tx: int) -> tuple[Tensor, Tensor]:
    """What is seen around a patch of ty x tx tokens inside the grid.

    Returns seen, int32 (ty + 2 up, tx + 2 left): a bit for each token of the patch, for the keys from ``up`` rows and
    ``left`` columns before its corner on, which is as far as the window reaches or the grid goes; and runs, int64
    (ty + 2 up, 2): of every row the first key that some token sees and the one behind the last.
    """
    kind = torch.int32
    reach = (min(window.reach, side - 1) for side in _sides(window))
    y, x = (
        torch.arange(-r, own + r, dtype=kind, device="cpu") for r, own in zip(reach, (ty, tx), strict=True)
    )
    seen = torch.zeros(len(y), len(x), dtype=kind, device="cpu")
    for lane in range(loops.LANES):
        seen |= window.near(y[:, None] - lane // tx, x - lane % tx).int() << lane
    some = (seen != 0).int()
    return seen, torch.stack([some.argmax(1), len(x) - some.flip(1).argmax(1)], 1)
