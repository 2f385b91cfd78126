"""Decoding over slots of fixed number: write, attend, score and evict in one step, with everything in place."""

from .api import choose, slot_decode
from .state import EVERYTHING, FixedSlots, SlotRule, SlotStep, fixed_slots

__all__ = ["EVERYTHING", "FixedSlots", "SlotRule", "SlotStep", "choose", "fixed_slots", "slot_decode"]
