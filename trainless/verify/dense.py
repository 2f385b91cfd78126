"""One attention call computed in full: what every seam means, in plain torch, with the whole matrix at hand.

Nothing of the engine, its kernels or its paths is used here, and nothing is fast: this is for the calls of a small
probe. Tensors are widened to float64 (float32 where a device has none), so that what differs is the engine.

Shapes: B batch, H query heads, Lq rows, Lk keys. Keys and values come repeated to the query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.watching import Made
from ..kernels import Blocks, Spans
from ..seams import ExtraKeys, MassMove, Pairs, Tokens

HIDDEN = -16000.0  # additive masks write "hidden" as a number below this
SMALL = 1e-6  # of a row's probability: rows whose outcome hangs on less than this are left out


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


# ---------------------------------------------------------------- what the model asked for


@dataclass
class AskedCall:
    """A call as the model made it, read once: which pairs exist, and what is added to their logits."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    seen: Tensor | None = None  # bool, broadcastable to (B, H, Lq, Lk)
    added: Tensor | None = None  # position bias, and what an additive mask adds to visible pairs
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)


def read(made: Made, key: Tensor, value: Tensor, causal: bool, from_start: bool = False) -> AskedCall:
    """``made`` with ``key`` and ``value`` (B, H, Lk, D), which may be more than the call was handed.

    causal: what holds where the call did not say. from_start: rows are numbered from the first key, as in a
    buffer that is filled from its beginning, and not from the end.
    """
    lq, lk = made.query.shape[2], key.shape[2]
    causal = causal if made.causal is None else made.causal
    mask, seen, added = made.mask, None, None
    device = key.device
    rows = torch.arange(lq, device=device)[:, None] + (0 if from_start else lk - lq)
    columns = torch.arange(lk, device=device)[None]
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    if plain:
        # A mask of two dimensions marks padding; order is then left to the flag.
        seen = torch.ones(1, 1, lq, lk, dtype=torch.bool, device=device)
        if causal and lq > 1:
            seen = seen & (columns <= rows)
        if made.sliding_window is not None:
            seen = seen & (rows - columns < made.sliding_window)
        if mask is not None:
            seen = seen & mask[:, None, None, -lk:].bool()
    elif isinstance(mask, Tensor):
        mask = mask[..., :lk]
        seen = mask if mask.dtype == torch.bool else mask > HIDDEN
        if mask.dtype != torch.bool:
            added = wide(mask).masked_fill(~seen, 0)
    else:
        seen = _of_block_mask(mask, lq, lk, device)
    bias = made.position_bias
    if bias is not None:
        # T5 and its kin hand over their mask inside the bias.
        hidden = bias <= HIDDEN
        seen = seen & ~hidden
        bias = wide(bias).masked_fill(hidden, 0)
        added = bias if added is None else added + bias
    scaling = made.query.shape[-1] ** -0.5 if made.scaling is None else float(made.scaling)
    sinks = None if made.sink_logits is None else wide(made.sink_logits)
    return AskedCall(wide(made.query), wide(key), wide(value), scaling, seen, added, made.softcap, sinks)


def _of_block_mask(mask: Any, lq: int, lk: int, device: torch.device) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    found: Tensor = create_mask(mask.mask_mod, mask.shape[0], mask.shape[1], lq, lk, device=str(device))
    return found


# ---------------------------------------------------------------- what methods published for it


