"""Which model is meant, what it is, and how to get it: description, weightless skeleton, loaded model."""

from .describe import Description, describe
from .load import Loaded, load, run_dtype, skeleton
from .sources import DEMOS, Source, locate

__all__ = [
    "DEMOS",
    "Description",
    "Loaded",
    "Source",
    "describe",
    "load",
    "locate",
    "run_dtype",
    "skeleton",
]
