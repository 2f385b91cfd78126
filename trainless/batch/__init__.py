"""Prompts in, results out: reading, running, resuming, sharing out among processes."""

from .plan import OptionError, Request
from .request import generate

__all__ = ["OptionError", "Request", "generate"]
