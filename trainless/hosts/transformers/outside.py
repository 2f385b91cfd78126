"""Generation that is run by a model around the patched one, whose patch it does not know.

A patch on the decoder alone does not stand where ``generate`` of the model around it prepares caches and feeds prompts.
Plain generation needs nothing there; a prompt in chunks, drafts and ``use_cache=False`` do, so they are refused.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from transformers import GenerationMixin
from transformers.generation import GenerationMode

from ...engine.runtime import Runtime
from ...errors import Unsupported

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
CACHES = "_prepare_cache_for_generation"  # the method whose wrapper says which sites it cares for


@dataclass(frozen=True)
class Generating:
    """The model whose ``generate`` is under way, and the option of it that has to be prepared for."""

    model: Any
    option: str


ASSISTED = "assisted decoding"


def generating() -> Generating | None:
    """What runs the forward under way, where it has to be prepared for; None for anything else."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    if frame is None:
        return None
    known = frame.f_locals
    config = known.get("generation_config")
    if config is None:
        return None
    if config.prefill_chunk_size is not None:
        return Generating(known["self"], "prefill_chunk_size")
    if config.get_generation_mode(known.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION:
        return Generating(known["self"], ASSISTED)
    return Generating(known["self"], "use_cache=False") if config.use_cache is False else None


def refuse_unprepared(runtime: Runtime, found: Generating | None) -> None:
    """Refuse an option that would change the result of a method here without its patch knowing."""
    if found is None:
        return
    plan = runtime.plan
    concerned = plan.of["kv"] or (() if found.option == "use_cache=False" else plan.lookahead)
    entry = next((e for e in concerned if not e.contribution.inert), None)
    if entry is None:
        return
    prepared = getattr(vars(found.model).get(CACHES), "runtimes", ())
    inside = any(m is runtime.site.module for m in found.model.modules())
    if inside and not any(r is runtime for r in prepared):
        raise Unsupported(
            f"{entry.method}: {type(found.model).__name__} generates with {found.option}, and the patch is on a model "
            f"inside it; put the patch on {type(found.model).__name__} itself, or drop the option"
        )
