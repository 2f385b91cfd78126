"""Static patterns whose own kernels make the output: windows on a grid of image tokens, listed blocks and spans."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..cache import CompressingLayer
from ..kernels.block_sparse import Blocks, Spans
from ..kernels.block_sparse.api import sliceable
from ..kernels.visibility import Visibility
from ..kernels.window2d import Window2d, window2d
from ..kernels.window2d import choose as choose_window
from ..seams import Entry
from .asked import Asked
from .extra_keys import merge_extra
from .patterns import Listed, extra_of_image, through_lists
from .run import FEW_ROWS, Run


def through_listed(run: Run, asked: Asked) -> Tensor | None:
    """The output over blocks or spans by the kernel that computes nothing else; None where it cannot be used."""
    call, lists = run.call, [p for p in asked.patterns if isinstance(p, Listed)]
    few = call.query.shape[2] <= FEW_ROWS  # whole rows of probabilities are the shorter way
    if not lists or few or run.runtime.facts.get("attentions"):
        return None
    visible = run.visibility(asked.layer, [])
    why = {
        "another pattern": len(asked.patterns) > 1,
        "extra keys": bool(asked.extra),
        "statistics or an edit": bool(asked.wanted or asked.dynamic or asked.edits or run.groups),
        "an observer": bool(run.plan.of["observe"]),
        "rows that begin at different tokens": lists[0].start is not None
        and not sliceable(visible, run.terms()),
        "a mask that is not causal": isinstance(lists[0].pattern, Spans) and not visible.causal,
    }
    run.why_not = (
        *run.why_not,
        *(f"block_sparse: the call has {what}" for what, there in why.items() if there),
    )
    if any(why.values()):
        return None
    run.kernel, run.reasons, out = through_lists(call, lists[0], visible, run.terms())
    return out.transpose(1, 2).contiguous()


def listed_alone(run: Run, asked: Asked, visible: Visibility, chosen: Any) -> bool:
    """Whether a pattern that was chosen from statistics is all that happens to this call from here on."""
    alone = isinstance(chosen, Listed) and len(asked.dynamic) == 1 and not (asked.extra or asked.patterns)
    alone = alone and not (asked.moves or run.groups or run.plan.of["observe"])
    alone = alone and (chosen.start is None or sliceable(visible, run.terms()))
    return alone and (isinstance(chosen.pattern, Blocks) or visible.causal)


def why_no_window(
    run: Run, layer: CompressingLayer | None, wanted: set[str], dynamic: list[Entry], edits: list[Any] | None
) -> tuple[str, ...]:
    """What else the plan asks for at this call that the kernel of a window does not give."""
    if wanted or dynamic or edits or run.plan.of["observe"]:
        return ("window2d: statistics or an edit are asked for",)
    return ("window2d: the call has a cache that evicts",) if layer is not None else ()


def windowed(run: Run, window: Window2d, extra: list[Any]) -> Tensor:
    """Attention in a window on the call's grid, by the kernel that visits nothing outside it."""
    call = run.call
    beside, others = extra_of_image(window, extra)
    choice = choose_window(call.query, call.key, call.value, beside)
    run.kernel, run.reasons = f"window2d/{choice.name}", "; ".join(choice.reasons)
    out, lse = window2d(call.query, call.key, call.value, window=window, scale=call.scaling, extra=beside)
    if others:
        out, lse = merge_extra(call, out, lse, others)
    return out.transpose(1, 2).contiguous()
