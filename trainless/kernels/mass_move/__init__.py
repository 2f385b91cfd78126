"""Move probability between groups of keys, on top of a finished attention output."""

from .api import choose, mass_move

__all__ = ["choose", "mass_move"]
