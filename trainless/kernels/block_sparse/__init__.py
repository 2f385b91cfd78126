"""Attention over part of the pairs: a subset of the tokens, listed blocks, or a span per head."""

from .api import block_sparse, choose
from .patterns import Blocks, Pattern, Spans, Subset

__all__ = ["Blocks", "Pattern", "Spans", "Subset", "block_sparse", "choose"]
