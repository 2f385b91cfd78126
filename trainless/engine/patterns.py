"""Static patterns of a call: how many keys they leave, and whether a kernel of their own can take the call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, Unsupported
from ..kernels.block_sparse import Blocks, Spans, block_sparse, choose
from ..kernels.common import Terms
from ..kernels.dispatch import constant
from ..kernels.masks import STEP, Visibility
from ..kernels.window2d import Window2d
from ..seams import AttentionCall, ExtraKeys, Pairs

HIDDEN = (
    -1000.0
)  # an additive mask at or below this hides its key; diffusers writes -10000 or the dtype's minimum


class Listed:
    """Blocks or spans for one call, also as a predicate like that of ``Pairs``; batch and heads are those it gives."""

    def __init__(self, pattern: Blocks | Spans, heads: int, lq: int, lk: int):
        self.pattern, self.offset, self.lk = pattern, lk - lq, lk
        self.start = pattern.start if isinstance(pattern, Blocks) else None
        self.batch = pattern.index.shape[0] if isinstance(pattern, Blocks) else 1
        self.batch = self.batch if self.start is None else len(self.start)
        self.heads = pattern.index.shape[1] if isinstance(pattern, Blocks) else heads
        self._table: Tensor | None = None

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """bool (batch, heads, rows, columns) for numbers counted as keys are."""
        rows, keys = q[:, 0] - self.offset, k[0]
        if isinstance(self.pattern, Spans):
            every = torch.arange(self.heads, device=q.device)
            return self.pattern.allows(0, every, rows, keys, self.offset)[None]
        size, table = self.pattern.size, self._blocks()
        if self.start is None:
            return table[:, :, rows // size][..., keys // size]
        found = []
        for own, start in zip(table.expand(self.batch, -1, -1, -1), self.start, strict=True):
            r, k = rows - start, keys - start
            there = (r >= 0)[:, None] & (k >= 0)
            found.append(own[:, r.clamp_min(0) // size][..., k.clamp_min(0) // size] & there)
        return torch.stack(found)

    def _blocks(self) -> Tensor:
        """bool (batch, heads, blocks of rows, blocks of keys): the lists, one entry for size × size pairs."""
        if self._table is None:
            assert isinstance(self.pattern, Blocks)
            index, count = self.pattern.index, -(-self.lk // self.pattern.size)
            table = torch.zeros(*index.shape[:3], count + 1, dtype=torch.bool, device=index.device)
            table.scatter_(
                3, torch.where(index < 0, count, index), True
            )  # what is none goes into one too many
            self._table = table[..., :count]
        return self._table


Pattern = Pairs | Window2d | Listed


def fitted(method: str, call: AttentionCall, given: Any) -> Any:
    """What a pattern contribution returned, blocks and spans made ready for this call.

    InputError, in the method's name, where they do not fit the call or are of another type.
    """
    if not isinstance(given, Blocks | Spans):
        return given
    b, h, _, lq, lk = call.shape
    if torch.compiler.is_compiling():
        raise Unsupported(
            f"{method}: a pattern of {type(given).__name__} is checked by its values, so no compiler can trace it; leave "
            "traceable=False"
        )
    index = given.index if isinstance(given, Blocks) else given.span
    if index.device != call.query.device:
        raise InputError(
            f"{method}: its {type(given).__name__} lie on {index.device}, the call on {call.query.device}"
        )
    causal = call.causal or (call.site is not None and call.site.causal)
    try:
        given.check(b, h, lq, lk, causal)
    except InputError as error:
        raise InputError(f"{method}: {error}") from None
    return Listed(given, h, lq, lk)


def blocks_read(call: AttentionCall, given: Blocks) -> tuple[int, int]:
    """How many blocks of keys lists leave of ``call``, and how many there are; what hides keys by twos is not counted."""
    b, h, _, lq, lk = call.shape
    return given.read(b, h, lq, lk, causal=call.causal or (call.site is not None and call.site.causal))


def through_lists(
    call: AttentionCall, listed: Listed, visible: Visibility, terms: Terms
) -> tuple[str, str, Tensor]:
    """Attention over blocks or spans on top of ``visible``: kernel, why not a faster one, output (B, H, Lq, D)."""
    given = call.query, call.key, call.value
    choice = choose(*given, listed.pattern, visibility=visible, terms=terms)
    out = block_sparse(
        *given, listed.pattern, visibility=visible, scale=terms.scale, position_bias=terms.position_bias,
        softcap=terms.softcap, sink_logits=terms.sink_logits,
    )  # fmt: skip
    return f"block_sparse/{choice.name}", "; ".join(choice.reasons), out


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


def keys_seen(call: AttentionCall, patterns: Sequence[Pattern], extra: Sequence[ExtraKeys]) -> Tensor:
    """int64 (1|B, 1|H, Lq, 1): how many keys each row of ``call`` sees, the extra ones included."""
    rows = call.query.shape[2]
    mask = call.mask if isinstance(call.mask, Tensor) and call.mask.dim() == 4 else None
    seen = visible_keys(patterns, rows, call.key.shape[2], call.query.device, mask)
    for more in extra:
        first, stop = more.rows or (0, rows)
        if more.visible is None:
            seen[..., first:stop] += more.key.shape[2]
            continue
        shown = more.visible.sum(-1)
        batch, heads, _ = torch.broadcast_shapes((*seen.shape[:2], 1), (*shown.shape[:2], 1))
        seen = seen.expand(batch, heads, rows).clone()
        seen[..., first:stop] += shown
    return seen[..., None]


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
