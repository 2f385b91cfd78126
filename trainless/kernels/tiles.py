# Triton code names its compile-time constants in capitals and carries no annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Device code that the Triton kernels share. Importing this imports Triton; only ``*/triton.py`` does.

Addresses are int64 throughout: batch x heads x tokens x width passes 2**31 in ordinary long calls.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense import HIDDEN
from .tile_table import HOPPER
from .visibility import Visibility

HOPPER_MEMORY = 200 << 10  # what the tiles of ``tile_table`` may need; newer small GPUs have half of it
BOOL_MASK, ADDITIVE_MASK = 1, 2


def mask_operands(visibility: Visibility) -> tuple[bool, int | None, Tensor | None, Tensor | None]:
    """(causal, window, keys, mask) as operands of a registered operator."""
    return visibility.causal, visibility.window, visibility.keys, visibility.dense


def mask_arguments(
    query: Tensor,
    softcap: float | None,
    causal: bool,
    window: int | None,
    keys: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> dict[str, Any]:
    """Arguments of ``finish`` for the given operands; absent ones point at ``query`` and are never read."""
    b = query.shape[0]
    found: dict[str, Any] = {
        "softcap": softcap or 1.0,
        "window": window or 0,
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "CAP": softcap is not None,
        "KEYS": keys is not None,
        "MASK": 0 if mask is None else BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK,
        "BIAS": bias is not None,
        "hidden": HIDDEN,
    }
    found["keys"] = query if keys is None else keys.view(torch.uint8)
    found["keys_b"] = 0 if keys is None or keys.shape[0] != b else keys.stride(0)
    found["keys_k"] = 0 if keys is None else keys.stride(1)
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is None:
            found[name] = query
            strides: tuple[int, ...] = (0, 0, 0, 0)
        else:
            found[name] = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            strides = tuple(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        for axis, stride in zip("bhqk", strides, strict=True):
            found[f"{name}_{axis}"] = stride
    return found


def width_of(d: int) -> int:
    """Head width as the kernels hold it: a power of two, at least what a tile product takes."""
    return max(16, triton.next_power_of_2(d))


def tile_sizes(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(query rows, keys) of a tile; what fits into the 100 KiB of shared memory that every GPU since 2020 has."""
    return (64, 64) if width <= 128 and dtype.itemsize == 2 else (32, 32)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may hold on this device; 0 where it is no GPU."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


def launch(kernel: str, width: int, query: Tensor) -> dict[str, int]:
    """BM, BN and, where they were measured, num_warps and num_stages of a launch; see ``tile_table``."""
    measured = HOPPER.get(kernel, {}).get(width)
    if measured is not None and query.dtype.itemsize == 2 and shared_memory(query.device) >= HOPPER_MEMORY:
        return dict(zip(("BM", "BN", "num_warps", "num_stages"), measured, strict=True))
    bm, bn = tile_sizes(width, query.dtype)
    return {"BM": bm, "BN": bn}


@triton.jit
def load_rows(base, index, stride_n, stride_d, valid, d, BD: tl.constexpr):
    """Rows ``index`` of a (n, d) matrix as (len(index), BD), zero where not valid and past d."""
    wide = tl.arange(0, BD).to(tl.int64)
    where = base + index[:, None] * stride_n + wide[None, :] * stride_d
    return tl.load(where, mask=valid[:, None] & (wide[None, :] < d), other=0.0)


@triton.jit
def tanh(x):
    # Near zero (1 - e) / (1 + e) cancels; the series does not.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 - y * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.15, near, far)


@triton.jit
def fold(z, value, top, total, acc, EXACT: tl.constexpr):
    """One block of logits and values into the running softmax (top, total, acc)."""
    higher = tl.maximum(top, tl.max(z, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp(z - base[:, None])
    shrink = tl.exp(top - base)
    total = total * shrink + tl.sum(p, 1)
    if EXACT:
        acc = acc * shrink[:, None] + tl.dot(p, value, input_precision="ieee")
    else:
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
    return higher, total, acc


@triton.jit
def finish(
    z, rows, cols, col_valid, b, h, lq, lk, offset,
    softcap, window, keys, keys_b, keys_k, hidden,
    mask, mask_b, mask_h, mask_q, mask_k,
    bias, bias_b, bias_h, bias_q, bias_k,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Logits from z = scale·q·k (rows, cols): cap, then bias, then -inf where a row does not see a key."""
    if CAP:
        z = softcap * tanh(z / softcap)
    inside = (rows[:, None] < lq) & (cols[None, :] < lk) & col_valid[None, :]
    seen = inside
    if BIAS:
        at = bias + b * bias_b + h * bias_h + rows[:, None] * bias_q + cols[None, :] * bias_k
        z += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if MASK != 0:
        at = mask + b * mask_b + h * mask_h + rows[:, None] * mask_q + cols[None, :] * mask_k
        if MASK == 1:
            seen = seen & (tl.load(at, mask=inside, other=0) != 0)
        else:
            added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            seen = seen & (added > hidden)
            z += tl.where(added > hidden, added, 0.0)
    if KEYS:
        exists = tl.load(keys + b * keys_b + cols * keys_k, mask=(cols < lk) & col_valid, other=0) != 0
        seen = seen & exists[None, :]
    # Differences of positions need no 64 bits, of which a tile has few to spare.
    gap = (rows + offset).to(tl.int32)[:, None] - cols.to(tl.int32)[None, :]
    if CAUSAL:
        seen = seen & (gap >= 0)
        if WINDOW:
            seen = seen & (gap < window)
    elif WINDOW:
        seen = seen & (gap <= window) & (gap >= -window)
    return tl.where(seen, z, float("-inf"))


@triton.jit
def product(a, b, EXACT: tl.constexpr):
    """a @ bᵀ in float32; EXACT keeps float32 operands from being cut to TF32."""
    if EXACT:
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    return tl.dot(a, tl.trans(b))


@triton.jit
def multiply(a, b, EXACT: tl.constexpr):
    """a @ b of float32 tiles; EXACT keeps float32 inputs from being cut to TF32."""
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b, input_precision="tf32")


@triton.jit
def key_range(first, last, lk, offset, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys [lo, hi) outside which no row of [first, last) sees anything."""
    lo = first * 0
    hi = lo + lk
    if CAUSAL:
        hi = tl.minimum(hi, last + offset)
        if WINDOW:
            lo = tl.maximum(lo, first + offset - window + 1)
    elif WINDOW:
        lo = tl.maximum(lo, first + offset - window)
        hi = tl.minimum(hi, last + offset + window)
    return lo, hi
