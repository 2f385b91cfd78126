"""A choice among the pairs of all layers and heads of a row: which of them stay, by one score for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALWAYS = float("inf")


def chosen_pairs(
    scores: Sequence[Tensor], real: Tensor | None, ratio: float, sinks: int, among: str, floor: float = 0.0
) -> list[Tensor]:
    """Which pairs stay: bool (B, Hkv, S) for the scores (B, Hkv, S) of each layer.

    real (B, S): which tokens are no padding; None: all. Of the pairs of a row round(ratio · pairs) stay where they are
    chosen ``among`` those of the "model", and as many of each "layer" or "head" otherwise. The first ``sinks`` tokens and
    the newest one stay in every head, even where those are more. floor: see ``Replay``. Ties go to the newer token, then
    to the earlier layer and head.
    """
    kept = [torch.zeros(one.shape, dtype=torch.bool, device=one.device) for one in scores]
    for row in range(scores[0].shape[0]):
        there = None if real is None else real[row].nonzero()[:, 0]
        rows = [one[row] if there is None else one[row][:, there.to(one.device)] for one in scores]
        for number, mask in enumerate(_of_row(rows, ratio, sinks, among, floor)):
            mask = mask.to(kept[number].device)
            if there is None:
                kept[number][row] = mask
            else:
                kept[number][row, :, there.to(mask.device)] = mask
    return kept


def _of_row(rows: Sequence[Tensor], ratio: float, sinks: int, among: str, floor: float) -> list[Tensor]:
    """The same for one row without padding: (Hkv, n) of each layer."""
    length = rows[0].shape[1]
    if length == 0:
        return [torch.zeros(one.shape, dtype=torch.bool, device=one.device) for one in rows]
    sizes = [one.shape[0] for one in rows]
    held = torch.cat([_held(one, round(floor * ratio * length), sinks) for one in rows])
    if among == "model":
        groups = [held]
    else:
        groups = list(held.split(sizes if among == "layer" else 1))
    return list(torch.cat([_best(one, round(ratio * one.numel())) for one in groups]).split(sizes))


def _held(scores: Tensor, best: int, sinks: int) -> Tensor:
    """Scores (heads, n) in which those that always stay are larger than any; on the host, where all layers meet."""
    scores = scores.detach().to("cpu", copy=True)
    if best:
        number = (
            scores.shape[1] - 1 - _newest_first(scores).argsort(dim=1, descending=True, stable=True)[:, :best]
        )
        scores.scatter_(1, number, ALWAYS)
    scores[:, :sinks] = ALWAYS
    scores[:, -1] = ALWAYS
    return scores


def _newest_first(scores: Tensor) -> Tensor:
    return scores.flip(1)


def _best(scores: Tensor, count: int) -> Tensor:
    """bool (heads, n): the ``count`` best, and all that always stay."""
    count = max(count, int((scores == ALWAYS).sum()))
    flat = _newest_first(scores).t().reshape(-1)
    found = torch.zeros_like(flat, dtype=torch.bool)
    found[flat.argsort(descending=True, stable=True)[:count]] = True
    return found.view(scores.shape[1], scores.shape[0]).t().flip(1)
