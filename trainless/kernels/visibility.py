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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .dense import hidden_apart
from .masks import STEP, Visibility

__all__ = ["Visibility", "adds_bias", "bias_times", "shown_at", "visibility"]

# A model passes the same mask object to all its layers: remember what the last few were.
_RECOGNISED: OrderedDict[tuple[Any, ...], tuple[Any, int, Visibility]] = OrderedDict()
_REMEMBER = 8


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
    visible; below -16000 for hidden), each broadcastable to (B, H, lq, lk),
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


def bias_times(mask: Any, factor: float | Tensor, lq: int, lk: int) -> Any:
    """``mask`` with the finite values that it adds to the logits times ``factor``; itself when it adds none.

    factor: a number, or a tensor broadcastable to (B, H, Lq, 1).
    """
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return mask
    if mask.dim() == 4 and mask.shape[-1] >= lk and not _recognise(mask, lq, lk).additive:
        return mask
    return torch.where(hidden_apart(mask), (mask * factor).to(mask.dtype), mask)


def adds_bias(mask: Any, lq: int) -> bool:
    """Whether ``mask`` adds finite values to the logits of ``lq`` rows, besides hiding keys."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.dim() != 4:
        return False
    return _recognise(mask, lq, mask.shape[-1]).additive


def shown_at(mask: Tensor, place: Tensor) -> Tensor:
    """(B or 1,) bool: whether any row of a mask (B or 1, …, Lk) shows the key at ``place`` (), on the device."""
    if not torch.compiler.is_compiling():
        own = mask.index_select(-1, place[None])
        shown = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        return shown.flatten(1).any(1)
    # A sum over the columns: inductor (torch 2.13) makes C++ that does not compile of one column of a mask that it pads.
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    here = torch.arange(mask.shape[-1], device=mask.device) == place
    return (shown & here).flatten(1).any(1)


def _recognise(mask: Any, lq: int, lk: int, device: torch.device | None = None) -> Visibility:
    if torch.compiler.is_compiling():
        return _examine(mask, lq, lk, device)
    # Inference tensors count no versions; the masks that models build under it are never written to again.
    version = 0 if isinstance(mask, Tensor) and mask.is_inference() else getattr(mask, "_version", 0)
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
    steps = [(i, i + 1) for i in {0, lq // 2}] + [(i, min(lq, i + STEP)) for i in range(0, lq, STEP)]
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
    if whole.dim() == 4 and whole.shape[-1] == 1 < lk:
        whole = whole.expand(-1, -1, -1, lk)  # the same for every key
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
