"""Head gain: a factor on some heads' outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .core import Call, Rule, Site


class HeadGain(Rule):
    """o_h becomes gain · o_h for every listed ``[layer, query head]``, before the output projection."""

    def __init__(self, heads: Sequence[Sequence[int]], gain: float = 0.0, part: str | None = None) -> None:
        super().__init__(part=part)
        self.heads = [tuple(pair) for pair in heads]
        self.gain = gain

    def applies(self, site: Site) -> bool:
        return super().applies(site) and any(layer == site.layer for layer, _ in self.heads)

    def output(self, call: Call, out: Tensor) -> Tensor:
        out = out.clone()
        for layer, head in self.heads:
            if layer == call.site.layer:
                out[:, head] = self.gain * out[:, head]
        return out
