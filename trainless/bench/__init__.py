"""Unpatched against patched, on one model in one run: speed, memory, cache and how far the outputs move."""

from .result import BenchResult, ResultRow
from .run import bench

__all__ = ["BenchResult", "ResultRow", "bench"]
