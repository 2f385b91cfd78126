"""Methods, one file each. The registry finds every file in this package and every entry point."""

from .base import ANY_MEASUREMENT, Method, get, known, option, parameters_of, register

__all__ = ["ANY_MEASUREMENT", "Method", "get", "known", "option", "parameters_of", "register"]
