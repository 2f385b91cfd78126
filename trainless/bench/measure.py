"""Measuring two variants of one model side by side: alternating, with medians, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

Variant = Callable[[], AbstractContextManager[Any]]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def alternate(
    variants: Sequence[Variant], run: Callable[[], dict[str, float]], repeats: int
) -> list[list[dict[str, float]]]:
    """``run`` under each variant ``repeats`` times, forwards and backwards in turn, after one run to warm up.

    Returns per variant the measurements of every repeat, so that entries of the same repeat were made close
    together in time, and slow drifts of the machine fall on all variants alike.
    """
    found: list[list[dict[str, float]]] = [[] for _ in variants]
    for variant in variants:
        with variant():
            run()
    for i in range(repeats):
        order = range(len(variants)) if i % 2 == 0 else reversed(range(len(variants)))
        for k in order:
            with variants[k]():
                found[k].append(run())
    return found


class Clock:
    """Seconds since the last reading, with the device's work done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        now = self._now()
        passed, self.last = now - self.last, now
        return passed


def memory_method(device: torch.device) -> str | None:
    """How the peak of one run is measured on ``device``; None when it cannot be."""
    if device.type == "cuda":
        return "highest allocation of torch on the device during the run, above that before it"
    if device.type == "cpu" and sys.platform == "linux" and CLEAR.exists():
        try:
            CLEAR.write_text("5")
        except OSError:
            return None
        return "highest resident set of the process during the run, above that before it (VmHWM, reset first)"
    return None


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which memory rose at most during ``run``; call only where ``memory_method`` names a way."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    CLEAR.write_text("5")  # the kernel starts the high-water mark anew from what is resident now
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _trim() -> None:
    """Give freed memory back, so that a run cannot hide its peak in what an earlier one left behind."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another allocator; the numbers are then upper bounds of what was free


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
