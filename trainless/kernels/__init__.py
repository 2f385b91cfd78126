"""Kernels: attention with log-sum-exp, mass of keys and of groups of them, moving probability between keys.

One folder per operation: ``reference.py`` fixes the meaning in dense torch, ``blocked.py`` serves any
device with memory linear in the number of tokens, ``triton.py`` serves CUDA, ``api.py`` checks the
arguments and chooses. Importing this package does not import Triton.
"""

from __future__ import annotations

from .column_mass import column_mass
from .dispatch import Choice, available
from .group_mass import group_mass
from .lse import attention, row_attention
from .mass_move import mass_move
from .visibility import Visibility, visibility

__all__ = [
    "Choice",
    "Visibility",
    "attention",
    "available",
    "column_mass",
    "group_mass",
    "mass_move",
    "row_attention",
    "visibility",
]
