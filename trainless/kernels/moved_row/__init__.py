"""One row of attention in which some keys keep a part of their probability and the rest goes to the others."""

from .api import MovedRow, choose, moved_row

__all__ = ["MovedRow", "choose", "moved_row"]
