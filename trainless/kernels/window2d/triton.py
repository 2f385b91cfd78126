# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Triton form of ``window2d``: one program per tile of the grid, which walks over the tiles around it.

Tokens are addressed by their place on the grid, so that tiles of queries and keys are compact patches of
the image whatever their order in memory. A program leaves out the tiles of keys that its own tile cannot
reach, then adds the text and the extra keys. Rows of text are dense and go through the form of ``lse``.
Registered as ``trainless::window2d``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Terms
from ..lse.triton import attention
from ..tiles import fold, launch, load_rows, product, width_of
from ..visibility import Visibility
from . import blocked
from .window import Window2d

# Squares of distances on the grid are 32-bit numbers in a program; a longer reach goes through ``blocked``.
LONGEST = 32_000


@triton.jit
def _line(query, k, k_n, k_d, v, v_n, v_d, count, scale, top, total, acc, d,
          EXACT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """``count`` keys that every row sees, into the running softmax."""
    for start in range(count * 0, count, BM):
        at = start + tl.arange(0, BM).to(tl.int64)
        key = load_rows(k, at, k_n, k_d, at < count, d, BD)
        value = load_rows(v, at, v_n, v_d, at < count, d, BD)
        z = product(query, key, EXACT) * scale
        z = tl.where((at < count)[None, :], z, float("-inf"))
        top, total, acc = fold(z, value, top, total, acc, EXACT)
    return top, total, acc


@triton.jit
def _window2d(
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d,
    ek, ek_b, ek_h, ek_n, ek_d, ev, ev_b, ev_h, ev_n, ev_d,
    out, out_b, out_h, out_n, out_d, lse, lse_b, lse_h, lse_n,
    heads, share, rows, columns, d, scale, text, words, extras, dilation, reach, most, across,
    DISC: tl.constexpr, EXACT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1).to(tl.int64)
    b, h = lane // heads, lane % heads
    g = h // share
    # Each residue of the dilation is a grid of its own, whose steps are ``dilation`` tokens long.
    residue = tl.program_id(2).to(tl.int64)
    y_off, x_off = residue // dilation, residue % dilation
    tall = (rows - y_off + dilation - 1) // dilation
    wide = (columns - x_off + dilation - 1) // dilation
    tile = tl.program_id(0).to(tl.int64)
    # Places on the grid are small numbers; only addresses need 64 bits.
    top_y, left_x = ((tile // across) * TY).to(tl.int32), ((tile % across) * TX).to(tl.int32)
    tall, wide = tall.to(tl.int32), wide.to(tl.int32)
    inner = tl.arange(0, BM)
    y, x = top_y + inner // TX, left_x + inner % TX
    real = (y < tall) & (x < wide)
    place = (y_off + y.to(tl.int64) * dilation) * columns + x_off + x * dilation
    query = load_rows(q + b * q_b + h * q_h, place, q_n, q_d, real, d, BD)
    best = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.full((BM,), 0.0, tl.float32)
    acc = tl.full((BM, BD), 0.0, tl.float32)
    key_at, value_at = k + b * k_b + g * k_h, v + b * v_b + g * v_h
    y0 = tl.maximum(top_y - reach, 0) // TY
    y1 = (tl.minimum(top_y + TY + reach, tall) + TY - 1) // TY
    x0 = tl.maximum(left_x - reach, 0) // TX
    x1 = (tl.minimum(left_x + TX + reach, wide) + TX - 1) // TX
    if (top_y < tall) & (left_x < wide):
        for step in range(y0 * 0, (y1 - y0) * (x1 - x0)):
            key_y, key_x = (y0 + step // (x1 - x0)) * TY, (x0 + step % (x1 - x0)) * TX
            # Steps between the nearest rows and columns of the two tiles: too many, and nothing is seen.
            gap_y = tl.maximum(tl.maximum(key_y - (top_y + TY - 1), top_y - (key_y + TY - 1)), 0)
            gap_x = tl.maximum(tl.maximum(key_x - (left_x + TX - 1), left_x - (key_x + TX - 1)), 0)
            gap = tl.maximum(gap_y, gap_x)
            if DISC:
                gap = gap_y * gap_y + gap_x * gap_x
            if gap <= most:
                ky, kx = key_y + inner // TX, key_x + inner % TX
                exists = (ky < tall) & (kx < wide)
                at = (y_off + ky.to(tl.int64) * dilation) * columns + x_off + kx * dilation
                key = load_rows(key_at, at, k_n, k_d, exists, d, BD)
                value = load_rows(value_at, at, v_n, v_d, exists, d, BD)
                dy, dx = tl.abs(y[:, None] - ky[None, :]), tl.abs(x[:, None] - kx[None, :])
                far = tl.maximum(dy, dx)
                if DISC:
                    far = dy * dy + dx * dx
                z = product(query, key, EXACT) * scale
                z = tl.where((far <= most) & exists[None, :], z, float("-inf"))
                best, total, acc = fold(z, value, best, total, acc, EXACT)
        after = lane * 0 + text  # of 64 bits: behind an image it is as large as that
        best, total, acc = _line(
            query, key_at + after * k_n, k_n, k_d, value_at + after * v_n, v_n, v_d, words, scale,
            best, total, acc, d, EXACT, BM, BD,
        )  # fmt: skip
        best, total, acc = _line(
            query, ek + b * ek_b + g * ek_h, ek_n, ek_d, ev + b * ev_b + g * ev_h, ev_n, ev_d, extras, scale,
            best, total, acc, d, EXACT, BM, BD,
        )  # fmt: skip
    # Rows of a tile that lie outside the grid have seen nothing, or what is not theirs; they are not stored.
    divisor = tl.where(total > 0, total, 1.0)
    column = tl.arange(0, BD).to(tl.int64)
    target = out + b * out_b + h * out_h + place[:, None] * out_n + column[None, :] * out_d
    result = (acc / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(target, result, mask=real[:, None] & (column[None, :] < d))
    tl.store(lse + b * lse_b + h * lse_h + place * lse_n, best + tl.log(divisor), mask=real)


@torch.library.custom_op("trainless::window2d", mutates_args=())
def window2d_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    rows: int,
    columns: int,
    text: int,
    text_first: bool,
    disc: bool,
    most: int,
    reach: int,
    dilation: int,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rows of the image, (B, H, rows * columns, D) and (B, H, rows * columns); see ``api.window2d``."""
    b, h, _, d = query.shape
    n = rows * columns
    first = text if text_first else 0
    out = query.new_empty(b, n, h, d).transpose(1, 2)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=query.device)
    width = width_of(d)
    sizes = launch("window2d", width, query)
    ty, tx = (16, 8) if sizes["BM"] == 128 else (8, 8) if sizes["BM"] == 64 else (8, 4)
    more = {name: sizes[name] for name in sizes if name.startswith("num_")}
    tall, wide = -(-rows // dilation), -(-columns // dilation)
    across = triton.cdiv(wide, tx)
    ek, ev = (key, value) if extra_key is None or extra_value is None else (extra_key, extra_value)
    # Tokens are numbered from the image's first, so that the results may hold the image alone.
    q, k, v = query[:, :, first:], key[:, :, first:], value[:, :, first:]
    words_at = -first if text_first else n
    _window2d[(triton.cdiv(tall, ty) * across, b * h, dilation * dilation)](
        q, *query.stride(), k, *key.stride(), v, *value.stride(), ek, *ek.stride(), ev, *ev.stride(),
        out, *out.stride(), lse, *lse.stride(),
        h, h // key.shape[1], rows, columns, d, scale, words_at, text,
        0 if extra_key is None else ek.shape[2], dilation, reach, most, across,
        DISC=disc, EXACT=query.dtype == torch.float32, TY=ty, TX=tx, BM=ty * tx, BD=width, **more,
    )  # fmt: skip
    return out, lse


@window2d_op.register_fake
def _(query, key, value, scale, rows, columns, text, text_first, disc, most, reach, dilation, ek, ev):
    b, h, _, d = query.shape
    out = query.new_empty(b, rows * columns, h, d).transpose(1, 2)
    return out, query.new_empty(b, h, rows * columns, dtype=torch.float32)


def window2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window2d,
    scale: float,
    extra: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``api.window2d``."""
    if window.reach > LONGEST:
        return blocked.window2d(query, key, value, window=window, scale=scale, extra=extra)
    extra_key, extra_value = extra if extra is not None and extra[0].shape[2] else (None, None)
    found = window2d_op(
        query, key, value, scale, *window.grid, window.text, window.text_first, window.shape == "disc",
        window.most, window.reach, window.dilation, extra_key, extra_value,
    )  # fmt: skip
    if not window.text:
        return found
    text = slice(0, window.text) if window.text_first else slice(window.image[1], None)
    seen = Visibility(window.text, window.tokens, query.device)
    beside = attention(query[:, :, text], key, value, visibility=seen, terms=Terms(scale))
    order = (beside, found) if window.text_first else (found, beside)
    out = torch.cat([part[0].transpose(1, 2) for part in order], 1).transpose(1, 2)
    return out, torch.cat([part[1] for part in order], 2)
