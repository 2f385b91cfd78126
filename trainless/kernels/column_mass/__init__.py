"""Probability that each key receives, summed over rows."""

from .api import choose, column_mass
from .chosen import chosen_mass
from .together import RowScale, attention_and_mass, together_reasons

__all__ = ["RowScale", "attention_and_mass", "choose", "chosen_mass", "column_mass", "together_reasons"]
