"""The rule by which sink dimensions are found, and what is counted for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..patchers import option


@dataclass(frozen=True)
class SinkOptions:
    """The rule. A dimension counts at a layer by magnitude or by energy."""

    magnitude: float = option(100.0, help="massive: larger than this", origin="published", low=0.0)
    ratio: float = option(
        1000.0, help="massive: and this many times the layer's median", origin="published", low=0.0
    )
    energy: float = option(0.05, help="or: this share of the first token's energy", low=0.0, high=1.0)
    layer_share: float = option(0.5, help="counts in this share of layers 2 to N-2", low=0.0, high=1.0)
    prompt_share: float = option(0.9, help="does so on this share of texts", low=0.0, high=1.0)
    most: int = option(4, help="dimensions kept at most, the largest energies first", low=1)
    limit: int | None = option(None, help="at most this many texts, spread over the data", low=1)


def sinkness(x: Tensor, dims: Sequence[int]) -> Tensor:
    """(L,) how large rows of x (L, D) are in ``dims``, in units of their root mean square; at most sqrt(D)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x[:, list(dims)].abs().amax(-1) / x.square().mean(-1).add(1e-6).sqrt()


def threshold_of(width: int) -> float:
    """The published threshold, 20 at width 4096, at another width: the same share of a token's energy."""
    return 20 * (width / 4096) ** 0.5


class SinksSeen:
    """Counts over texts and layers; memory is layers x dimensions, whatever is read."""

    def __init__(self, options: SinkOptions, inner: Sequence[int]):
        self.options, self.inner = options, list(inner)
        self.width, self.texts, self.least = 0, 0, options.energy
        self.now: dict[int, Tensor] = {}  # by layer: which dimensions count on the present text
        self.share: dict[int, Tensor] = {}  # by layer: share of energy, summed over texts
        self.size: dict[int, Tensor] = {}  # by layer: |x|, summed over texts
        self.usual: dict[
            int, Tensor
        ] = {}  # by layer: mean share of energy at later tokens, summed over texts
        self.layers = self.held = torch.zeros(0)

    def look(self, layer: int, x: Tensor) -> None:
        """x (1, L, D): the input of a layer."""
        exact = torch.promote_types(x.dtype, torch.float32)
        first, median = x[0, 0].to(exact).abs(), x.abs().median().to(exact)
        if not bool(torch.isfinite(first).all()):
            raise InputError(f"layer {layer}: the model gives values that are not finite; try dtype float32")
        share = first.square() / first.square().sum().clamp_min(torch.finfo(exact).tiny)
        massive = (first > self.options.magnitude) & (first >= self.options.ratio * median)
        self.width = width = first.numel()
        # The largest of n random numbers holds some 2 ln(n) / n of their energy: in a narrow model, a lot.
        self.least = max(self.options.energy, 4 * math.log(width) / width)
        self.now[layer] = (massive | (share >= self.least)).cpu()
        for total, value in ((self.share, share), (self.size, first)):
            total[layer] = total.get(layer, 0) + value.double().cpu()

    def next(self) -> None:
        """The present text has been read."""
        layers = torch.stack([self.now[layer] for layer in self.inner]).double().mean(0)
        if self.texts == 0:
            self.layers, self.held = torch.zeros_like(layers), torch.zeros_like(layers)
        self.layers += layers
        self.held += layers >= self.options.layer_share
        self.texts += 1
        self.now.clear()

    def _mean(self, sums: dict[int, Tensor]) -> Tensor:
        return torch.stack([sums[layer] for layer in self.inner]).mean(0) / self.texts

    def kept(self) -> list[int]:
        """The dimensions that hold on enough texts, the largest shares of energy first."""
        share = self._mean(self.share)
        # Where no layer has to count, nothing would be left out.
        held = (self.held / self.texts >= self.options.prompt_share) & (self.layers > 0)
        return sorted(held.nonzero().flatten().tolist(), key=lambda d: -float(share[d]))[: self.options.most]

    def facts(self, dims: Sequence[int]) -> dict[str, list[float]]:
        """Of each dimension: mean share of energy and mean |x| at the first token, share of layers, of texts."""
        values = {
            "energy_shares": self._mean(self.share), "magnitudes": self._mean(self.size),
            "layer_shares": self.layers / self.texts, "text_shares": self.held / self.texts,
        }  # fmt: skip
        return {name: [float(value[d]) for d in dims] for name, value in values.items()}

    def profile(self, dims: Sequence[int]) -> Tensor:
        """(layers, dims) float32: mean share of energy at the first token, at each layer's input."""
        rows = [self.share[layer][list(dims)] / self.texts for layer in sorted(self.share)]
        return torch.stack(rows).float()

    def nothing(self) -> str:
        best = int(self._mean(self.share).argmax())
        share, size, layers, texts = (value[0] for value in self.facts([best]).values())
        o = self.options
        return (
            f"no sink dimension among {self.width}: the strongest, {best}, holds {share:.1%} of the first token's "
            f"energy with |x| about {size:,.3g}, and counts in {layers:.0%} of layers {self.inner[0]} to "
            f"{self.inner[-1]}, enough of them on {texts:.0%} of {self.texts} texts; needed are {self.least:.0%} of "
            f"the energy, or |x| above {o.magnitude:g} and {o.ratio:g} times the median, in {o.layer_share:.0%} of "
            f"layers on {o.prompt_share:.0%} of texts. This model has no sinks that its residual stream tells"
        )
