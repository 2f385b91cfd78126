"""``window2d``: checks, and the choice of a form."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..common import Terms, check_shapes
from ..dispatch import (
    Choice,
    differentiated,
    half_matmul_is_fast,
    not_compiled,
    numba_reasons,
    triton_reasons,
)
from ..visibility import Visibility
from . import blocked
from .window import Window2d

PACKAGE = __name__.rpartition(".")[0]
# What the compiled form takes, which computes in float32.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def choose(query: Tensor, key: Tensor, value: Tensor, extra: tuple[Tensor, Tensor] | None = None) -> Choice:
    """Which form ``window2d`` runs for these tensors."""
    given = (query, key, value, *(extra or ()))
    why = triton_reasons(given)
    if query.shape[-1] > 256 or value.shape[-1] != query.shape[-1]:
        why += (f"triton: head width {query.shape[-1]} (value {value.shape[-1]})",)
    if 0 in query.shape:
        why += ("triton: empty input",)
    if not why:
        return Choice("triton")
    # On a CPU nothing is faster than the compiled form, so only what keeps that one away is of interest.
    slow = _not_compiled(given)
    return Choice("blocked", (*why, *slow)) if slow else Choice("numba")


def _not_compiled(given: tuple[Tensor, ...]) -> tuple[str, ...]:
    """Why the compiled form cannot take query, key, value and extra ones; empty when it can."""
    reasons = numba_reasons(given, traced=_one_operator(given))
    if reasons:
        return reasons
    dtypes, widths = {t.dtype for t in given}, {t.shape[-1] for t in given}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        return (f"numba: dtype {', '.join(sorted(str(t).removeprefix('torch.') for t in dtypes))}",)
    if dtypes != {torch.float32} and half_matmul_is_fast():
        return ("numba: this CPU has instructions for half precision that torch uses",)
    if len(widths) > 1 or not all(width and width % 8 == 0 for width in widths):
        return (f"numba: head widths {sorted(widths)}, one multiple of 8 is needed",)
    return not_compiled(PACKAGE)


def _one_operator(given: tuple[Tensor | None, ...]) -> bool:
    """Whether the call becomes one operator of the graph that a compiler makes."""
    return torch.compiler.is_compiling() and not differentiated(given)


def window2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window2d,
    scale: float,
    extra: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of ``window``, and the log-sum-exp of its logits.

    query (B, H, L, D), key (B, Hkv, L, D), value (B, Hkv, L, Dv) with L = ``window.tokens``; query head i
    reads key head i // (H / Hkv). extra: keys and values (B, Hkv, E, ·) that every image token sees and no
    text token.

    Returns out (B, H, L, Dv) in the dtype of ``query``, its tokens before its heads in memory, and lse
    (B, H, L) in float32 (float64 for float64 input). Raises InputError when shapes do not fit.
    """
    n = window.tokens
    check_shapes(query, key, value, Visibility(n, n, query.device), Terms(scale))
    if extra is not None:
        e = extra[0].shape[2]
        for name, given, like in (("key", extra[0], key), ("value", extra[1], value)):
            if given.shape != (*like.shape[:2], e, like.shape[3]):
                raise InputError(f"extra {name} {tuple(given.shape)} does not fit {name} {tuple(like.shape)}")
    if _one_operator((query, key, value, *(extra or ()))):
        from .operator import window2d_call

        found: tuple[Tensor, Tensor] = window2d_call(
            query, key, value, scale, *window.grid, float(window.radius), window.shape, window.dilation, window.text,
            window.text_first, *(extra or (None, None)),
        )  # fmt: skip
        return found
    name = choose(query, key, value, extra).name
    if name == "triton":
        from .triton import window2d as on_triton

        return on_triton(query, key, value, window=window, scale=scale, extra=extra)
    if name == "numba":
        from .compiled import window2d as in_loops

        return in_loops(query, key, value, window=window, scale=scale, extra=extra)
    return blocked.window2d(query, key, value, window=window, scale=scale, extra=extra)
