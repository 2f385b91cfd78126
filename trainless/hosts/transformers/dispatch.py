"""Which attention classes look up their function in transformers' AttentionInterface, told from their code.

The compiled code of ``forward`` is read, not its source, so that installations without sources are the same. A
class that overrides ``forward`` and calls ``super()`` does what its parent does.
"""

from __future__ import annotations

import dis
import inspect
from collections import Counter
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

REGISTRY, NAME = "ALL_ATTENTION_FUNCTIONS", "_attn_implementation"
_dispatching: dict[type, bool] = {}
_comparing: dict[type, bool] = {}


def dispatches(cls: type) -> bool:
    """Whether this class's forward, its own or its parents', looks up its attention function by its own config."""
    if cls not in _dispatching:
        _dispatching[cls] = any(_looks_up(code) for code in _forwards(cls))
    return _dispatching[cls]


def compares(cls: type) -> bool:
    """Whether the class compares its config's implementation with a name, and so computes by it."""
    if cls not in _comparing:
        _comparing[cls] = any(_compares(code) for c in _own(cls) for code in _codes(c))
    return _comparing[cls]


def unmatched(model: nn.Module) -> dict[str, int]:
    """Modules that go by the name of attention and hold none that can be reached, by class: what no patch sees."""
    names = [name for name, module in model.named_modules() if dispatches(type(module))]
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        called = type(module).__name__.lower()
        # What stands before a lower-case letter is a part of it: AttentionNorm, AttentionConfig.
        if not called.endswith(("attention", "attn", "attentionblock", "mla")):
            continue
        below = f"{name}." if name else ""
        if any(other == name or other.startswith(below) or name.startswith(f"{other}.") for other in names):
            continue
        if any(_named(type(child)) for child in module.children()):
            continue  # the ones inside count
        counts[type(module).__name__] += 1
    return dict(counts)


def _named(cls: type) -> bool:
    return cls.__name__.lower().endswith(("attention", "attn", "attentionblock"))


def _own(cls: type) -> list[type]:
    """The class and its parents, up to torch's own."""
    return [c for c in cls.__mro__ if c not in (object, nn.Module)]


def _forwards(cls: type) -> Iterator[CodeType]:
    """The code of ``forward``, and of the parents' as long as each calls the next."""
    for c in _own(cls):
        if "forward" not in vars(c):
            continue
        code = _code(vars(c)["forward"])
        if code is None:
            return
        yield code
        if "super" not in code.co_names or "forward" not in _attributes(code):
            return


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


def _codes(cls: type) -> Iterator[CodeType]:
    for member in vars(cls).values():
        function = member.fget if isinstance(member, property) else member
        if callable(function):
            code = _code(function)
            if code is not None:
                yield code


def _attributes(code: CodeType) -> set[str]:
    return {*code.co_names}


def _looks_up(code: CodeType) -> bool:
    return REGISTRY in code.co_names and any(True for _ in _asked(code))


def _asked(code: CodeType) -> Iterator[list[dis.Instruction]]:
    """What follows each ``self.config._attn_implementation`` in the code."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("NOP", "CACHE", "EXTENDED_ARG")]
    for at, step in enumerate(steps):
        if step.argval == NAME and at >= 2 and steps[at - 1].argval == "config":
            if str(steps[at - 2].argval).split("'")[0] in ("self", "('") or "self" in str(
                steps[at - 2].argval
            ):
                yield steps[at + 1 : at + 4]


def _compares(code: CodeType) -> bool:
    compared = ("COMPARE_OP", "CONTAINS_OP")
    return any(any(step.opname in compared for step in after) for after in _asked(code))


def passes(cls: type) -> frozenset[str]:
    """The names by which the class passes arguments of its own to the attention function."""
    found: set[str] = set()
    for code in _forwards(cls):
        for const in code.co_consts:
            if isinstance(const, tuple) and not {"scaling", "dropout"}.isdisjoint(const):
                found.update(name for name in const if isinstance(name, str))
    return frozenset(found)
