"""Keys and values packed to 2, 4 or 8 bits, and attention on them as they lie."""

from .api import blocks, choose, dequantise, merge, packed_attention, packed_rows, weigh
from .format import RAW, Segment, channel_root, pack, per_byte, quantise, raw, unpack

__all__ = [
    "RAW",
    "Segment",
    "blocks",
    "channel_root",
    "choose",
    "dequantise",
    "merge",
    "pack",
    "packed_attention",
    "packed_rows",
    "per_byte",
    "quantise",
    "raw",
    "unpack",
    "weigh",
]
