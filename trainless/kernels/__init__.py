"""Kernels: attention with log-sum-exp, column mass, moving probability, sparse attention, packed keys and values.

One folder per operation: ``reference.py`` fixes the meaning in dense torch, ``blocked.py`` serves any
device with memory linear in the number of tokens, ``triton.py`` serves CUDA, ``api.py`` checks the
arguments and chooses. Importing this package does not import Triton.
"""

from __future__ import annotations

from .block_sparse import block_sparse
from .column_mass import chosen_mass, column_mass
from .dispatch import Choice, available
from .lse import attention, row_attention
from .mass_move import mass_move
from .quant_kv import packed_attention, packed_rows
from .visibility import Visibility, visibility

__all__ = [
    "Choice",
    "Visibility",
    "attention",
    "available",
    "block_sparse",
    "chosen_mass",
    "column_mass",
    "mass_move",
    "packed_attention",
    "packed_rows",
    "row_attention",
    "visibility",
]
