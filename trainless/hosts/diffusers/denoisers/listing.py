"""What each method does with each denoiser class of the installed diffusers, from the table alone: no weights."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ....errors import InputError
from ....patchers import Method, known
from ....seams import Site
from .table import TABLE
from .words import ROLES, Layout, holds_no_image, qualified, undeclared

PACKAGES = ("transformers", "unets", "controlnets")
ONE_FRAME = "one frame is an image; calls with more are refused"


@dataclass(frozen=True)
class Verdict:
    """Whether a method works on a class. reason: why not, or what is to be known; left_out: layers that it leaves."""

    works: bool
    reason: str = ""
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class DenoiserFamily:
    """One denoiser class. declared: whether the table has it. methods: by name."""

    name: str
    module: str
    declared: bool
    methods: dict[str, Verdict] = field(default_factory=dict)


def families() -> list[DenoiserFamily]:
    """Every model class with attention in diffusers' transformers, UNets and ControlNets, by name."""
    methods = [_plain(cls) for cls in known().values() if "diffusers" in cls.hosts]
    found = []
    for kind in _classes():
        layout = TABLE.get(qualified(kind))
        verdicts = {method.name: _verdict(method, layout, kind.__name__) for method in methods}
        found.append(DenoiserFamily(kind.__name__, kind.__module__, layout is not None, verdicts))
    return sorted(found, key=lambda family: family.name)


def _plain(cls: type[Method]) -> Method:
    """The method with the parameters that it has by default."""
    try:
        return cls()
    except (TypeError, InputError):
        return cls(**(cls.identity or {}))


def _classes() -> Iterator[type]:
    from diffusers import ModelMixin

    for package in PACKAGES:
        home = importlib.import_module(f"diffusers.models.{package}")
        for info in pkgutil.iter_modules(home.__path__):
            module = importlib.import_module(f"{home.__name__}.{info.name}")
            for _, kind in inspect.getmembers(module, inspect.isclass):
                own = kind.__module__ == module.__name__
                if own and issubclass(kind, ModelMixin) and _attends(kind):
                    yield kind


def _attends(kind: type) -> bool:
    """Whether the class's file speaks of attention at all; containers of several models do not."""
    module = inspect.getmodule(kind)
    try:
        return "ttention" in inspect.getsource(module) if module is not None else False
    except OSError:
        return True


def _verdict(method: Method, layout: Layout | None, family: str) -> Verdict:
    reasons: dict[str, str | None] = {}
    for name, holds in _layers(layout).items():
        site = _site(layout, family, name, holds)
        if site.role in method.roles and ("denoiser" in method.parts or not method.parts):
            reasons[name] = site.refusal or method.refuses(site)
    left = tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    if not reasons:
        return Verdict(False, f"it has no {'/'.join(sorted(method.roles))} attention of its own")
    if len(left) == len(reasons):
        return Verdict(False, next(reason for reason in reasons.values() if reason))
    asks = layout is not None and layout.frames and _asks(method, family)
    return Verdict(True, ONE_FRAME if asks else "", left)


def _asks(method: Method, family: str) -> bool:
    """Whether the method has to know which tokens are the image's."""
    return method.refuses(_site(None, family, "attn", None)) is not None


def _layers(layout: Layout | None) -> dict[str, str | None]:
    """Names of layers, or globs on them, and what they hold; one made up where nothing is declared."""
    if layout is None or not (layout.read or layout.sites):
        return {"attention": None}
    return dict(layout.examples if callable(layout.sites) else layout.sites)


def _site(layout: Layout | None, family: str, name: str, holds: str | None) -> Site:
    if layout is None:
        why: str | None = undeclared(family)
    else:
        why = layout.why if layout.read is None else holds_no_image(holds)
    facts: dict[str, Any] = {
        "family": family, "layout": layout, "holds": holds, "no_images": why, "local": name,
        "patch": (1, 1) if layout is not None and layout.patch is not None else None,
    }  # fmt: skip
    linear = layout is not None and layout.linear and ROLES.get(holds or "") == "self"
    return Site(
        name=name, module=nn.Identity(), host="diffusers", role=ROLES.get(holds or "", "self"),
        parts=frozenset({"denoiser"}), facts=facts,
        refusal="it is linear attention already, without a softmax" if linear else None,
    )  # fmt: skip
