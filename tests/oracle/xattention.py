"""XAttention: key blocks of a prompt chosen by the antidiagonals of its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import Call, Rule


class XAttention(Rule):
    """In the first call, for each row of the batch and each head, each block of queries sees some blocks of keys.

    Blocks and tiles are counted from the row's own first token. The value of a tile is the mean of its antidiagonal in
    the matrix of logits, in which tokens that are missing at the end are zero; a softmax over the tiles up to its own;
    a block's score is the sum over its tiles. Block 0 and a block's own are seen, then the others, largest first, until
    those before have ``threshold`` of the sum. shared: the mean score of the heads of a group decides for them.
    """

    def __init__(self, threshold: float, stride: int, block: int, shared: bool = False) -> None:
        super().__init__()
        self.threshold, self.stride, self.block, self.shared = threshold, stride, block, shared

    def seen(self, call: Call, seen: Tensor) -> Tensor:
        if call.past:
            return seen
        seen = seen.clone()
        heads = call.query.shape[1]
        for row in range(seen.shape[0]):
            there = call.real[row].nonzero().flatten()
            if not len(there):
                continue
            first, tokens = int(there[0]), len(there)
            scores = [self.score(call, row, head, there) for head in range(heads)]
            for head in range(heads):
                group = head // call.groups * call.groups
                own = scores[group : group + call.groups] if self.shared else [scores[head]]
                mean = torch.stack(own).mean(0)
                for a in range(mean.shape[0]):
                    kept = self.choose(mean[a, : a + 1].tolist(), float(mean[a].sum()))
                    rows = slice(first + a * self.block, first + min(tokens, (a + 1) * self.block))
                    for b in set(range(a + 1)) - kept:
                        seen[row, head, rows, first + b * self.block : first + (b + 1) * self.block] = False
        return seen

    def score(self, call: Call, row: int, head: int, there: Tensor) -> Tensor:
        """(n, n), block by block."""
        q, k = call.query[row, head, there], call.key[row, head // call.groups, there]
        n, side = len(there), -(-len(there) // self.stride)
        logits = torch.zeros(side * self.stride, side * self.stride, dtype=torch.float64)
        logits[:n, :n] = (q @ k.T).double() * call.scaling
        blocks = -(-n // self.block)
        found = torch.zeros(blocks, blocks, dtype=torch.float64)
        each = self.block // self.stride
        for a in range(side):
            tile = logits[a * self.stride : (a + 1) * self.stride]
            values = [
                sum(tile[self.stride - 1 - t, b * self.stride + t] for t in range(self.stride)) / self.stride
                for b in range(a + 1)
            ]
            for b, p in enumerate(torch.softmax(torch.stack(values), 0)):
                found[a // each, b // each] += p
        return found

    def choose(self, scores: list[float], whole: float) -> set[int]:
        own = len(scores) - 1
        kept = {0, own}
        before = sum(scores[b] for b in kept)
        for b in sorted(set(range(own)) - kept, key=lambda b: -scores[b]):
            if before >= self.threshold * whole:
                break
            kept.add(b)
            before += scores[b]
        return kept
