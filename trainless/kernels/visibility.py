"""Which query sees which key: one description of every mask a model may pass.

Models hand over None, a bool mask, an additive float mask or a flex ``BlockMask``. Most of these are a
plain causal or full mask with some keys padded away. ``visibility`` proves that structure with one pass
over the mask, row block by row block, so that fused operators apply; anything else stays what it is and
is evaluated a few rows at a time. Nothing here allocates a queries x keys tensor.

Shapes: B batch, H query heads, Lq queries, Lk keys. Query i and key j are positions in this call; under
a causal mask query i sees keys j <= i + Lk - Lq.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

# Rows looked at together while a mask is being recognised.
_STEP = 256
# A model passes the same mask object to all its layers: remember what the last few were.
_RECOGNISED: OrderedDict[tuple[Any, ...], tuple[Any, int, Visibility]] = OrderedDict()
_REMEMBER = 8


@dataclass(frozen=True, eq=False)
class Visibility:
    """Query i sees key j when every part that is present agrees.

    causal: j <= i + lk - lq. window: i + lk - lq - j < window if causal, else |…| <= window.
    keys: bool (B|1, Lk), keys that exist. dense: bool or additive float (B|1, H|1, Lq, Lk), or a flex
    BlockMask, when the mask has no simpler form. real: bool (B, Lq), query rows that are not padding
    (None: all); it changes ``counts`` only. mask: what the model passed, for fused operators.
    """

    lq: int
    lk: int
    device: torch.device
    causal: bool = False
    window: int | None = None
    keys: Tensor | None = None
    dense: Any = None
    real: Tensor | None = None
    mask: Any = None

    @property
    def offset(self) -> int:
        """How many keys precede the first query."""
        return self.lk - self.lq

    @property
    def structured(self) -> bool:
        """True when causal, window and keys say everything."""
        return self.dense is None

    @property
    def additive(self) -> bool:
        """True when the mask adds finite values to the logits (ALiBi and the like)."""
        return isinstance(self.dense, Tensor) and self.dense.dtype != torch.bool

    @property
    def kind(self) -> str:
        """A short name for reports."""
        if self.dense is not None:
            return "additive mask" if self.additive else "dense mask"
        parts = ["causal" if self.causal else "full"]
        parts += ["window"] if self.window is not None else []
        parts += ["padding"] if self.keys is not None else []
        return " + ".join(parts)

    def restrict(self, predicate: Callable[[Tensor, Tensor], Tensor]) -> Visibility:
        """This, and in addition only pairs with ``predicate(q (rows, 1), k (1, columns))``, bool.

        Both are counted as keys are: query row i has the number i + lk - lq. InputError with an additive
        mask, whose finite values have no place in a predicate.
        """
        if self.additive:
            raise InputError("a pattern cannot be combined with an additive mask that carries finite values")
        return replace(self, dense=_Pairs(predicate, self.dense, self.offset), mask=None)

    # ------------------------------------------------------------- evaluation

    def span(self, i0: int, i1: int) -> tuple[int, int]:
        """Keys [lo, hi) outside which no row of [i0, i1) sees anything."""
        lo, hi = 0, self.lk
        if self.causal:
            hi = max(0, min(hi, i1 + self.offset))
        if self.window is not None:
            lo = i0 + self.offset - self.window + (1 if self.causal else 0)
            lo = min(max(0, lo), hi)
            if not self.causal:
                hi = max(lo, min(hi, i1 + self.offset + self.window))
        return lo, hi

    def at(self, rows: Tensor, lo: int = 0, hi: int | None = None) -> Tensor | None:
        """bool (B|1, H|1, rows, hi - lo) for row numbers ``rows`` (n,); None when all is visible."""
        hi = self.lk if hi is None else hi
        found: Tensor | None = None
        if self.causal or self.window is not None:
            found = self._band(rows[:, None] + self.offset, torch.arange(lo, hi, device=rows.device))
            found = found[None, None]
        if self.keys is not None:
            keys = self.keys[:, None, None, lo:hi]
            found = keys if found is None else found & keys
            found = found.expand(-1, -1, rows.shape[0], -1)
        if self.dense is not None:
            dense = self._dense_at(rows, lo, hi)
            found = dense if found is None else found & dense
        return found

    def rows(self, i0: int, i1: int, lo: int = 0, hi: int | None = None) -> Tensor | None:
        """``at`` for the rows [i0, i1)."""
        return self.at(torch.arange(i0, i1, device=self.device), lo, hi)

    def bias_at(self, rows: Tensor, lo: int = 0, hi: int | None = None) -> Tensor | None:
        """The finite values that an additive mask adds, (B|1, H|1, rows, hi - lo); None without one.

        Entries that are not visible hold zero.
        """
        if not self.additive:
            return None
        piece = self.dense[:, :, rows, lo : self.lk if hi is None else hi]
        return piece.masked_fill(~_seen(piece), 0)

    def columns(self, index: Tensor, rows: Tensor, heads: Tensor | None = None) -> Tensor | None:
        """Whether each of ``rows`` (n,) sees the keys ``index`` (B, h, S): bool (B, h, n, S) or None.

        heads (h,): the query heads that ``index`` belongs to, None for all of them in order.
        """
        found: Tensor | None = None
        if self.causal or self.window is not None:
            found = self._band(rows[:, None] + self.offset, index[:, :, None, :])
        if self.keys is not None:
            keys = self.keys.expand(index.shape[0], -1)
            keys = keys.gather(1, index.flatten(1)).view(index.shape)[:, :, None, :]
            found = keys if found is None else found & keys
            found = found.expand(-1, -1, rows.shape[0], -1)
        if self.dense is not None:
            dense = self._pick(self._dense_at(rows, 0, self.lk), index, heads)
            found = dense if found is None else found & dense
        return found

    def bias_columns(self, index: Tensor, rows: Tensor, heads: Tensor | None = None) -> Tensor | None:
        """``bias_at`` for the keys ``index`` (B, h, S): (B, h, n, S) or None."""
        piece = self.bias_at(rows)
        return None if piece is None else self._pick(piece, index, heads)

    # ------------------------------------------------------------- counts

    def counts(self, batch: int) -> Tensor:
        """(B, Lk) int64: how many rows that are not padding see each key (in any head)."""
        real = self.real
        if real is None:
            real = torch.ones(1, self.lq, dtype=torch.bool, device=self.device)
        if self.structured:
            seen = self._counts_structured(real.long())
        else:
            seen = torch.zeros(1, self.lk, dtype=torch.long, device=self.device)
            for i0 in range(0, self.lq, _STEP):
                i1 = min(self.lq, i0 + _STEP)
                block = self.rows(i0, i1)
                assert block is not None  # a dense mask always evaluates
                seen = seen + (block.any(1) & real[:, i0:i1, None]).sum(1)
        return seen.expand(batch, -1).contiguous() if seen.shape[0] != batch else seen

    def empty(self) -> Tensor | None:
        """bool (B|1, H|1, Lq): rows that see no key at all; None when there is surely none."""
        if self.lk == 0:
            return torch.ones(1, 1, self.lq, dtype=torch.bool, device=self.device)
        if self.structured and self.keys is None and self.window is None:
            if not self.causal or self.offset >= 0:
                return None
            return (torch.arange(self.lq, device=self.device) + self.offset < 0)[None, None]
        if self.structured:
            assert self.keys is not None or self.window is not None
            one = torch.ones(1, self.lk, dtype=torch.bool, device=self.device)
            total = (one if self.keys is None else self.keys).long().cumsum(1)
            total = torch.cat([total.new_zeros(total.shape[0], 1), total], 1)
            lo, hi = self._limits()
            return ((total[:, hi] - total[:, lo]) <= 0)[:, None]
        found = []
        for i0 in range(0, self.lq, _STEP):
            block = self.rows(i0, min(self.lq, i0 + _STEP))
            assert block is not None
            found.append(~block.any(-1))
        return torch.cat(found, -1) if found else None

    # ------------------------------------------------------------- internals

    def _band(self, row: Tensor, key: Tensor) -> Tensor:
        """Causal and window for row numbers already shifted by ``offset``."""
        gap = row - key
        if self.causal:
            return gap >= 0 if self.window is None else (gap >= 0) & (gap < self.window)
        assert self.window is not None
        return gap.abs() <= self.window

    def _limits(self) -> tuple[Tensor, Tensor]:
        """Keys [lo, hi) that each row may see, (Lq,) each, from causal and window alone."""
        row = torch.arange(self.lq, device=self.device) + self.offset
        lo, hi = torch.zeros_like(row), torch.full_like(row, self.lk)
        if self.causal:
            hi = row + 1
        elif self.window is not None:
            hi = row + self.window + 1
        if self.window is not None:
            lo = row - self.window + (1 if self.causal else 0)
        return lo.clamp(0, self.lk), hi.clamp(0, self.lk)

    def _counts_structured(self, real: Tensor) -> Tensor:
        # Which rows see key j is an interval of rows: a difference of two running sums of ``real``.
        total = torch.cat([real.new_zeros(real.shape[0], 1), real.cumsum(1)], 1)
        key = torch.arange(self.lk, device=self.device) - self.offset
        lo, hi = torch.zeros_like(key), torch.full_like(key, self.lq)
        if self.causal:
            lo = key
        elif self.window is not None:
            lo = key - self.window
        if self.window is not None:
            hi = key + self.window + (0 if self.causal else 1)
        seen = total[:, hi.clamp(0, self.lq)] - total[:, lo.clamp(0, self.lq)]
        return seen if self.keys is None else seen * self.keys

    def _dense_at(self, rows: Tensor, lo: int, hi: int) -> Tensor:
        return _evaluate(self.dense, rows, lo, hi, self.device)

    @staticmethod
    def _pick(block: Tensor, index: Tensor, heads: Tensor | None) -> Tensor:
        b, h = index.shape[:2]
        if heads is not None and block.shape[1] > 1:
            block = block[:, heads]
        block = block.expand(b, h, -1, -1)
        return block.gather(-1, index[:, :, None, :].expand(-1, -1, block.shape[2], -1))


def _evaluate(dense: Any, rows: Tensor, lo: int, hi: int, device: torch.device) -> Tensor:
    if isinstance(dense, Tensor):
        piece = dense[:, :, rows, lo:hi]
        return piece if piece.dtype == torch.bool else _seen(piece)
    if isinstance(dense, _Pairs):
        return dense.at(rows, lo, hi)
    return _block_mask_rows(dense, rows, hi, device)[..., lo:hi]


class _Pairs:
    """A predicate over (query, key) numbers, on top of a mask without structure if there is one."""

    def __init__(self, predicate: Callable[[Tensor, Tensor], Tensor], under: Any, offset: int):
        self.predicate, self.under, self.offset = predicate, under, offset
        self.shape = getattr(under, "shape", (1, 1))

    def at(self, rows: Tensor, lo: int, hi: int) -> Tensor:
        keys = torch.arange(lo, hi, device=rows.device)
        seen = self.predicate((rows + self.offset)[:, None], keys[None, :]).expand(len(rows), len(keys))
        seen = seen[None, None]
        return seen if self.under is None else seen & _evaluate(self.under, rows, lo, hi, rows.device)

    def row(self, batch: int) -> _Pairs:
        """The part that belongs to one batch row."""
        under = self.under
        if isinstance(under, Tensor) and under.shape[0] > 1:
            under = under[batch : batch + 1]
        elif isinstance(under, _Pairs):
            under = under.row(batch)
        elif under is not None and not isinstance(under, Tensor):
            raise InputError("a pattern on top of a batched BlockMask is not supported; pass a tensor mask")
        return _Pairs(self.predicate, under, self.offset)


def visibility(
    mask: Any,
    *,
    causal: bool,
    lq: int,
    lk: int,
    real: Tensor | None = None,
    window: int | None = None,
    device: torch.device | str | None = None,
) -> Visibility:
    """Describe what a model passed as its attention mask.

    mask: None (then ``causal`` decides), bool with True for visible, additive float (zero or a bias for
    visible; the dtype's minimum, half of it, or -inf for hidden), each broadcastable to (B, H, lq, lk),
    or a flex BlockMask. real: bool (B, lq), False on padding queries. window: sliding window, applied on
    top of the mask; see ``Visibility``. Raises InputError for a mask of another shape or type.
    """
    if isinstance(mask, Tensor):
        base = _recognise(mask, lq, lk)
    elif mask is None:
        base = Visibility(lq, lk, torch.device(device or "cpu"), causal=causal)
    elif hasattr(mask, "mask_mod"):
        base = _recognise(mask, lq, lk, torch.device(device) if device is not None else None)
    else:
        raise InputError(f"attention mask of type {type(mask).__name__}: give None, a tensor or a BlockMask")
    if window is not None:
        if window < 1:
            raise InputError(f"window={window}: a sliding window has at least one key")
        if mask is not None:
            # The mask a model builds for such a layer holds the window already, from whichever side it
            # looks; cutting again must follow the side, and only a causal mask shows which one that is.
            base = replace(base, window=window) if base.causal else base
        else:
            base = replace(base, window=window)
    if real is not None:
        if real.dtype != torch.bool or real.shape[-1] != lq:
            raise InputError(f"real: bool (B, {lq}) is needed, got {real.dtype} {tuple(real.shape)}")
        base = replace(base, real=real)
    return base


def _seen(piece: Tensor) -> Tensor:
    # Models write "hidden" as -inf, as the dtype's minimum, or (T5) as half of it.
    return piece > torch.finfo(piece.dtype).min * 0.25


def _recognise(mask: Any, lq: int, lk: int, device: torch.device | None = None) -> Visibility:
    version = getattr(mask, "_version", 0)
    key = (id(mask), lq, lk)
    known = _RECOGNISED.get(key)
    if known is not None and known[0]() is mask and known[1] == version:
        _RECOGNISED.move_to_end(key)
        return replace(known[2], mask=mask, dense=mask if known[2].dense is True else known[2].dense)
    found = _examine(mask, lq, lk, device)
    # Keep neither the mask nor a view of it alive: `True` stands for "the mask itself".
    own = found.dense is mask
    _RECOGNISED[key] = (weakref.ref(mask), version, replace(found, mask=None, dense=True if own else None))
    if found.dense is not None and not own:
        del _RECOGNISED[key]
    while len(_RECOGNISED) > _REMEMBER:
        _RECOGNISED.popitem(last=False)
    return found


def _examine(mask: Any, lq: int, lk: int, device: torch.device | None) -> Visibility:
    if isinstance(mask, Tensor):
        whole = _four_dimensional(mask, lq, lk)
        plain = Visibility(lq, lk, mask.device, dense=mask if whole is mask else whole, mask=mask)
        if whole.shape[1] > 1 and whole.stride(1) != 0:
            return plain  # a mask per head is not worth the search
    else:
        device = device or mask.kv_num_blocks.device
        plain = Visibility(lq, lk, device, dense=mask, mask=mask)
        if mask.shape[1] > 1:
            return plain
    if lq == 0 or lk == 0 or torch.compiler.is_compiling():
        return plain
    last = plain.rows(lq - 1, lq)
    assert last is not None
    keys = last[:, 0, 0]
    found = Visibility(lq, lk, plain.device, keys=None if bool(keys.all()) else keys.clone(), mask=mask)
    options = [replace(found, causal=causal) for causal in ((True, False) if lq > 1 else (False,))]
    # A few single rows rule out most options before the whole mask is compared.
    steps = [(i, i + 1) for i in {0, lq // 2}] + [(i, min(lq, i + _STEP)) for i in range(0, lq, _STEP)]
    for i0, i1 in steps:
        block = plain.rows(i0, i1)
        assert block is not None
        if plain.additive and not _pure(plain.dense[:, :1, i0:i1], block[:, :1]):
            return plain
        options = [o for o in options if _agrees(o, block[:, :1], i0, i1)]
        if not options:
            return plain
    return options[0]


def _agrees(option: Visibility, block: Tensor, i0: int, i1: int) -> bool:
    claim = option.rows(i0, i1)
    return bool(block.all()) if claim is None else torch.equal(claim.expand_as(block), block)


def _pure(values: Tensor, seen: Tensor) -> bool:
    return not bool((values.masked_fill(~seen, 0) != 0).any())


def _four_dimensional(mask: Tensor, lq: int, lk: int) -> Tensor:
    whole = mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
    if whole.dim() != 4 or whole.shape[-1] < lk or whole.shape[-2] not in (1, lq):
        raise InputError(
            f"attention mask of shape {tuple(mask.shape)} does not fit {lq} queries and {lk} keys: "
            f"give something broadcastable to (B, H, {lq}, {lk})"
        )
    if whole.dtype != torch.bool and not whole.is_floating_point():
        raise InputError(f"attention mask of {whole.dtype}: give bool (True = visible) or additive float")
    if whole.shape[-1] != lk:
        whole = whole[..., :lk]  # a static cache's mask is as long as the cache
    if whole.shape[-2] != lq:
        whole = whole.expand(-1, -1, lq, -1)
    return whole


def _block_mask_rows(mask: Any, rows: Tensor, lk: int, device: torch.device) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask.mask_mod(b, h, rows[q], k)

    found: Tensor = create_mask(shifted, mask.shape[0], mask.shape[1], rows.shape[0], lk, device=str(device))
    return found
