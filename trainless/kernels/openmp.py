"""Loops that Numba compiles, on the threads that torch already has.

A second pool of threads would not do: torch's OpenMP threads wait for their next task by spinning, and take the
processors from every other pool meanwhile (measured: two threads of a pool of ours were no faster than one). So a loop
is handed to the OpenMP library that torch has loaded, as torch's own operators are.

Numba keeps machine code by the file that a loop stands in. After a change here, delete ``__pycache__`` beside it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# A product and a sum may round once instead of twice. NaN and infinity keep their meaning.
FUSED = {"contract", "nsz"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The GNU OpenMP library that torch has loaded, or None: another system's, or one that cannot be told apart."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count(" ") >= 5 and "gomp" in line}
    found = {path for path in paths if "gomp" in path.name}
    # Other packages bring copies of their own. Torch's lies in its folder or, in some builds, is the only one.
    home = Path(torch.__file__).resolve().parent
    own = {path for path in found if path.is_relative_to(home)} or found
    return ctypes.CDLL(str(own.pop())) if len(own) == 1 else None


def switched_off() -> bool:
    return bool(getattr(numba.config, "DISABLE_JIT", 0))


def compile_loop(function: Callable[..., Any]) -> Any:
    """Sums are added up in the order that is written."""
    return _kept(lambda cache: numba.njit(nogil=True, fastmath=FUSED, cache=cache)(function))


def compile_sum(function: Callable[..., Any]) -> Any:
    """Sums may be reordered, without which those over neighbours in memory could not run side by side in a register.

    The loop of such a sum must store nothing: where it does, the compiler makes a second version for arrays that
    might overlap, it is decided by addresses which one runs, and the two round differently.
    """
    return _kept(lambda cache: numba.njit(nogil=True, fastmath=FUSED | {"reassoc"}, cache=cache)(function))


def inlined(function: Callable[..., Any]) -> Any:
    """A piece of a loop, in a function of its own for readers only."""
    return numba.njit(inline="always")(function)


def compile_body(function: Callable[..., None]) -> Any:
    """A thread's part of a loop: ``function(data)``, data a pointer to int64."""
    signature = types.void(types.CPointer(types.int64))
    return _kept(lambda cache: numba.cfunc(signature, cache=cache)(function))


def _kept(compiled: Callable[[bool], Any]) -> Any:
    try:
        return compiled(True)
    except RuntimeError:  # no folder that the machine code could be kept in
        return compiled(False)


@intrinsic
def pointer(context, address):  # type: ignore[no-untyped-def]
    """Inside a body: an address as what ``numba.carray`` takes."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


@intrinsic
def take(context, data):  # type: ignore[no-untyped-def]
    """Inside a body: the next number from 0 on that no other thread has taken.

    Threads are not numbered: who asks OpenMP for a number may be answered by another library than the one that
    started the thread, and there may be fewer threads than were asked for.
    """

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), code


@intrinsic
def arrive(context, data):  # type: ignore[no-untyped-def]
    """Inside a body: one more of something is done; how many were before, in the second number of the data.

    Whoever finds that all others were sees what they have written.
    """

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place = builder.gep(arguments[0], [ir.Constant(ir.IntType(64), 1)])
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(types.CPointer(types.int64)), code


def run(body: Any, data: Sequence[int], threads: int) -> Any:
    """Run a body on up to ``threads`` threads; addresses among the data must stay good until it returns.

    The body is given an array of int64: a counter for ``take``, then the data. Returns it as the body left it.
    """
    packed = (ctypes.c_int64 * (len(data) + 1))(0, *data)
    # The body by itself too, where one thread is enough: other machine code might round in another order.
    if threads == 1:
        _alone(body)(packed)
        return packed
    found = library()
    assert found is not None
    found.GOMP_parallel(ctypes.c_void_p(body.address), packed, ctypes.c_uint(threads), 0)
    return packed


@functools.cache
def _alone(body: Any) -> Any:
    """A body as a function of this thread."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body.address)
