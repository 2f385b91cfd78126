"""Attention output together with the log-sum-exp of each row."""

from .api import attention, choose, row_attention, row_probabilities, widened_product

__all__ = ["attention", "choose", "row_attention", "row_probabilities", "widened_product"]
