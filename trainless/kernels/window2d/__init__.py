"""Attention in a window on a grid of image tokens, with text beside it."""

from .api import choose, window2d
from .window import Window2d

__all__ = ["Window2d", "choose", "window2d"]
