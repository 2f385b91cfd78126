"""Decoding over slots whose number differs from one head to the next: each head has a piece of flat storage."""

from .api import choose, ragged_decode
from .state import PAGE, RaggedSlots, ragged_slots

__all__ = ["PAGE", "RaggedSlots", "choose", "ragged_decode", "ragged_slots"]
