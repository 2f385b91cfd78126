"""Temperature: the whole logit is divided by T."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from .core import Call, Rule


class AttnTemperature(Rule):
    """A = softmax(z / T), where z is the whole logit: scaled product, soft-capped, plus position bias.

    Published code divides after bias and mask were added, so the bias is divided too; with a soft cap
    the capped value is divided, not the argument of the cap. A learned sink is a logit of its rows.
    Self-attention of every selected layer; cross-attention is left alone. Masks are boolean, so
    dividing cannot disturb them.
    """

    def __init__(
        self, temperature: float, layers: Collection[int] | None = None, part: str | None = None
    ) -> None:
        super().__init__(layers, part)
        self.temperature = temperature

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        return logits / self.temperature

    def learned(self, call: Call, sinks: Tensor) -> Tensor:
        return sinks / self.temperature


class Scheduled(Rule):
    """Row i's logits times a factor of n_i, the keys that the model's mask shows to it, whatever a cache has dropped.

    logn: ln n over ln of the trained length, where that is above 1. llama4: 1 + ln(n // trained + 1) / 10.
    yarn: (ln(length / trained) / 10 + 1)², the same in all rows. ssa: 1 + exp(-exp(beta))·ln n.
    """

    def __init__(
        self, schedule: str, trained: int = 8192, length: int = 0, beta: float = 2.0, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.schedule, self.trained, self.length, self.beta = schedule, trained, length, beta
        self.temperature = temperature

    def factor(self, n: int) -> float:
        if self.schedule == "yarn":
            return (math.log(self.length / self.trained) / 10 + 1) ** 2
        if n == 0:
            return 1.0
        if self.schedule == "logn":
            return math.log(n) / math.log(self.trained) if n > self.trained else 1.0
        if self.schedule == "llama4":
            return 1 + math.log(n // self.trained + 1) / 10
        return 1 + math.exp(-math.exp(self.beta)) * math.log(n)

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        count = call.visible.sum(-1, keepdim=True)
        factors = torch.tensor([self.factor(n) for n in count.flatten().tolist()], dtype=logits.dtype)
        return logits * factors.view(count.shape) / self.temperature
