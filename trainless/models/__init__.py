"""Which model is meant, what it is, and how to get it: description, weightless skeleton, loaded model."""

from .describe import Description, describe
from .load import DTYPES, Loaded, device_named, dtype_named, load, run_dtype, skeleton
from .sources import DEMOS, ModelSource, locate

__all__ = [
    "DEMOS",
    "DTYPES",
    "Description",
    "Loaded",
    "ModelSource",
    "describe",
    "device_named",
    "dtype_named",
    "load",
    "locate",
    "run_dtype",
    "skeleton",
]
