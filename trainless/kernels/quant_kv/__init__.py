"""Keys and values packed to 2, 4 or 8 bits, and attention on them as they lie."""

from .api import blocks, choose, dequantise, merge, packed_attention, packed_rows, weigh
from .fixed import FixedPacked, fill, fixed_packed
from .fixed_api import choose_fixed, pack_group, packed_decode
from .format import RAW, Segment, channel_root, pack, per_byte, quantise, raw, unpack
from .tiers import FixedTiers, tiers_decode

__all__ = [
    "RAW",
    "FixedPacked",
    "FixedTiers",
    "Segment",
    "blocks",
    "channel_root",
    "choose",
    "choose_fixed",
    "dequantise",
    "fill",
    "fixed_packed",
    "merge",
    "pack",
    "pack_group",
    "packed_attention",
    "packed_decode",
    "packed_rows",
    "per_byte",
    "quantise",
    "raw",
    "tiers_decode",
    "unpack",
    "weigh",
]
