"""Methods that lie, do nothing or break, and what the tests of verify share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from oracle import models
from torch import nn

import trainless
from trainless.patchers import Method
from trainless.recipes import Recipe, Use, Where
from trainless.seams import Around, Cache, Contribution, Evict, Gain, Scale, Site


@dataclass(frozen=True)
class Toy(Method):
    """A gain on every layer. ``honest`` False: it claims an identity value at which it is none."""

    name: ClassVar[str] = "toy"
    identity: ClassVar[dict[str, Any] | None] = {"gain": 1.0}
    gain: float = 2.0
    honest: bool = True

    def contribute(self, site: Site) -> Sequence[Contribution]:
        gain = self.gain if self.honest else self.gain * 1.5
        return [Gain(lambda call, stats, state: gain)]


@dataclass(frozen=True)
class Idle(Method):
    """Passes every call and changes nothing."""

    name: ClassVar[str] = "idle"

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Scale(lambda call, stats, state: None)]


@dataclass(frozen=True)
class Explodes(Method):
    """Divides by nothing: NaN from finite numbers, or an exception."""

    name: ClassVar[str] = "explodes"
    raises: bool = False

    def contribute(self, site: Site) -> Sequence[Contribution]:
        def value(call: Any, stats: Any, state: Any) -> float:
            if self.raises:
                raise ZeroDivisionError("on purpose")
            return float("nan")

        return [Gain(value)]


@dataclass(frozen=True)
class Unreached(Method):
    """Wraps a module that the model never calls."""

    name: ClassVar[str] = "unreached"
    site_kind: ClassVar[str] = "module"

    def wants_layer(self, site: Site) -> bool:
        return site.name.endswith("spare")

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Around(lambda proceed, call, state: proceed(*call.args, **call.kwargs))]


@dataclass(frozen=True)
class Keeps(Method):
    """An evictor whose rule is handed in."""

    name: ClassVar[str] = "keeps"
    evicts: ClassVar[bool] = True
    recent: int = 8

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Cache(Evict(recent=self.recent))]


def patch(model: nn.Module, *methods: Method) -> trainless.Patch:
    uses = [Use(m.name, m, Where()) for m in methods]
    return trainless.patch(model, Recipe("+".join(m.name for m in methods), uses))


def status(found: trainless.Verification) -> dict[tuple[str, str], str]:
    return {(c.subject, c.name): c.status for c in found.checks}


def llama(dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """Of one layer: verify looks at each layer by itself; tests that are about several ask for them."""
    return models.build("llama", dtype=dtype, **{"layers": 1, **more})


def detail(found: trainless.Verification, name: str) -> str:
    """What the check called ``name`` says, of whichever subject."""
    return next(c.detail for c in found.checks if c.name == name)


def failures(found: trainless.Verification) -> set[str]:
    return {c.name for c in found.failed}
