"""KVzip: each row read a second time, alone, and pairs chosen among all layers and heads."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from . import core
from .core import Call, Rule, install
from .evict import Evictor, Turn


class KVzip(Evictor):
    """After the first call, per batch row: round(ratio · pairs) of its pairs (layer, key/value head, token) stay.

    The row's own tokens are read again ``chunk`` at a time, each chunk by itself behind a fresh reading of the whole row,
    at the positions that follow, with whatever other rules there are. The score of a pair is the largest probability that
    a row of its chunk has for it, in any query head of the group, in a softmax over the first ``sinks`` tokens, the
    chunk's cached keys and the chunk's own keys up to the row. The first ``sinks`` tokens and the newest one always stay.
    Ties go to the newer token. Nothing is evicted after that.
    """

    def __init__(
        self, ratio: float = 0.5, sinks: int = 4, chunk: int = 2048, pool: str = "model", floor: float = 0.0
    ) -> None:
        super().__init__()
        self.share, self.sinks, self.chunk, self.pool, self.floor = ratio, sinks, chunk, pool, floor
        self.given: tuple[str, Tensor] | None = None
        self.undecided: list[Call] = []

    def attach(self, model: nn.Module) -> list[Any]:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
            self.now = name, args[0] if args else kwargs[name]

        self.model = model
        self.beside = [r for r in core._oracles[model].rules if r is not self]
        return [model.register_forward_pre_hook(before, with_kwargs=True)]

    def begin(self, call: Call) -> None:
        super().begin(call)
        if self.undecided and self.undecided[-1].site.layer >= call.site.layer:
            self.undecided = []
        self.given = self.now

    def after(self, call: Call, p: Tensor) -> None:
        super().after(call, p)
        if not call.past:
            self.undecided.append(call)

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        return set(candidates), math.inf

    def present(self, call: Call) -> Tensor:
        if call.past:
            self.decide()
        return super().present(call)

    def kept(self, layer: int, call: int, row: int, kv_head: int) -> list[int]:
        self.decide()
        return super().kept(layer, call, row, kv_head)

    def decide(self) -> None:
        """Choose for all layers, now that the first call is over."""
        calls, self.undecided = self.undecided, []
        if not calls:
            return
        assert self.given is not None
        name, tokens = self.given
        layers = [call.site.layer for call in calls]
        for row in range(tokens.shape[0]):
            real = calls[0].real[row].nonzero().flatten()
            found = self.scores_of(name, tokens[row, real], calls)
            for layer, call, heads in zip(layers, calls, self.chosen(found), strict=True):
                whole = self.state(call)["kept"]
                for head, tokens_kept in enumerate(heads):
                    whole[row, head] = False
                    whole[row, head, real[tokens_kept]] = True
                self.turns[layer][0] = Turn(
                    whole, self.turns[layer][0].real, None, self.turns[layer][0].margin
                )

    @torch.no_grad()
    def scores_of(self, name: str, tokens: Tensor, calls: list[Call]) -> list[Tensor]:
        """(Hkv, n) of each layer for one row, by a loop over chunks, heads and rows."""
        length, wanted = tokens.shape[0], [call.site.layer for call in calls]
        hkv = [call.key.shape[1] for call in calls]
        found = [torch.zeros(n, length, dtype=torch.float64) for n in hkv]
        model = copy.deepcopy(self.model)
        for start in range(0, length, self.chunk):
            part = tokens[start : start + self.chunk]
            read = _Logits()
            with install(model, [*(copy.deepcopy(r) for r in self.beside), read]):
                cache = DynamicCache()
                model(**{name: tokens[None]}, past_key_values=cache, use_cache=True)
                read.found.clear()
                # At the positions that follow, which the model knows: not all count from 0.
                model(**{name: part[None]}, past_key_values=cache, use_cache=True)
            for mine, layer in zip(found, wanted, strict=True):
                logits = read.found[layer]
                times = logits.shape[0] // mine.shape[0]
                cached = set(range(start, start + part.shape[0]))
                for head in range(logits.shape[0]):
                    for row in range(part.shape[0]):
                        own = range(length, length + row + 1)
                        columns = sorted({*range(min(self.sinks, length)), *cached, *own})
                        p = logits[head, row, columns].softmax(0)
                        for column, value in zip(columns, p, strict=True):
                            if column in cached:
                                at = head // times, column
                                mine[at] = torch.maximum(mine[at], value)
        return found

    def chosen(self, found: list[Tensor]) -> list[list[list[int]]]:
        return kept(found, self.share, self.sinks, self.pool, self.floor)


class _Logits(Rule):
    """Remembers the logits of the last call of every layer, (H, Lq, Lk)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        self.found[call.site.layer] = logits[0]
        return logits


def kept(
    found: list[Tensor], ratio: float, sinks: int, pool: str, floor: float = 0.0
) -> list[list[list[int]]]:
    """Tokens kept, ascending, by layer and head, for the scores of one row."""
    length = found[0].shape[1]
    always, pairs = set(), []
    for layer, one in enumerate(found):
        for head in range(one.shape[0]):
            order = sorted(range(length), key=lambda j: (float(one[head, j]), j), reverse=True)
            first = {*range(min(sinks, length)), length - 1, *order[: round(floor * ratio * length)]}
            always |= {(layer, head, j) for j in first}
            pairs += [(float(one[head, j]), j, layer, head) for j in range(length)]
    groups = {"model": lambda p: 0, "layer": lambda p: p[2], "head": lambda p: p[2:]}[pool]
    stays = set(always)
    for group in {groups(p) for p in pairs}:
        mine = [p for p in pairs if groups(p) == group]
        count = round(ratio * len(mine)) - sum((p[2], p[3], p[1]) in always for p in mine)
        rest = sorted((p for p in mine if (p[2], p[3], p[1]) not in always), reverse=True)
        stays |= {(p[2], p[3], p[1]) for p in rest[: max(0, count)]}
    return [
        [sorted(j for la, h, j in stays if (la, h) == (layer, head)) for head in range(one.shape[0])]
        for layer, one in enumerate(found)
    ]
