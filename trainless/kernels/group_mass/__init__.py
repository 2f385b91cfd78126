"""Probability of whole groups of keys, row by row."""

from .api import choose, group_mass

__all__ = ["choose", "group_mass"]
