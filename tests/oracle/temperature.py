"""Temperature: the whole logit is divided by T."""

from __future__ import annotations

from collections.abc import Collection

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
