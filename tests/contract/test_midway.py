"""In the middle of a conversation: a patch that is paused, resumed, removed or added, a cache that is copied.

Everything that a method has decided stays decided while it is off: what was dropped is gone, what was packed stays
packed, what comes is kept as it is. While the patch is on the model, paused or not, that is exact. Once it is
removed, the model's own mask has to fit what every layer holds: exact, or refused at the call.

The whole grid takes minutes: TRAINLESS_ALL=1.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import (
    H2O,
    AttnTemperature,
    KvQuant,
    SnapKV,
    Streaming,
    Tova,
    float64_math,
    install,
    models,
    position_ids,
    real_rows,
    replay,
)
from transformers import DynamicCache

import trainless
from trainless.patchers.zipcache import ZipCache as ZipCacheMethod

from .cases import ProbedZipCache, SeededZipVL
from .tools import EXACT, LENGTHS, same

BEFORE = [14, 1]  # a prompt and a step, and then something happens
AFTER = {"one": [1] * 6, "several": [2, 1, 3, 1]}
OFF = 2  # calls that a pause lasts, where it ends


class Idle:
    """Mixed into an oracle: in the calls of ``off`` it drops, packs and scores nothing."""

    off: set[int]

    def _is_off(self, call: Any) -> bool:
        return len(self.turns[call.site.layer]) in self.off

    def scores(self, call: Any, p: torch.Tensor) -> Any:
        if not self._is_off(call):
            return super().scores(call, p)
        if isinstance(self, SeededZipVL):
            self.state(call)["plan"] = []
            return None
        return super().scores(call, p * 0)

    def choose(self, call: Any, row: int, head: int, candidates: list[int], score: Any) -> Any:
        if self._is_off(call):
            return set(candidates), float("inf")
        return super().choose(call, row, head, candidates, score)

    def pack(self, call: Any, p: torch.Tensor) -> None:
        # The call's own turn is in the list already when it comes to packing.
        if len(self.turns[call.site.layer]) - 1 not in self.off or isinstance(self, SeededZipVL):
            super().pack(call, p)


class LateTemperature(AttnTemperature):
    """From call ``start`` on."""

    def __init__(self, temperature: float, start: int) -> None:
        super().__init__(temperature)
        self.start, self.counted = start, {}

    def begin(self, call: Any) -> None:
        super().begin(call)
        self.counted[call.site.name] = -1

    def logits(self, call: Any, logits: torch.Tensor) -> torch.Tensor:
        self.counted[call.site.name] += 1
        return super().logits(call, logits) if self.counted[call.site.name] >= self.start else logits


@dataclass(frozen=True)
class Kind:
    method: str
    parameters: dict[str, Any]
    rule: Callable[..., Any]
    given: dict[str, Any]

    def idle(self, off: set[int], layers: Any) -> Any:
        made = type(f"Idle{self.rule.__name__}", (Idle, self.rule), {})
        rule = made(**self.given)
        rule.off, rule.layers = off, layers
        return rule


def _same(method: str, rule: Any, **given: Any) -> Kind:
    return Kind(method, given, rule, given)


ZIP = {"interval": 3, "probes": (2, 0.3)}
ZIPVL = {"tau": 0.7, "probes": (2, 3), "interval": 3, "min_tokens": 6}
KINDS = {
    "streaming": _same("streaming", Streaming, sinks=2, recent=4),
    "h2o": Kind("h2o", {"heavy": 3, "recent": 2}, H2O, {"heavy": 3, "recent": 2, "reduce": "call"}),
    "tova": _same("tova", Tova, capacity=5),
    "snapkv": _same("snapkv", SnapKV, capacity=6, window=3, pool=3),
    "kvquant": _same("kvquant", KvQuant, group=3, residual=2),
    "zipcache": Kind("zipcache", ZIP, ProbedZipCache, {"method": ZipCacheMethod(**ZIP), "interval": 3}),
    "zipvl": _same("zipvl", SeededZipVL, **ZIPVL),
    "zipvl-discard": _same("zipvl", SeededZipVL, mode="discard", **ZIPVL),
}
EVENTS = ("paused", "resumed", "removed", "added", "copied")
PLACES = {"all": (None, {0, 1, 2}), "first": (":2", {0, 1}), "last": ("2:", {2})}
WHOLE = [
    (kind, event, sizes, padded, place, attention)
    for kind, event, sizes, padded, place, attention in itertools.product(
        KINDS, EVENTS, AFTER, (False, True), PLACES, ("sdpa", "eager")
    )
]


def _small() -> list[tuple[Any, ...]]:
    """Two of each kind and event: one token and several, padded, on the same layers and on different ones."""
    found = []
    for number, (kind, event) in enumerate(itertools.product(KINDS, EVENTS)):
        attention = ("sdpa", "eager") if number % 2 else ("eager", "sdpa")
        found.append((kind, event, "one", True, ("first", "last")[number % 2], attention[0]))
        found.append((kind, event, "several", number % 3 > 0, "all", attention[1]))
    return found


GRID = WHOLE if os.environ.get("TRAINLESS_ALL") else _small()


def _feed(model: Any, ids: Any, mask: Any, cache: Any, start: int, size: int) -> torch.Tensor:
    every = torch.ones_like(ids) if mask is None else mask
    return model(
        ids[:, start : start + size],
        attention_mask=None if mask is None else mask[:, : start + size],
        position_ids=position_ids(every)[:, start : start + size],
        past_key_values=cache,
    ).logits


@pytest.mark.parametrize(
    ("kind", "event", "sizes", "padded", "place", "attention"),
    GRID,
    ids=["-".join(map(str, g)).replace("True", "padded").replace("False", "plain") for g in GRID],
)
def test_a_patch_that_changes_midway(kind, event, sizes, padded, place, attention):
    # The stock eager attention goes through float32 on its way.
    with float64_math() if attention == "eager" else contextlib.nullcontext():
        _run(kind, event, sizes, padded, place, attention)


def _run(kind: str, event: str, sizes: str, padded: bool, place: str, attention: str) -> None:
    case, (where, layers) = KINDS[kind], PLACES[place]
    calls = [*BEFORE, *AFTER[sizes]]
    ids, mask = models.left_padded(LENGTHS) if padded else (models.left_padded([22, 22])[0], None)
    off = {
        "paused": set(range(2, len(calls))), "resumed": set(range(2, 2 + OFF)),
        "removed": set(range(2, len(calls))), "added": set(), "copied": set(),
    }[event]  # fmt: skip
    model = models.build("llama", attn_implementation=attention)
    rules = [case.idle(off, layers)]
    if event == "added":
        rules.insert(0, LateTemperature(0.7, 2))
    with install(model, rules):
        want = replay(model, None, ids, mask, calls)
    assert rules[-1].margin() > 1e-9
    real = real_rows(mask, calls, ids.shape[0])

    use = {"use": case.method, "with": case.parameters, **({"where": {"layers": where}} if where else {})}
    patch = trainless.patch(model, [use])
    cache, got, at = DynamicCache(), [], 0
    for number, size in enumerate(calls):
        if number == 2 and event == "removed":
            patch.remove()
            stock = not layers >= {0, 1, 2}
            try:
                got.append(_feed(model, ids, mask, cache, at, size))
            except trainless.Unsupported as error:
                assert "start a new cache" in str(error)
                # Layers that hold the same number of tokens in every row fit the model's own mask.
                assert case.method not in ("kvquant", "zipcache"), error
                assert stock or padded or kind == "zipvl-discard", error
                return
            assert not stock or kind in ("kvquant", "zipcache", "zipvl")
        elif number == 2 and event == "added":
            trainless.patch(model, "attn_temperature", temperature=0.7)
            got.append(_feed(model, ids, mask, cache, at, size))
        elif number in off and event in ("paused", "resumed"):
            with patch.paused():
                got.append(_feed(model, ids, mask, cache, at, size))
        else:
            if number == 2 and event == "copied":
                other = copy.deepcopy(cache)
                for step in range(3):  # what becomes of the original does not reach the copy
                    _feed(model, ids.flip(1), mask, cache, at + step, 1)
                cache = other
            got.append(_feed(model, ids, mask, cache, at, size))
        at += size
    same(
        [g[r] for g, r in zip(got, real, strict=True)], [w[r] for w, r in zip(want, real, strict=True)], EXACT
    )
    for index in layers:
        rule, layer = rules[-1], cache.layers[index]
        for row in range(ids.shape[0]):
            for head in range(2):
                assert layer.kept()[row][head] == rule.kept(index, -1, row, head)
