"""Whether a checkpoint holds every weight of the model that is built from it.

Libraries fill what is missing with random numbers, or with nothing at all, and go on: the model runs, and what it
says means nothing. Their loading info says which keys those are, for the parts of a pipeline too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import InputError

_NAMED = 5  # keys that an error names


class IncompleteError(InputError):
    """A checkpoint without some of its model's weights. ``model_class``: the class that was to be loaded."""

    def __init__(self, message: str, model_class: type):
        super().__init__(message)
        self.model_class = model_class


@contextmanager
def complete(spec: str, pipeline: bool) -> Iterator[None]:
    """Inside, ``from_pretrained`` of a model raises IncompleteError rather than give one with made-up weights.

    Only for the thread that entered it, and for models of diffusers too where ``pipeline`` says so.
    """
    from transformers import PreTrainedModel

    bases: list[Any] = [PreTrainedModel]
    if pipeline:
        from diffusers import ModelMixin

        bases.append(ModelMixin)
    ours = threading.get_ident()
    before = [(base, base.__dict__["from_pretrained"]) for base in bases]
    for base, method in before:
        base.from_pretrained = classmethod(_checked(method.__func__, spec, ours))
    try:
        yield
    finally:
        for base, method in before:
            base.from_pretrained = method


def _checked(function: Callable[..., Any], spec: str, thread: int) -> Callable[..., Any]:
    def from_pretrained(cls: type, *given: Any, **named: Any) -> Any:
        if threading.get_ident() != thread or named.get("output_loading_info"):
            return function(cls, *given, **named)
        # Shapes that do not fit would raise an error of the library's, whose first line names nothing.
        named |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = function(cls, *given, **named)
        check(model, info, spec)
        return model

    return from_pretrained


def check(model: nn.Module, info: dict[str, Any], spec: str) -> None:
    """IncompleteError for weights of ``model`` that are missing by ``info``, or have another shape there."""
    other = {str(entry[0]): (list(entry[1]), list(entry[2])) for entry in info.get("mismatched_keys") or ()}
    lost = sorted(_lost(model, set(info.get("missing_keys") or ()) - other.keys()))
    said = []
    if lost:
        said.append(f"lacks {_count(lost)} of {type(model).__name__}, which would be random: {_list(lost)}")
    if other:
        shown = [f"{key} (is {there}, must be {here})" for key, (there, here) in sorted(other.items())]
        said.append(f"has {_count(shown)} of {type(model).__name__} in another shape: {_list(shown)}")
    if said:
        raise IncompleteError(
            f"model {spec!r}: its checkpoint {'; it '.join(said)}. The files are damaged, incomplete, or belong to "
            "another configuration; get or convert the model again",
            type(model),
        )


def _lost(model: nn.Module, missing: set[str]) -> set[str]:
    """Keys of ``missing`` whose values the model cannot have: no parameter tied to one that is there, and no buffer
    that its class computes by itself."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    tied = {name for group in names.values() if not group <= missing for name in group}
    measured = {
        f"{name}.{what}" if name else what
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for what in ("running_mean", "running_var")
    }
    parameters = {name for group in names.values() for name in group}
    return {key for key in missing if (key in parameters and key not in tied) or key in measured}


def _count(keys: list[str]) -> str:
    return "1 weight" if len(keys) == 1 else f"{len(keys):,} weights"


def _list(keys: list[str]) -> str:
    rest = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + rest
