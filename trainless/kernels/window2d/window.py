"""The description of a window on a grid of image tokens, and what follows from it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError

SHAPES = ("disc", "square")


@dataclass(frozen=True)
class Window2d:
    """Which token sees which: image tokens near their own place on a grid, text tokens everything.

    The image's tokens stand row by row, text before or behind them. An image token sees the image tokens
    within ``radius`` of its place, cut off at the borders, and all text; a text token sees every token.
    shape "disc": dy² + dx² < radius²; "square": |dy| < radius and |dx| < radius. dilation n: only tokens
    whose rows and columns differ by multiples of n, with distances counted in these steps.

    Raises InputError for a grid, radius, dilation or shape that makes no sense.
    """

    grid: tuple[int, int]  # rows, columns
    radius: float
    shape: str = "disc"
    dilation: int = 1
    text: int = 0
    text_first: bool = True

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or self.text < 0:
            raise InputError(f"window: there is no grid of {self.grid} with {self.text} text tokens")
        if not self.radius > 0 or self.dilation < 1 or self.shape not in SHAPES:
            raise InputError(
                f"window: radius={self.radius!r}, dilation={self.dilation!r}, shape={self.shape!r}; a positive "
                f"radius, a dilation of 1 or more and one of {', '.join(SHAPES)} are needed"
            )

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.text + self.grid[0] * self.grid[1]

    @property
    def image(self) -> tuple[int, int]:
        """(first, stop) of the image's tokens in the sequence."""
        first = self.text if self.text_first else 0
        return first, first + self.grid[0] * self.grid[1]

    @property
    def reach(self) -> int:
        """The largest number of steps along one axis that is still seen; no more than the grid has."""
        side = -(-max(self.grid) // self.dilation)
        return side - 1 if self.radius > side else math.ceil(self.radius) - 1

    @property
    def most(self) -> int:
        """The largest measure that is seen: dy² + dx² in a disc, the larger of |dy| and |dx| in a square."""
        if self.shape == "square":
            return self.reach
        limit = self.grid[0] ** 2 + self.grid[1] ** 2
        return limit if self.radius**2 > limit else math.ceil(self.radius**2) - 1

    @property
    def everything(self) -> bool:
        """True when each token sees all the others, as it does with a radius above the grid's diagonal."""
        y, x = self.grid[0] - 1, self.grid[1] - 1
        if self.dilation > 1 and max(y, x) > 0:
            return False
        return (max(y, x) if self.shape == "square" else y * y + x * x) <= self.most

    def near(self, dy: Tensor, dx: Tensor) -> Tensor:
        """bool: whether a token so many steps away is seen; ``dy`` and ``dx`` are integers and broadcast."""
        if self.shape == "square":
            return (dy.abs() <= self.most) & (dx.abs() <= self.most)
        return dy * dy + dx * dx <= self.most

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """The same as a predicate over places in the sequence, as ``seams.Pairs`` has it."""
        first, stop = self.image
        columns, n = self.grid[1], self.dilation
        dy = (q - first).div(columns, rounding_mode="floor") - (k - first).div(columns, rounding_mode="floor")
        dx = (q - first).remainder(columns) - (k - first).remainder(columns)
        seen = self.near(dy.div(n, rounding_mode="trunc"), dx.div(n, rounding_mode="trunc"))
        if n > 1:
            seen = seen & (dy % n == 0) & (dx % n == 0)
        for token in (q, k):
            seen = seen | (token < first) | (token >= stop)
        return seen

    def counts(self, device: torch.device | None = None) -> Tensor:
        """(tokens,) int64: how many tokens each one sees."""
        (rows, columns), n = self.grid, self.dilation
        x = torch.arange(columns, device=device)
        left = x.div(n, rounding_mode="floor")
        right = (columns - 1 - x).div(n, rounding_mode="floor")
        seen = torch.zeros(rows, columns, dtype=torch.long, device=device)
        for dy in range(-self.reach, self.reach + 1):
            # In a row dy steps away the tokens that are seen are one run, cut off at both ends.
            wide = self.most if self.shape == "square" else math.isqrt(max(0, self.most - dy * dy))
            if self.shape == "square" or dy * dy <= self.most:
                y0, y1 = max(0, -dy * n), min(rows, rows - dy * n)
                seen[y0 : max(y0, y1)] += left.clamp(max=wide) + right.clamp(max=wide) + 1
        whole = torch.full((self.tokens,), self.tokens, dtype=torch.long, device=device)
        first, stop = self.image
        whole[first:stop] = seen.flatten() + self.text
        return whole
