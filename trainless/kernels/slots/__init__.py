"""Decoding over slots of fixed number: write, attend, score and evict in one step, with everything in place."""

from .api import choose, slot_decode
from .state import ADDED, EVERYTHING, FixedSlots, SlotRule, SlotStep, fixed_slots

__all__ = [
    "ADDED",
    "EVERYTHING",
    "FixedSlots",
    "SlotRule",
    "SlotStep",
    "choose",
    "fixed_slots",
    "slot_decode",
]
