"""Linear attention: feature maps instead of the softmax, memory and time linear in the number of tokens."""

from .api import choose, linear_attention

__all__ = ["choose", "linear_attention"]
