"""Kernels: attention with log-sum-exp, mass of keys and groups, moving it, entropies, windows, sparse and linear forms.

One folder per operation: ``reference.py`` fixes the meaning in dense torch, ``blocked.py`` serves any
device with memory linear in the number of tokens, ``triton.py`` serves CUDA, ``api.py`` checks the
arguments and chooses. Importing this package does not import Triton.
"""

from __future__ import annotations

from .block_sparse import Blocks, Spans, block_sparse
from .column_mass import chosen_mass, column_mass
from .dispatch import Choice, available
from .group_mass import group_mass
from .linear import linear_attention
from .lse import attention, row_attention
from .mass_move import mass_move
from .quant_kv import packed_attention, packed_rows
from .spread import spread
from .visibility import Visibility, visibility
from .window2d import Window2d, window2d

__all__ = [
    "Blocks",
    "Choice",
    "Spans",
    "Visibility",
    "Window2d",
    "attention",
    "available",
    "block_sparse",
    "chosen_mass",
    "column_mass",
    "group_mass",
    "linear_attention",
    "mass_move",
    "packed_attention",
    "packed_rows",
    "row_attention",
    "spread",
    "visibility",
    "window2d",
]
