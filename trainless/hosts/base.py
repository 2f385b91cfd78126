"""What every host offers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from ..edits.journal import Journal
from ..engine.runtime import Runtime
from ..seams import Site
from .modules.around import Tell


class Host(Protocol):
    """A library whose models we know how to patch."""

    name: str
    lasting: str  # what a State may outlast its call for: a "sequence" or a "run"

    def accepts(self, model: nn.Module) -> bool:
        """Whether ``model`` belongs to this host."""

    def sites(self, model: nn.Module, prefix: str = "", parts: frozenset[str] = frozenset()) -> list[Site]:
        """Every attention site of ``model``, the refused ones too; ``parts`` are added to each."""

    def install(self, runtime: Runtime) -> None:
        """Make the edits that route the site through ``runtime``, into ``runtime.journal``."""

    def around(self, runtime: Runtime, model: nn.Module, station: Journal) -> Tell:
        """Who tells what is known of the calls at a site around which somebody stands; edits go into ``station``."""

    def install_model(self, model: nn.Module, journal: Journal, runtimes: Sequence[Runtime]) -> None:
        """Make the edits that a patched model needs once, into ``journal``."""

    def family(self, model: nn.Module) -> str:
        """What the model calls itself: model_type or class name."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile(module)`` stands: its edits belong to what is compiled.

    The wrapper hands every attribute that is read or set on to the module inside, so nothing can be put on it.
    """
    dynamo = sys.modules.get("torch._dynamo")
    while dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        module = module._orig_mod
    return module
