"""Methods, one file each. The registry finds every file in this package and every entry point."""

from .base import Method, get, known, option, parameters_of, register

__all__ = ["Method", "get", "known", "option", "parameters_of", "register"]
