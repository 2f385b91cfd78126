"""What runs outside of compiled code, and what a compiler that may not leave its graph is told about it."""

from __future__ import annotations

from typing import TypeVar

import torch

_Function = TypeVar("_Function")

REASON = (
    "trainless runs this call outside the graph. With fullgraph=True call the model in eval mode, and with one token "
    "at a time where a method evicts or packs; explain() names the methods that are never part of a graph"
)


def uncompiled(function: _Function) -> _Function:
    """``function`` outside of the graph: a break in it, and under ``fullgraph=True`` an error with the reason."""
    found: _Function = torch.compiler.disable(function, reason=REASON)
    return found
