"""Processors of logits that patches bring: put among those of ``generate``, for as long as it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from ...edits.journal import mark
from ...engine.runtime import Runtime
from ...errors import InputError
from ...seams import Entry

METHOD = "_get_logits_processor"
KERNEL = "logits processor"  # by which its calls are counted


class PatchLogits(LogitsProcessor):
    """The processor of one patch, in one call of ``generate``."""

    def __init__(self, runtime: Runtime, entry: Entry):
        self.runtime, self.entry = runtime, entry

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V) as the method changes them; InputError, in its name, for what is no such tensor."""
        entry = self.entry
        value: Any = entry.contribution.value
        if not entry.owner.active:  # type: ignore[attr-defined]
            return scores
        found = value(input_ids, scores)
        if found is not None and (not isinstance(found, Tensor) or found.shape != scores.shape):
            said = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"{entry.method}: its logits processor returned {said}; scores {tuple(scores.shape)} are needed, or None"
            )
        tally = self.runtime.tallies.get(entry.owner)  # type: ignore[call-overload]
        if tally is not None:
            with self.runtime.counting:
                tally.fired += 1
                if found is not None:
                    tally.acted += 1
                    tally.kernels[KERNEL] += 1
        return scores if found is None else found


def _of(runtimes: Sequence[Runtime]) -> Iterator[PatchLogits]:
    """Those of the patches that are active now, in the order of the patches; one contribution is one processor."""
    found: dict[int, PatchLogits] = {}
    for runtime in runtimes:
        for entry in runtime.plan.of["logits"]:
            found.setdefault(id(entry.contribution), PatchLogits(runtime, entry))
    yield from sorted(found.values(), key=lambda one: one.entry.owner.number)  # type: ignore[attr-defined]


def logits_wrapper(model: nn.Module, runtimes: Sequence[Runtime]) -> Callable[..., Any]:
    """``_get_logits_processor`` of this instance, which gives those of patches as if the user had given them last."""
    original: Any = getattr(model, METHOD)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def gather(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = list(bound.arguments.get("logits_processor") or ())
        # A model that drafts for itself is handed the list in which they stand already.
        standing = {id(one.entry.contribution) for one in given if isinstance(one, PatchLogits)}
        more = [one for one in _of(runtimes) if id(one.entry.contribution) not in standing]
        if more:
            bound.arguments["logits_processor"] = LogitsProcessorList([*given, *more])
        return original(*bound.args, **bound.kwargs)

    return mark(gather)
