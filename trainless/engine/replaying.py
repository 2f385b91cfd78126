"""What a second reading of a prompt says of the pairs that the first has cached: column maxima of a narrow softmax."""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 1 << 24  # logits at a time


def pair_scores(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    real: Tensor,
    sinks: Tensor,
    sunk: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """(B, Hkv, n): the largest probability that a row of the second reading has for each pair of its chunk.

    query (B, H, n, D), key (B, Hkv, L + n, D): of a call that reads n tokens of the prompt a second time, after the L
    tokens that are cached. columns (B, n): where these tokens lie in the cache; real (B, n): which exist. sinks, sunk
    (B, s): columns of the first tokens and which of those are to be seen. The softmax of row i is over the sinks, the
    cached keys at ``columns`` and the new keys 0..i; a learned sink takes its part. In float32, or float64 of such keys.
    """
    b, h, n, d = query.shape
    hkv, held = key.shape[1], key.shape[2] - query.shape[2]
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    place = torch.cat([sinks, columns], 1)[:, None, :, None].expand(b, hkv, -1, d)
    keys = torch.cat([key[:, :, :held].gather(2, place), key[:, :, held:]], 2).to(wide)[:, :, None]
    there = torch.cat([sunk, real], 1)
    first = sinks.shape[1]
    found = keys.new_zeros(b, hkv, n)
    step = max(1, ROOM // (b * h * keys.shape[3]))
    number = torch.arange(n, device=query.device)
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        part = query[:, :, rows].to(wide).unflatten(1, (hkv, -1))
        logits = part @ keys.transpose(-1, -2) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        own = real[:, None, :] & (number <= number[rows, None])
        seen = torch.cat([there[:, None].expand(-1, own.shape[1], -1), own], 2)[:, None, None]
        logits = logits.masked_fill(~seen, float("-inf"))
        total = logits.logsumexp(-1, keepdim=True)
        if sink_logits is not None:
            learned = sink_logits.to(wide).reshape(1, hkv, -1, 1, 1)
            total = torch.logaddexp(total, learned)
        mine = (logits[..., first : first + n] - total).exp()
        mine = mine.masked_fill(~real[:, None, None, rows, None], 0)
        found = torch.maximum(found, mine.amax((2, 3)))
    return found.masked_fill(~real[:, None], 0)
