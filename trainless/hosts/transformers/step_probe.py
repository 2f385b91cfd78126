"""Sequences for decoders that make their caches settle: a prompt, single tokens, a further turn, single tokens again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from ...seams import Quantise, tokens_of
from ..probes import SEED, Decoding, Draw
from .image_probe import prompt_with_images
from .version import CACHE_NAME, cache_out

FIRST, AGAIN = 3, 4  # single tokens behind the prompt, and behind the turn
TURN = 3  # tokens of the turn, unless a group is to be filled
GAP = 3  # steps behind the turn after which a group is full
LONGEST = 256  # tokens of a turn that fills one


def sequences(model: PreTrainedModel, pool: Tensor, rule: Any, tokens: int, limit: int) -> list[Decoding]:
    """One row; a batch whose shorter row is padded on the left, and once between two steps.

    pool: ids that text may have. tokens: how long the prompt should be. limit: positions that the model has.
    """
    turn = turn_of(rule, tokens)
    length = max(2, min(tokens, limit - turn - FIRST - AGAIN))
    calls = [length, *[1] * FIRST, turn_of(rule, length), *[1] * AGAIN]
    total = sum(calls)
    draw = Draw(model, SEED + 3)
    single = _decoding(model, draw.choice(pool, 1, total), None, calls, {}, f"{length} tokens")
    takes = inspect.signature(type(model).forward).parameters
    if "attention_mask" not in takes:
        return [single]
    short = max(1, length // 3)
    mask = torch.ones(2, total, dtype=torch.long, device=draw.device)
    mask[1, : length - short] = 0
    mask[1, -2] = 0  # and a step that only the first row takes
    said = f"2 rows, {short} and {length} long, padded on the left"
    return [single, _decoding(model, draw.choice(pool, 2, total), mask, calls, {}, said)]


def images(model: PreTrainedModel, pool: Tensor) -> list[Decoding]:
    """A prompt with images, then single tokens; none where its images cannot be made."""
    prompt = prompt_with_images(model, pool)
    if prompt is None:
        return []
    more = prompt.draw.choice(pool, 1, FIRST)
    calls = [prompt.ids.shape[1], *[1] * FIRST]
    return [_decoding(model, torch.cat([prompt.ids, more], 1), None, calls, prompt.prefill, prompt.said)]


def turn_of(rule: Any, length: int) -> int:
    """Tokens of the turn behind a prompt of ``length`` tokens, so that a group is full GAP steps after it."""
    if not isinstance(rule, Quantise):
        return TURN
    if rule.group:
        size = rule.group
        found = (tokens_of(rule.residual, length) - length - FIRST - GAP) % size
        found += 0 if found >= 2 else size
    else:
        found = rule.interval - FIRST - GAP
    return found if 2 <= found <= LONGEST else TURN


def _decoding(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, calls: Sequence[int], prefill: Mapping[str, Any],
    said: str,
) -> Decoding:  # fmt: skip
    numbered = "position_ids" in inspect.signature(type(model).forward).parameters

    def run(cache: Any) -> list[Any]:
        outputs: list[Any] = []
        stops = list(accumulate(calls))
        for start, stop in zip([0, *stops], stops, strict=False):
            given: dict[str, Any] = {"input_ids": ids[:, start:stop], CACHE_NAME: cache, "use_cache": True}
            if mask is not None:
                given["attention_mask"] = mask[:, :stop]
                if numbered:
                    given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
            outputs.append(model(**given, **(prefill if start == 0 else {})))
            cache = cache_out(outputs[-1])
        return outputs

    def static() -> StaticCache:
        return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=sum(calls))

    more = sum(n == 1 for n in calls)
    return Decoding(f"{said}, then {more} single tokens", run, static, mask is not None)
