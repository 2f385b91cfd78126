"""Which form a decode step on packed buffers takes, and the step by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common import Terms
from ...dispatch import compiled_form, numba_reasons, triton_reasons
from .. import fixed_plain
from ..fixed import FixedPacked, Stepping

NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


def unlooped(
    query: Tensor, key: Tensor | None, value: Tensor | None, sections: Sequence[FixedPacked]
) -> tuple[str, ...]:
    """Why the loops that Numba compiles cannot do a step; empty when they can."""
    # Asked at every decode step of every layer, so in plain loops.
    dtype = sections[0].tail_key.dtype
    if why := numba_reasons((query, key, value)):
        return why
    for t in (query, key, value):
        if t is not None and (t.dtype not in NUMBERS or (t is not query and t.dtype != dtype)):
            return (f"numba: numbers of at most 32 bits are needed, got {t.dtype} beside {dtype}",)
    for section in sections:
        if section.tail_key.dtype != dtype or dtype not in NUMBERS:
            return (f"numba: buffers of one kind of at most 32 bits are needed, got {dtype}",)
        for t in vars(section).values():
            if not isinstance(t, Tensor):
                continue
            if (
                t.dtype != dtype and t.is_floating_point()
            ):  # as under autocast, where keys are wider than values
                return (f"numba: buffers of one kind are needed, got {t.dtype} beside {dtype}",)
            if not t.is_contiguous():
                return ("numba: buffers have gaps",)
    return compiled_form(__package__)[1]


def looped() -> Any:
    """The form that Numba compiles."""
    return compiled_form(__package__)[0]


def on_triton(query: Tensor, sections: Sequence[FixedPacked], terms: Terms) -> bool:
    """Whether the step is Triton's."""
    if not query.is_cuda or triton_reasons((query, *(t for s in sections for t in (s.key, s.tail_key)))):
        return False
    from .. import fixed_triton

    return not any(fixed_triton.refuses(query, section, terms) for section in sections)


def step(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    sections: Sequence[FixedPacked],
    terms: Terms,
    how: Stepping,
) -> tuple[Tensor, Tensor, bool]:
    """The output, the log-sum-exp, and whether a row may be due to be packed."""
    if not unlooped(query, key, value, sections):
        found: tuple[Tensor, Tensor, bool] = looped().decode(query, key, value, sections, terms, how)
        return found
    return *fixed_plain.decode(query, key, value, sections, terms, how), how.need > 0
