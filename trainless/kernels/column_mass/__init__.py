"""Probability that each key receives, summed over rows."""

from .api import choose, column_mass

__all__ = ["choose", "column_mass"]
