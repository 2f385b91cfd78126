"""Largest entries and entropies of the rows and columns of an attention that is never stored."""

from .api import NAMES, Parts, spread, spread_of
from .blocked import Spread

__all__ = ["NAMES", "Parts", "Spread", "spread", "spread_of"]
