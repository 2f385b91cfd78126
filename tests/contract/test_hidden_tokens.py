"""A mask that hides what earlier steps have shown: refused by name on every kind of settled cache, compiled or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import models
from transformers import DynamicCache, StaticCache

import trainless
from trainless.hosts.transformers.version import CACHE_NAME

from .tools import build

PROMPT, WIDTH = 14, 32
PACK = {"use": "kvquant", "with": {"group": 4, "residual": 4}}
RULES: dict[str, list[dict[str, Any]]] = {
    "slots": [{"use": "streaming", "with": {"sinks": 2, "recent": 5}}],
    "packed": [PACK],
    "tiers": [{"use": "zipcache", "with": {"interval": 4, "probes": (2, 2)}}],
    "both": [{"use": "streaming", "with": {"sinks": 2, "recent": 6}}, PACK],
}


def _mask(kind: str, static: bool, tokens: int, hidden: list[int]) -> torch.Tensor:
    seen = torch.arange(WIDTH if kind == "4d" and static else tokens) < tokens
    seen[hidden] = False
    if kind == "2d":
        return seen[None].long()
    return torch.zeros(1, 1, 1, len(seen)).masked_fill(~seen, torch.finfo(torch.float32).min)


def _steps(model: Any, step: Any, kind: str, static: bool, hidden: list[int]) -> None:
    ids = models.prompt(PROMPT + 4)
    fixed = StaticCache(config=model.config, max_cache_len=WIDTH)
    given = {CACHE_NAME: fixed if static else DynamicCache(config=model.config)}
    model(ids[:, :PROMPT], **given)
    for at in range(PROMPT, PROMPT + 4):
        mask = _mask(kind, static, at + 1, hidden if at == PROMPT + 3 else [])
        step(ids[:, at : at + 1], attention_mask=mask, position_ids=torch.tensor([[at]]), **given)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("kind", "static", "compiled"),
    [("2d", False, False), ("2d", True, True), ("4d", True, False), ("4d", True, True)],
    ids=["2d", "2d-static-compiled", "4d-static", "4d-static-compiled"],
)
@torch.no_grad()
def test_hidden_tokens_are_refused(rule: str, kind: str, static: bool, compiled: bool):
    model = build("llama", layers=1, dtype=torch.float32)
    torch.compiler.reset()
    step = torch.compile(model, backend="eager") if compiled else model
    with trainless.patched(model, RULES[rule]):
        _steps(model, step, kind, static, [])
        # What a compiler has made refuses on the device, where errors are torch's own.
        error = RuntimeError if compiled else trainless.Unsupported
        with pytest.raises(error, match="hides earlier tokens which were no padding"):
            _steps(model, step, kind, static, [11, 12])
    torch.compiler.reset()
