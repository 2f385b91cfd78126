"""XAttention: a prompt attends block by block to the blocks that sums over antidiagonals say most of the attention is in.

What     Queries and keys of a head in tiles of S = ``stride`` tokens: z_ab = scaling/S · sum over t of
         q_(aS+S-1-t) · k_(bS+t), the mean of the antidiagonal of tile (a, b); softmax over b up to a; the sum of these
         over the tiles of a pair of blocks is its score. Each block of ``block`` queries attends to the first block of
         keys, to its own, and to the others from the largest score on while the scores before them make up less than
         ``threshold`` of the row's whole.
Source   "XAttention: Block Sparse Attention with Antidiagonal Scoring" (arXiv 2503.16428), and its code.
Seams    pattern: lists of key blocks for each head, at the first call of a sequence. Later calls, decoding among them,
         attend to everything, and the cache holds everything.
Exact    bitwise the identity at threshold=1; prompts in which every block is chosen, those of two blocks among them,
         keep the stock model's bits.
Costs    1/S of the dense logits for the choice, then the share of the blocks that `report` says. Statistics (those of
         evictors among them) or another pattern at the same layer take the way of a predicate: exact, but as slow as
         dense attention.
Differs  Its thresholds by layer and head for one model are left out: one threshold. Tiles and blocks begin at each
         row's own first token, so that a padded row chooses as it would alone; tokens that a last tile lacks count as
         zeros, and a tile of none as no row. shared=True, one choice for the heads that share keys by the mean of their
         scores, is ours. The scores know nothing of learned sinks and temperatures. A prompt fed in several
         calls is sparse in the first alone. What the scores say is an estimate: where attention is spread evenly, the
         blocks hold less of it than ``threshold``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, Unsupported
from ..kernels import Blocks, visibility
from ..seams import AttentionCall, Contribution, Pattern, Site, State, Statistics
from .base import Method, option, register

TILES = 1 << 24  # entries of the matrix between tiles that are held at a time


@register
@dataclass(frozen=True)
class XAttention(Method):
    """Sparse prefill over blocks of keys chosen for each block of queries and each head.

    Raises InputError for a threshold of 0, a block that is no power of two and a stride that does not divide it.
    Refused where a layer has a sliding window, a position bias or soft-capped logits, is not causal, or has its keys
    chosen otherwise; a first call whose mask is not causal (but for padding at the ends) is refused by name.
    """

    name: ClassVar[str] = "xattention"
    summary: ClassVar[str] = "read only the key blocks of a prompt that hold most of its attention"
    source: ClassVar[str] = "XAttention: Block Sparse Attention with Antidiagonal Scoring (arXiv 2503.16428)"
    parts: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[dict[str, Any]] = {"threshold": 1.0}

    threshold: float = option(
        0.9,
        help="share of the estimated attention that is read; 1.0: all",
        origin="published",
        low=0.0,
        high=1.0,
    )
    stride: int = option(
        16, help="tokens of a side of the tiles whose antidiagonals are summed", origin="published", low=1
    )
    block: int = option(
        128,
        help="tokens of a block, a power of two; GPUs have a kernel from 16 on",
        origin="published",
        low=2,
    )
    shared: bool = option(False, help="one choice for all heads that share keys", origin="ours")

    def check(self) -> None:
        if not self.threshold > 0:
            raise InputError(f"threshold={self.threshold!r}: a share above 0 is needed; 1.0 reads everything")
        if self.block & (self.block - 1):
            raise InputError(f"block={self.block}: a power of two is needed, such as 128")
        if self.block % self.stride:
            raise InputError(f"stride={self.stride}: must divide block={self.block}")

    def refuses(self, site: Site) -> str | None:
        if site.facts.get("sliding_window"):
            return "a sliding-window layer reads no more than its window"
        if site.facts.get("position_bias"):
            return "its position bias is no part of the scores that choose blocks"
        if getattr(site.module, "attn_logit_softcapping", None) is not None:
            return "its soft cap on the logits is no part of the scores that choose blocks"
        other = site.facts.get("no_kv")
        if other:
            return f"which keys a row sees is not causal order alone, or not known: {other}"
        return None if site.causal else "not causal: blocks are chosen for a causal prompt"

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [
            Pattern(
                self._listed,
                first=True,
                by_head=True,
                lookahead=True,
                least=10 * self.block,
                inert=self.threshold >= 1.0,
            )
        ]

    # ------------------------------------------------------------------ one call

    def _listed(self, call: AttentionCall, statistics: Statistics, state: State) -> Blocks | None:
        """The blocks of a prompt; None where that is all of them, and in later calls."""
        b, h, _, lq, _ = call.shape
        if lq <= 2 * self.block:
            return None
        ends = self._ends(call)
        count = -(-lq // self.block)
        kept = torch.zeros(b, h, count, count, dtype=torch.bool, device=call.query.device)
        alike = set(ends)
        for start, stop in alike:
            rows = [n for n in range(b) if ends[n] == (start, stop)]
            at = rows if len(alike) > 1 else slice(None)
            query, key = call.query[at, :, start:stop], call.key[at, :, start:stop]
            blocks = -(-(stop - start) // self.block)
            if blocks:
                kept[at, :, :blocks, :blocks] = self.chosen(query, key, call.scaling)
        most = int(kept.sum(-1).max())
        if all(
            bool(own[:, :n, :n].sum() == h * n * (n + 1) // 2)
            for own, n in zip(kept, self._blocks(ends), strict=True)
        ):
            return None
        number = torch.arange(count, device=kept.device)
        index = torch.where(kept, number, -1).sort(-1, descending=True).values[..., :most].contiguous()
        first = None if all(start == 0 for start, _ in ends) else torch.tensor([start for start, _ in ends])
        return Blocks(index, self.block, start=None if first is None else first.to(kept.device))

    def _blocks(self, ends: Sequence[tuple[int, int]]) -> list[int]:
        return [-(-(stop - start) // self.block) for start, stop in ends]

    def _ends(self, call: AttentionCall) -> list[tuple[int, int]]:
        """For each row of the batch its first token and the place behind its last one; Unsupported for other masks."""
        b, _, _, lq, lk = call.shape
        where = call.site.name if call.site is not None else "this attention"
        if call.softcap is not None:
            raise Unsupported(
                f"xattention: the logits of {where} are soft-capped, which the scores of blocks do not know; leave "
                "the layer out with `where`, or remove the patch"
            )
        padding = call.mask if isinstance(call.mask, Tensor) and call.mask.dim() == 2 else None
        seen = visibility(
            call.mask if padding is None else None,
            causal=call.causal,
            lq=lq,
            lk=lk,
            window=call.sliding_window,
        )
        if (
            lk != lq
            or not (seen.structured and seen.causal and seen.window is None)
            or call.position_bias is not None
        ):
            raise Unsupported(
                f"xattention: {where} was given a prompt of {lq} tokens over {lk} keys whose mask is not causal, or has "
                "a window or a bias; leave the layer out with `where`, or remove the patch"
            )
        if call.real is None:
            return [(0, lq)] * b
        ends = []
        for real in call.real.expand(b, -1):
            tokens = real.nonzero().flatten().tolist()
            if tokens and tokens[-1] - tokens[0] + 1 != len(tokens):
                raise Unsupported(
                    f"xattention: {where} was given padding among the tokens of a prompt; put it at an end"
                )
            ends.append((tokens[0], tokens[-1] + 1) if tokens else (0, 0))
        return ends

    # ------------------------------------------------------------------ the choice

    def chosen(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """bool (B, H, n, n): the blocks of keys that each block of queries of query (B, H, L, D) reads."""
        score, rows = self.scores(query, key, scaling)
        _, h, blocks, _ = score.shape
        if self.shared:
            hkv = key.shape[1]
            score = score.unflatten(1, (hkv, h // hkv)).mean(2)
        number = torch.arange(blocks, device=score.device)
        causal = number <= number[:, None]
        forced = (number == 0) | (number == number[:, None])
        order = (
            score.masked_fill(forced & causal, math.inf).sort(dim=-1, descending=True, stable=True).indices
        )
        ranked = score.gather(-1, order)
        before = ranked.cumsum(-1) - ranked
        taken = before < self.threshold * rows[:, None]
        kept = torch.zeros_like(taken).scatter_(-1, order, taken)
        kept = (kept | forced) & causal
        return kept.repeat_interleave(h // kept.shape[1], 1)

    def scores(self, query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """(B, H, n, n): estimated attention of each block of queries on each block of keys, and its sum (n,) over these.

        query (B, H, L, D), key (B, Hkv, L, D). In float32, in float64 for float64.
        """
        (b, h, length, d), hkv, stride = query.shape, key.shape[1], self.stride
        each, exact = self.block // stride, query.dtype == torch.float64
        blocks = -(-length // self.block)
        missing = blocks * self.block - length
        query, key = (torch.nn.functional.pad(t, (0, 0, 0, missing)) for t in (query, key))
        # Reversed inside of its tile, a query meets the key on the antidiagonal.
        across = (
            (query * (scaling / stride))
            .unflatten(2, (-1, stride))
            .flip(3)
            .reshape(b, hkv, h // hkv, -1, stride * d)
        )
        along = key.reshape(b, hkv, -1, stride * d).transpose(2, 3)
        real = -(-length // stride)  # tiles that hold a token
        found = query.new_zeros(b, h, blocks, blocks, dtype=torch.float64 if exact else torch.float32)
        step = each * max(1, min(128 // each or 1, TILES // max(1, b * h * blocks * each * each)))
        for i0 in range(0, blocks * each, step):
            i1 = min(blocks * each, i0 + step)
            z = across[:, :, :, i0:i1].flatten(2, 3) @ along[..., :i1]
            z = z.view(b, h, i1 - i0, i1).to(found.dtype)
            later = torch.ones(i1 - i0, i1 - i0, dtype=torch.bool, device=z.device).triu_(1)
            z[..., i0:].masked_fill_(later, -math.inf)
            z = torch.softmax(z, -1)
            if real < i1:
                z[:, :, max(0, real - i0) :] = 0
            r0, r1 = i0 // each, i1 // each
            found[:, :, r0:r1, :r1] = z.view(b, h, r1 - r0, each, r1, each).sum((3, 5))
        tiles = torch.arange(blocks, device=found.device) * each
        return found, (real - tiles).clamp(0, each).to(found.dtype)