@dataclass
class Published:
    """The values of the contributions to one call, as their methods returned them."""

    factors: list[Any] = field(default_factory=list)  # numbers, or tensors for (B, H, Lq, 1)
    pairs: list[Pairs | Any] = field(default_factory=list)  # anything with visible(q, k)
    tokens: list[Tokens] = field(default_factory=list)
    extra: list[ExtraKeys] = field(default_factory=list)
    moves: list[tuple[tuple[int, ...] | None, MassMove]] = field(default_factory=list)
    edits: list[tuple[tuple[int, ...] | None, Tensor]] = field(default_factory=list)  # edited (B, h, Lq, Lk)
    gains: list[tuple[tuple[int, ...] | None, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass
class Found:
    """output (B, H, Lq, Dv), probabilities (B, H, Lq, Lk) before edits, lse (B, H, Lq); doubtful (B, H, Lq): rows
    whose outcome hangs on rounding, or that see nothing; largest: the largest logit by absolute value."""

    output: Tensor
    probabilities: Tensor
    lse: Tensor
    doubtful: Tensor
    largest: float


def attention(asked: AskedCall, published: Published) -> Found:
    """The whole call: logits → softcap → bias → factors → pairs → softmax → edits → values → gains."""
    b, h, lq, _ = asked.query.shape
    lk = asked.key.shape[2]
    z = asked.query @ asked.key.mT * asked.scaling
    if asked.softcap is not None:
        z = asked.softcap * torch.tanh(z / asked.softcap)
    if asked.added is not None:
        z = z + asked.added
    sinks = None if asked.sinks is None else asked.sinks[None, :, None, None].expand(b, h, lq, 1)
    factor: Any = 1.0
    for value in published.factors:
        factor = factor * (wide(value) if isinstance(value, Tensor) else value)
    z = z * factor
    sinks = sinks if sinks is None else sinks * factor
    seen = torch.ones(b, h, lq, lk, dtype=torch.bool, device=z.device)
    if asked.seen is not None:
        seen = seen & asked.seen
    rows = torch.arange(lk - lq, lk, device=z.device)[:, None]
    columns = torch.arange(lk, device=z.device)[None]
    for pattern in published.pairs:
        seen = seen & _shown(pattern, rows, columns, b, h)
    taking = None
    for tokens in published.tokens:
        seen = seen & tokens.keep[:, None, None, :]
        own = tokens.keep[:, None, lk - lq :]
        taking = own if taking is None else taking & own
    doubtful = ~seen.any(-1)
    z = z.masked_fill(~seen, -torch.inf)
    largest = float(z.masked_fill(~seen, 0).abs().max()) if z.numel() else 0.0
    value = asked.value
    for more in published.extra:
        z, value = _beside(z, value, asked, more, factor)
    lse = torch.logsumexp(z if sinks is None else torch.cat([z, sinks], -1), -1)
    p = torch.exp(z - lse[..., None]).nan_to_num(0.0)
    edited = p
    for heads, edit in published.edits:
        edited = edited.clone()
        edited[:, _of(heads, h)] = wide(edit)
    for heads, move in published.moves:
        edited, unsure = _moved(edited, move, _of(heads, h))
        doubtful = doubtful | unsure
    out = edited @ value
    if taking is not None:
        out = out.masked_fill(~taking[..., None], 0)
        doubtful = doubtful & taking  # what takes no part gets zeros, and that is certain
    for heads, gain in published.gains:
        out = out.transpose(1, 2).clone()  # a gain is for (B, Lq, H, D)
        index = _of(heads, h)
        out[:, :, index] = out[:, :, index] * (wide(gain) if isinstance(gain, Tensor) else gain)
        out = out.transpose(1, 2)
    return Found(out, p, lse, doubtful, largest)


def _shown(pattern: Any, rows: Tensor, columns: Tensor, b: int, h: int) -> Tensor:
    """Which pairs a pattern allows; rows (Lq, 1) are counted as keys are. Lists are read head by head."""
    if not isinstance(pattern, Blocks | Spans):
        found: Tensor = pattern.visible(rows, columns)
        return found
    offset, every = columns.shape[1] - rows.shape[0], torch.arange(h, device=rows.device)
    own, keys = rows[:, 0] - offset, columns[0]
    of_row = [
        torch.cat([pattern.allows(n, head[None], own, keys, offset) for head in every]) for n in range(b)
    ]
    return torch.stack(of_row)


def _of(heads: tuple[int, ...] | None, h: int) -> list[int]:
    return list(range(h)) if heads is None else list(heads)


def _beside(
    z: Tensor, value: Tensor, asked: AskedCall, more: ExtraKeys, factor: Any
) -> tuple[Tensor, Tensor]:
    """Logits and values with keys beside the sequence, which the rows that they are for see."""
    h, lq = z.shape[1:3]
    key, its = (wide(t).repeat_interleave(h // t.shape[1], 1) for t in (more.key, more.value))
    beside = asked.query @ key.mT * asked.scaling
    if asked.softcap is not None:
        beside = asked.softcap * torch.tanh(beside / asked.softcap)
    first, stop = more.rows or (0, lq)
    if more.bias is not None:
        beside[:, :, first:stop] += wide(more.bias)
    beside = beside * factor
    seen = torch.zeros(1, 1, lq, key.shape[2], dtype=torch.bool, device=z.device)
    seen = seen.expand(z.shape[0], h, -1, -1).clone()
    seen[:, :, first:stop] = True if more.visible is None else more.visible
    return torch.cat([z, beside.masked_fill(~seen, -torch.inf)], -1), torch.cat([value, its], 2)


def _moved(p: Tensor, move: MassMove, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Probabilities after a move in ``heads``, and the rows (B, H, Lq) of which it cannot be said."""
    own = p[:, heads]
    source = move.source[:, :, None, :].expand(-1, own.shape[1], -1, -1)
    target = ~source if move.target is None else move.target[:, :, None, :] & ~source
    keep = move.keep
    if isinstance(keep, Tensor):
        keep = wide(keep)[..., None]
    on_source = (own * source).sum(-1, keepdim=True)
    on_target = (own * target).sum(-1, keepdim=True)
    freed = on_source * (1 - keep)
    share = torch.where(on_target > 0, own * target / on_target, 0)
    edited = torch.where(source, own * keep, own) + freed * share
    rows = on_target > 0
    if move.rows is not None:
        rows = rows & move.rows[..., None]
    whole = p.clone()
    whole[:, heads] = torch.where(rows, edited, own)
    unsure = torch.zeros(p.shape[:3], dtype=torch.bool, device=p.device)
    # Where next to nothing can receive what is freed, rounding decides whether the row is edited at all.
    unsure[:, heads] = ((on_target < SMALL) & (on_source > SMALL))[..., 0]
    return whole, unsure


# ---------------------------------------------------------------- how far two outputs may be apart


def tolerance(dtype: torch.dtype, largest: float, rounded: bool = False) -> float:
    """Of a row's output, as a share of the largest value that its head could give.

    Rounding of a logit, which grows with its size, is a relative error of its probability. In half precision the
    products are made in float32 and their results rounded; where ``rounded``, the queries were as well. In float64
    nothing is wider than what is held against it, so that both sides round, and sums that move between keys do so again.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        return 64 * eps * (4 + largest)
    if dtype == torch.float32:
        return 8 * eps * (4 + largest)
    return eps * (4 + largest / 4 if rounded else 4)


def apart(got: Tensor, want: Tensor, value: Tensor, left_out: Tensor) -> Tensor:
    """(B, H, Lq): distance of two outputs (B, H, Lq, D) as a share of the largest value (B, H, Lk, D) of the head."""
    size = value.norm(dim=-1).amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    gap = (wide(got) - want).norm(dim=-1) / size
    return gap.nan_to_num(float("inf")).masked_fill(left_out, 0)
