"""Attention temperature: divide every attention logit by a number before the softmax.

What     softmax(z / T). T < 1 sharpens rows (TempScale, against length collapse of text embeddings);
         T > 1 flattens them (smoothed attention, against a patch that captures a vision transformer).
Source   "Length-Induced Embedding Collapse in PLM-based Models" (TempScale, eq. of section 4);
         "Are Vision Transformers Robust to Patch Perturbations?" (smoothed attention).
Seams    scale.
Exact    bitwise the identity at T = 1.
Costs    nothing: the factor goes into the scaling that attention applies anyway.
Differs  The whole logit is divided: relative position bias and the soft-capped value as well. In a family
         without a documented temperature the method still works; it never passes a model over in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from ..seams import Contribution, Scale, Site
from .base import Method, option, register


@register
@dataclass(frozen=True)
class AttnTemperature(Method):
    """Divide the attention logits of every self-attention layer by ``temperature``.

    Raises InputError unless the temperature is a finite positive number.
    """

    name: ClassVar[str] = "attn_temperature"
    aliases: ClassVar[tuple[str, ...]] = ("tempscale", "vit_smoothing")
    summary: ClassVar[str] = "divide attention logits by a temperature: below 1 sharper, above 1 smoother"
    source: ClassVar[str] = "Length-Induced Embedding Collapse in PLM-based Models (TempScale)"
    roles: ClassVar[frozenset[str]] = frozenset({"self", "joint"})
    hosts: ClassVar[frozenset[str]] = frozenset({"transformers", "diffusers"})
    identity: ClassVar[dict[str, float]] = {"temperature": 1.0}

    temperature: float = option(
        1.0, help="what the logits are divided by; tune it on a development set", origin="published"
    )

    def check(self) -> None:
        if not (self.temperature > 0 and 0 < 1.0 / self.temperature < math.inf):
            raise InputError(
                f"temperature={self.temperature!r}: must be a positive number; 1.0 changes nothing"
            )

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Scale(constant=1.0 / self.temperature, inert=self.temperature == 1.0)]
