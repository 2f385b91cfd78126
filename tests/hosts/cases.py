"""What a case of a tiny denoiser says: how to call it, and where the image stands in each of its layers.

All of it is written down from reading the models' forward, and knows nothing of what trainless declares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dense_rule import Place

WORDS = 7  # tokens of a prompt
Size = tuple[int, int]
CASES: dict[str, Callable[[], Case]] = {}
# Classes of which no image tokens are declared: temperatures act on their layers, what asks for tokens is refused.
OTHERS: dict[str, Callable[[], Case]] = {}


@dataclass
class Case:
    """``place(layer's name, latent size)`` -> grid of the image's tokens in that layer, None where there are none.

    first(name, queries, keys, calls so far) -> (first key, first query) of the image; None: that call holds nothing of
    it. self_layers(name): whether a layer is self- or joint attention. trained, other: latent sizes. grids: images of
    that grid. rows: whether clear can pool.
    """

    model: nn.Module
    call: Callable[[int, int], dict[str, Any]]
    place: Callable[[str, Size], Size | None]
    self_layers: Callable[[str], bool]
    trained: Size = (16, 16)
    other: Size = (24, 16)
    first: Callable[[str, int, int, int], Any] = lambda name, lq, lk, calls: (0, 0)
    grids: int = 1
    output: Callable[[Any], Any] = lambda out: out[0]
    tolerance: float = 2e-5
    dense: bool = True  # whether a disc can be laid around each token

    def where(self, size: Size) -> Callable[[str, int, int, int], Place | None]:
        def found(name: str, lq: int, lk: int, calls: int) -> Place | None:
            grid, trained = self.place(name, size), self.place(name, self.trained)
            at = self.first(name, lq, lk, calls)
            if grid is None or trained is None or at is None:
                return None
            return Place(grid, trained[0] * trained[1], *at, grids=self.grids)

        return found

    def run(self, size: Size) -> Tensor:
        out = self.output(self.model(**self.call(*size)))
        while isinstance(out, (tuple, list)):
            out = out[0]
        return out


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def other(make: Callable[[], Case]) -> Callable[[], Case]:
    OTHERS[make.__name__] = make
    return make


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def times(value: float, batch: int = 1) -> Tensor:
    return torch.full((batch,), value)


def ids(rows: int, columns: int, image: float = 0, width: int = 3) -> Tensor:
    found = torch.zeros(rows, columns, width)
    found[..., 0] = image
    found[..., 1], found[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return found.reshape(-1, width)


def lively(model: nn.Module) -> nn.Module:
    """Random weights large enough for attention to matter, in layers that models start at zero as well."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.numel():
            sharp = any(part in name for part in ("to_q", "to_k", "qkv", "query", "key"))
            wide = (1.7 if sharp else 1.1) / parameter[0].numel() ** 0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * wide)
    return model.eval()


def halves(size: Size) -> Size:
    return size[0] // 2, size[1] // 2


def same(size: Size) -> Size:
    return size
