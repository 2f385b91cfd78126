"""Kernels: attention and its log-sum-exp, column mass, moving probability, linear attention, windows on a grid.

One folder per operation: ``reference.py`` fixes the meaning in dense torch, ``blocked.py`` serves any
device with memory linear in the number of tokens, ``triton.py`` serves CUDA, ``api.py`` checks the
arguments and chooses. Importing this package does not import Triton.
"""

from __future__ import annotations

from .column_mass import column_mass
from .dispatch import Choice, available
from .linear import linear_attention
from .lse import attention, row_attention
from .mass_move import mass_move
from .visibility import Visibility, visibility
from .window2d import Window2d, window2d

__all__ = [
    "Choice",
    "Visibility",
    "Window2d",
    "attention",
    "available",
    "column_mass",
    "linear_attention",
    "mass_move",
    "row_attention",
    "visibility",
    "window2d",
]
