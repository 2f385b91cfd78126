"""Hosts: the libraries whose models can be patched, and how a model or pipeline falls into their parts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InputError, Unsupported
from ..seams import Lease, Site
from .base import Host, unwrapped

__all__ = [
    "Component",
    "Host",
    "components",
    "exchanged",
    "find_sites",
    "module_sites",
    "size_notes",
    "unmatched",
    "watch_sizes",
]


@dataclass(frozen=True)
class Component:
    """A module that one host takes care of; ``prefix`` goes before its module names, ``parts`` onto its sites."""

    prefix: str
    module: nn.Module
    host: Host
    parts: frozenset[str]
    main: bool = True  # bound by default; text encoders of a pipeline are not


def components(model: Any) -> list[Component]:
    """The patchable modules of a model or pipeline.

    Raises InputError for something that is neither, Unsupported for a module of an unknown library.
    """
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        return [Component("", model, host_of(model), frozenset())]
    if "diffusers" in sys.modules:
        from diffusers import DiffusionPipeline

        if isinstance(model, DiffusionPipeline):
            return _pipeline(model)
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module):  # a transformers pipeline
        inner = unwrapped(inner)
        return [Component("", inner, host_of(inner), frozenset())]
    raise InputError(
        f"cannot patch a {type(model).__name__}: give a loaded torch module or a pipeline"
        + (" (a name or path is loaded by you first, with from_pretrained)" if isinstance(model, str) else "")
    )


def host_of(model: nn.Module) -> Host:
    """The host that takes care of ``model``; Unsupported when none does."""
    from .transformers.host import TransformersHost

    candidates: list[Host] = [TransformersHost()]
    if "diffusers" in sys.modules:
        from .diffusers.host import DiffusersHost

        # A diffusers model may hold a transformers text encoder, not the other way round.
        candidates.insert(0, DiffusersHost())
    for host in candidates:
        if host.accepts(model):
            return host
    raise Unsupported(
        f"{type(model).__name__} is neither a transformers nor a diffusers model, and holds none; "
        "patch the model inside it"
    )


def _pipeline(pipeline: Any) -> list[Component]:
    from .diffusers.host import DiffusersHost, denoisers_of, text_encoders_of
    from .transformers.host import TransformersHost

    # Some pipelines hand over from one denoiser to a second one; a patch on half the steps would be a trap.
    found = [
        Component(f"{name}.", denoiser, DiffusersHost(pipeline), frozenset({"denoiser"}))
        for name, denoiser in denoisers_of(pipeline)
    ]
    for name, encoder in text_encoders_of(pipeline):
        found.append(
            Component(f"{name}.", encoder, TransformersHost(), frozenset({"text_encoder"}), main=False)
        )
    return found


def exchanged(model: Any, parts: list[Component]) -> list[str]:
    """The attributes of a pipeline that are no longer the modules which ``parts`` are."""
    names = []
    for part in parts:
        name = part.prefix.removesuffix(".")
        if name and "." not in name and not isinstance(model, nn.Module):
            now = getattr(model, name, None)
            if now is not part.module and getattr(now, "_orig_mod", None) is not part.module:
                names.append(name)
    return names


def watch_sizes(parts: list[Component], lease: Lease) -> None:
    """Have these components say at the call when another size is painted than asked, for a patch that goes by it."""
    for part in parts:
        watch = getattr(part.host, "watch_sizes_for", None)
        if watch is not None:
            watch(part.module, lease)


def size_notes(parts: list[Component]) -> list[str]:
    """What is to be said about the sizes that these components are really given."""
    found = [getattr(part.host, "size_notes", None) for part in parts]
    notes = [
        note for say, part in zip(found, parts, strict=True) if say is not None for note in say(part.module)
    ]
    return list(dict.fromkeys(notes))


def find_sites(parts: list[Component]) -> list[Site]:
    """Every attention site of every component."""
    return [site for part in parts for site in part.host.sites(part.module, part.prefix, part.parts)]


def unmatched(parts: list[Component]) -> dict[str, int]:
    """Modules that go by the name of attention and that no patch can reach, by class, as far as hosts know."""
    found: dict[str, int] = {}
    for part in parts:
        look = getattr(part.host, "unmatched", None)
        for name, count in (look(part.module) if look is not None and part.main else {}).items():
            found[name] = found.get(name, 0) + count
    return found


def module_sites(parts: list[Component]) -> list[Site]:
    """Every module as a site, for methods that wrap calls or replace weights."""
    found = []
    for part in parts:
        layers = _layers_of_modules(part)
        for name, module in part.module.named_modules():
            layer, count = layers.get(name, (0, 0))
            found.append(
                Site(
                    name=part.prefix + name, module=module, host=part.host.name, kind="module", parts=part.parts,
                    role="module", layer=layer, layers=count, lasting=part.host.lasting,
                )
            )  # fmt: skip
    return found


def _layers_of_modules(part: Component) -> dict[str, tuple[int, int]]:
    """(number of the layer, number of layers) of the modules in layers, by name.

    A layer is the largest item of a list of modules whose attention sites are all of one number.
    """
    attention = [
        (s.name.removeprefix(part.prefix), s) for s in part.host.sites(part.module, part.prefix, part.parts)
    ]
    found: dict[str, tuple[int, int]] = {}
    for name, module in part.module.named_modules():  # from the outside in
        if not isinstance(module, nn.ModuleList):
            continue
        for index, item in enumerate(module):
            root = f"{name}.{index}"
            inside = {(s.layer, s.layers) for at, s in attention if at == root or at.startswith(f"{root}.")}
            if len({number for number, _ in inside}) != 1 or root in found:
                continue
            for inner, _ in item.named_modules():
                found[f"{root}.{inner}" if inner else root] = max(inside)
    return found
