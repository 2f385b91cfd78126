"""Head gain: multiply the output of chosen attention heads by a number.

What     o_h ← gain · o_h before the output projection. gain = 0 removes a head from the layer's sum.
Source   Head ablation and scaling as used throughout interpretability work, e.g. "On the Role of Attention
         Heads in Large Language Model Safety" (output variant of its ablations).
Seams    gain.
Exact    bitwise the identity at gain = 1.
Costs    one multiplication of the chosen heads' outputs.
Differs  This scales the output. Making a head attend uniformly, by scaling its queries instead, leaves the
         mean of the values and is another operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from ..seams import Contribution, Gain, Site
from ._choice import Heads, check_heads, heads_at, validate_heads
from .base import ANY_MEASUREMENT, Method, option, register


@register
@dataclass(frozen=True)
class HeadGain(Method):
    """Multiply the outputs of ``heads`` by ``gain``.

    Raises InputError for heads that do not exist and for a gain that is not finite.
    """

    name: ClassVar[str] = "head_gain"
    summary: ClassVar[str] = "multiply the output of chosen heads: 0 removes them, 1 leaves them alone"
    source: ClassVar[str] = "On the Role of Attention Heads in Large Language Model Safety (output ablation)"
    identity: ClassVar[dict[str, float]] = {"gain": 1.0}
    calibration_of: ClassVar[str] = ANY_MEASUREMENT
    calibration_sets: ClassVar[tuple[str, ...]] = ("heads",)

    heads: str | list[list[int]] = option("all", help='"all" or a list of [layer, head]')
    gain: float = option(0.0, help="factor on the head's output", origin="published")

    def check(self) -> None:
        check_heads(self.heads)
        if not math.isfinite(self.gain):
            raise InputError(f"gain={self.gain!r}: must be finite; 1.0 changes nothing")

    def validate(self, sites: Sequence[Site]) -> None:
        validate_heads(self.heads, sites)

    def wants_layer(self, site: Site) -> bool:
        return heads_at(self.heads, site) != ()

    def contribute(self, site: Site) -> Sequence[Contribution]:
        heads = heads_at(self.heads, site)
        return [Gain(constant=self.gain, heads=heads, inert=self.gain == 1.0)]


__all__ = ["HeadGain", "Heads"]
