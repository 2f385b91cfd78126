"""``window2d``: checks, and the choice of a form."""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError
from ..common import Terms, check_shapes
from ..dispatch import Choice, triton_reasons
from ..visibility import Visibility
from . import blocked
from .window import Window2d


def choose(query: Tensor, key: Tensor, value: Tensor) -> Choice:
    """Which form ``window2d`` runs for these tensors."""
    why = triton_reasons((query, key, value))
    if query.shape[-1] > 256 or value.shape[-1] != query.shape[-1]:
        why += (f"triton: head width {query.shape[-1]} (value {value.shape[-1]})",)
    if 0 in query.shape:
        why += ("triton: empty input",)
    return Choice("blocked", why) if why else Choice("triton")


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
    if choose(query, key, value).name == "triton":
        from .triton import window2d as on_triton

        return on_triton(query, key, value, window=window, scale=scale, extra=extra)
    return blocked.window2d(query, key, value, window=window, scale=scale, extra=extra)
