"""Static patterns of a call: how many keys they leave, and whether a kernel of their own can take the call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.dispatch import constant
from ..kernels.masks import STEP
from ..kernels.window2d import Window2d
from ..seams import AttentionCall, ExtraKeys, Pairs

Pattern = Pairs | Window2d
HIDDEN = (
    -1000.0
)  # an additive mask at or below this hides its key; diffusers writes -10000 or the dtype's minimum


def visible_keys(
    patterns: Sequence[Pattern], lq: int, lk: int, device: torch.device, mask: Tensor | None = None
) -> Tensor:
    """int64 (1|B, 1|H, lq): keys that each row sees through all of ``patterns`` and ``mask``.

    A few rows at a time where it must be. mask: bool (True = visible) or additive, (1|B, 1|H, 1|lq, lk).
    """
    if not patterns and mask is None:
        return torch.full((1, 1, lq), lk, device=device)
    if mask is None and len(patterns) == 1 and isinstance(patterns[0], Window2d):
        w = patterns[0]
        given = (*w.grid, float(w.radius), w.shape, w.dilation, w.text, w.text_first)
        return _counted(*given, device).clone()[None, None]  # callers add to it
    shown = mask if mask is None or mask.dtype == torch.bool else mask > HIDDEN
    found, keys = [], torch.arange(lk, device=device)[None]
    for start in range(0, lq, STEP):
        stop = min(lq, start + STEP)
        rows = torch.arange(start, stop, device=device)[:, None] + lk - lq
        seen = torch.ones(1, 1, len(rows), lk, dtype=torch.bool, device=device)
        for pattern in patterns:
            seen = seen & pattern.visible(rows, keys)
        if shown is not None:
            seen = seen & (shown if shown.shape[2] == 1 else shown[:, :, start:stop])[..., :lk]
        found.append(seen.sum(-1))
    return torch.cat(found, -1)


@functools.lru_cache(maxsize=8)
def _counts(window: Window2d, device: torch.device) -> Tensor:
    """The same window comes from all layers of a model."""
    return window.counts(device)


@constant
def _counted(
    rows: int,
    columns: int,
    radius: float,
    shape: str,
    dilation: int,
    text: int,
    text_first: bool,
    device: torch.device,
) -> Tensor:
    return _counts(Window2d((rows, columns), radius, shape, dilation, text, text_first), device)


def window_of(call: AttentionCall, patterns: Sequence[Pattern]) -> tuple[Window2d | None, tuple[str, ...]]:
    """The window that its kernel can compute for this call; or None, and why it cannot, where there is one.

    Raises InputError for a window that is not over this call's tokens.
    """
    windows = [p for p in patterns if isinstance(p, Window2d)]
    for window in windows:
        if not window.tokens == call.query.shape[2] == call.key.shape[2]:
            raise InputError(
                f"a window over {window.tokens} tokens was given for attention with {call.query.shape[2]} "
                f"queries and {call.key.shape[2]} keys"
            )
    if not windows:
        return None, ()
    present = {
        "another pattern": len(patterns) > 1,
        "a mask": call.mask is not None or call.causal or call.sliding_window is not None,
        "a position bias": call.position_bias is not None,
        "a soft-cap": call.softcap is not None,
        "learned sinks": call.sink_logits is not None,
    }
    reasons = tuple(f"window2d: the call has {name}" for name, there in present.items() if there)
    return (None, reasons) if reasons else (windows[0], ())


def extra_of_image(window: Window2d, extra: Sequence[ExtraKeys]) -> tuple[Any, list[ExtraKeys]]:
    """(keys and values for the kernel or None, those that have to be merged afterwards)."""
    mine = [e for e in extra if e.visible is None and e.bias is None and e.rows == window.image]
    if not mine:
        return None, list(extra)
    key, value = (torch.cat([getattr(e, name) for e in mine], 2) for name in ("key", "value"))
    return (key, value), [e for e in extra if e not in mine]
