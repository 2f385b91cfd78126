"""Rows of one batch that each go their own way: own sampling, own generator, own end.

Both classes are plugged into ``generate`` through its public lists of logits processors and stopping
criteria. A sampled row draws its noise from its own generator: the largest of (log-probability +
Gumbel noise) is a sample of the distribution, so greedy search over the noisy scores samples, and what
a row draws does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .params import samples


class RowChoice(LogitsProcessor):
    """Score rows by their own parameters: penalty, temperature, top-k, top-p, min-p, then noise.

    ``skip``: leading tokens of each row that are padding, which a penalty must not see.
    """

    def __init__(
        self,
        params: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        skip: Sequence[int],
        device: torch.device,
    ):
        self.skip = skip
        self.chains = [_chain(row) for row in params]
        self.generators = [
            torch.Generator(device).manual_seed(seed) if samples(row) else None
            for row, seed in zip(params, seeds, strict=True)
        ]

    @property
    def needed(self) -> bool:
        return any(self.chains) or any(self.generators)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, L), (B, V) -> (B, V)
        scores = scores.float()
        rows = []
        for i, (chain, generator) in enumerate(zip(self.chains, self.generators, strict=True)):
            row = scores[i : i + 1]
            for step in chain:
                row = step(input_ids[i : i + 1, self.skip[i] :], row)
            if generator is not None:
                noise = torch.empty_like(row).exponential_(generator=generator)
                row = row - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
            rows.append(row)
        return torch.cat(rows)


def _chain(params: Mapping[str, Any]) -> list[Any]:
    steps: list[Any] = []
    if params.get("repetition_penalty", 1) != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(params["repetition_penalty"])))
    if not samples(params):
        return steps
    if params.get("temperature", 1) != 1:
        steps.append(TemperatureLogitsWarper(float(params["temperature"])))
    if "top_k" in params:
        steps.append(TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1) < 1:
        steps.append(TopPLogitsWarper(float(params["top_p"])))
    if params.get("min_p", 0) > 0:
        steps.append(MinPLogitsWarper(float(params["min_p"])))
    return steps


class RowEnd(StoppingCriteria):
    """Ends each row at its end token, its own number of new tokens or one of its stop strings.

    ``lengths`` says afterwards how many tokens each row generated, its end token included.
    """

    def __init__(
        self,
        start: int,
        limits: Sequence[int],
        ends: Sequence[int],
        stops: Sequence[Sequence[str]],
        tokenizer: Any,
    ):
        self.start, self.stops, self.tokenizer = start, stops, tokenizer
        self.limits = torch.tensor(limits)
        self.ends = torch.tensor(sorted(ends), dtype=torch.long)
        self.lengths = torch.zeros(len(limits), dtype=torch.long)
        # A stop string of n characters lies within the last n tokens, and some more that a byte-level
        # tokenizer may need to complete a character.
        self.window = [max((len(s.encode()) for s in stop), default=0) + 8 for stop in stops]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        count = input_ids.shape[1] - self.start
        last = input_ids[:, -1].cpu()
        done = torch.isin(last, self.ends) | (self.limits <= count)
        for i, stop in enumerate(self.stops):
            if stop and self.lengths[i] == 0 and not done[i]:
                text = self.tokenizer.decode(
                    input_ids[i, self.start :][-self.window[i] :], skip_special_tokens=True
                )
                done[i] = any(s in text for s in stop)
        self.lengths[done & (self.lengths == 0)] = count
        return (self.lengths > 0).to(input_ids.device)


def cut(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first stop string in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
