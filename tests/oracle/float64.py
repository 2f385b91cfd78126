"""Stock models compute a few things in float32 whatever their dtype; here they stay in float64.

Root-mean-square norms, rotary tables and the eager softmax cast to float32 and back. A difference of
1e-16 before such a cast can come out as 1e-7, which would set the limit of every comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)
CASTING = ("RMSNorm", "LayerNorm", "RotaryEmbedding", "SiLU", "PosEmbed")


class _KeepWide(TorchFunctionMode):
    """Casts of float64 and integer tensors to narrower floats become casts to float64."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype not in (*NARROW, torch.bool):
            if func is torch.Tensor.float:
                return args[0].double()
            if func is torch.Tensor.to:
                args = tuple(_widen(a) for a in args)
            if "dtype" in kwargs:
                kwargs["dtype"] = _widen(kwargs["dtype"])
        return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


@contextmanager
def float64_math() -> Iterator[None]:
    """Everything inside stays in float64, the eager softmax of transformers included. For stock models
    only: around the code under test it would hide casts that ought to fail."""
    with _KeepWide():
        yield


_exact_classes: dict[type, type] = {}


def exact(model: nn.Module) -> nn.Module:
    """Make norms and rotary tables of ``model`` compute in float64, in place; attention is not touched.

    Modules get a subclass of their own class under the same name, so that copies stay right.
    """
    for module in model.modules():
        cls = type(module)
        if (
            not cls.__name__.endswith(CASTING)
            or cls.__module__.startswith("torch.")
            or cls in _exact_classes.values()
        ):
            continue
        widen(module)
    return model


def widen(module: nn.Module) -> None:
    """Make the forward of ``module``, with all that it calls, compute in float64, in place."""
    cls = type(module)
    if cls in _exact_classes.values():
        return
    if cls not in _exact_classes:
        _exact_classes[cls] = type(
            cls.__name__, (cls,), {"forward": _wide(cls.forward), "__module__": cls.__module__}
        )
    module.__class__ = _exact_classes[cls]


def _wide(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def wide_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _KeepWide():
            return forward(self, *args, **kwargs)

    return wide_forward
