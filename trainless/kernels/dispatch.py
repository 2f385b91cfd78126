"""Which implementation runs, and why not a faster one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Why Triton kernels cannot run for a tensor, in one place for all operations.
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = (Tensor, torch.nn.Parameter)
FUSED_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """``name`` of the implementation that runs; ``reasons``: why each faster one does not."""

    name: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name if not self.reasons else f"{self.name} ({'; '.join(self.reasons)})"


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported here, or None. Looks for it without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "triton: not installed (pip install 'trainless[triton]')"
    return None


def triton_reasons(tensors: Iterable[Tensor | None]) -> tuple[str, ...]:
    """Why the Triton form cannot take these tensors; empty when it can."""
    given = [t for t in tensors if t is not None]
    reasons = []
    cuda, narrow, differentiated, negated = _looked_at(given)
    if not cuda:
        reasons.append(f"triton: needs CUDA tensors, got {given[0].device.type}")
    elif (missing := _without_triton()) is not None:
        reasons.append(missing)
    if not narrow:
        reasons.append("triton: float64 is not supported")
    if differentiated:
        reasons.append("triton: no gradient")
    if negated:
        reasons.append("triton: a tensor whose sign torch has yet to turn")
    return tuple(reasons)


def _looked_at(given: list[Tensor]) -> tuple[bool, bool, bool, bool]:
    """Whether all are on CUDA, all in dtypes of Triton, any is differentiated, any has its sign yet to be turned.

    Asked at every decode step of every layer, so in one loop.
    """
    cuda = narrow = True
    differentiated = negated = False
    traced, graph = torch.compiler.is_compiling(), torch.is_grad_enabled()
    for t in given:
        cuda = cuda and t.is_cuda
        narrow = narrow and (t.dtype in TRITON_DTYPES or not t.is_floating_point())
        differentiated = differentiated or (graph and t.requires_grad)
        negated = negated or (not traced and t.is_neg())
    return cuda, narrow, differentiated, negated


@functools.cache
def numba_missing() -> str | None:
    """Why Numba's loops cannot run here, or None. Imports it: an installed one may not like the NumPy beside it."""
    if importlib.util.find_spec("numba") is None:
        return "numba: not installed (pip install numba)"
    try:
        from .openmp import library, switched_off
    except Exception as error:
        return f"numba: cannot be imported ({error})"
    if switched_off():
        return "numba: switched off by NUMBA_DISABLE_JIT"
    if library() is None:
        return "numba: torch does not run on GNU OpenMP here"
    return None


def numba_reasons(tensors: Iterable[Tensor | None], traced: bool = False) -> tuple[str, ...]:
    """Why the form that Numba compiles for the CPU cannot take these tensors; empty when it can.

    traced: a compiler traces the call, in which it is one operator, so it does not have to see what is inside.
    """
    recorded = not traced and _recorded()
    graph = torch.is_grad_enabled()
    # The first reason that holds for any tensor, in this order.
    elsewhere = differentiated = strange = negated = False
    for t in tensors:
        if t is None:
            continue
        elsewhere = elsewhere or t.device.type != "cpu"
        differentiated = differentiated or (graph and t.requires_grad)
        if not traced:
            strange = strange or type(t) not in PLAIN
            # Its memory, which is all that a loop sees, holds the other sign.
            negated = negated or (not recorded and t.is_neg())
    if elsewhere:
        return ("numba: needs CPU tensors",)
    if differentiated:
        return ("numba: no gradient",)
    if recorded or strange:
        return ("numba: operations are being recorded or transformed",)
    if negated:
        return ("numba: a tensor whose sign torch has yet to turn",)
    missing = _without_numba()
    return () if missing is None else (missing,)


def at_once(tensor: Tensor) -> bool:
    """Whether a registered operator may be left out for what it calls: on the CPU, where nobody looks at operators."""
    return (
        tensor.device.type == "cpu"
        and not _recorded()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody looks at every operator that is called, and an operator without a gradient may be one of them."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and _get_current_dispatch_mode() is not None and not differentiated(tensors)


@functools.cache
def compiled_form(package: str) -> tuple[ModuleType | None, tuple[str, ...]]:
    """The module ``compiled`` of an operation, or why there is none.

    Compiling, which happens when it is imported, writes files and may fail like anything that does.
    """
    try:
        return importlib.import_module(f"{package}.compiled"), ()
    except Exception as error:
        return None, (f"numba: cannot compile here ({type(error).__name__}: {error})",)


# The same answers, of which a compiler that traces a call keeps what they are: see ``constant``.


def constant(function: Any) -> Any:
    """Have a compiler call ``function`` while it traces, and keep the answer: arguments and answer are plain values.

    What torch.compiler.assume_constant_result does, which imports the compiler; importing this package must not.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def _without_triton() -> str | None:
    return triton_missing()


@constant
def _without_numba() -> str | None:
    return numba_missing()


@constant
def not_compiled(package: str) -> tuple[str, ...]:
    """Why the module ``compiled`` of an operation is not there; empty when it is."""
    return compiled_form(package)[1]


@constant
def half_matmul_is_fast() -> bool:
    return fast_half_matmul()


def differentiated(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _recorded() -> bool:
    """Whether somebody looks at the operations of torch, in which a loop that is none of them would be missing."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


@functools.cache
def fast_half_matmul() -> bool:
    """Whether this CPU has tile instructions for half precision (AMX)."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe()) if probe is not None else False


def available() -> dict[str, Choice]:
    """For each operation, what runs for an ordinary causal call on this machine's best device.

    Used by ``trainless doctor``; starts nothing and imports no Triton.
    """
    cuda = torch.cuda.is_available()
    missing = triton_missing()
    if cuda and missing is None:
        names = (
            "lse", "column_mass", "group_mass", "mass_move", "linear", "window2d", "block_sparse", "quant_kv",
        )  # fmt: skip
        return {name: Choice("triton") for name in names}
    why = (missing or "triton: no CUDA device",)
    slow = ("numba: needs CPU tensors",) if cuda else tuple(filter(None, [numba_missing()]))
    compiled = Choice("blocked", (*why, *slow)) if slow else Choice("numba")
    # On a GPU without Triton everything is the blocked form; the fused operator is the CPU's.
    return {
        "lse": Choice("blocked", why) if cuda else Choice("fused"),
        "column_mass": Choice("blocked", why),
        "group_mass": Choice("blocked", why),
        "mass_move": Choice("blocked", why),
        "linear": Choice("blocked", why),
        "window2d": compiled,
        "block_sparse": Choice("blocked", why),
        "quant_kv": compiled,
    }
