"""Methods, one file each. The registry finds every file in this package and every entry point."""

from .base import (
    ANY_MEASUREMENT,
    BrokenPlugin,
    Method,
    broken,
    get,
    known,
    option,
    parameters_of,
    register,
    unknown,
)

__all__ = [
    "ANY_MEASUREMENT", "BrokenPlugin", "Method", "broken", "get", "known", "option", "parameters_of", "register",
    "unknown",
]  # fmt: skip
