"""Prompts in, results out: reading, running, resuming, sharing out among processes."""

from .request import OptionError, Request, generate

__all__ = ["OptionError", "Request", "generate"]
