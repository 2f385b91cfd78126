"""A call that a compiler traces, through the prepared plan of its site: the same order, and nothing but its steps.

keys → static pattern → scale → form or softmax → gain. Sizes are numbers while a call is traced, so what depends on
them is decided then; the graph holds what is left.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import InputError, Unsupported
from ..kernels.visibility import bias_times
from ..kernels.window2d import choose, window2d
from ..seams import AttentionCall, ExtraKeys, Formed, State, Statistics
from .autocast import Delegate, narrowed, under_autocast
from .extra_keys import merge_extra, scaled
from .patterns import Pattern, extra_of_image, fitted, keys_seen, window_of
from .prepared import Step
from .run import Run
from .runtime import Runtime


def straight(runtime: Runtime, call: AttentionCall, delegate: Delegate) -> Tensor:
    """Run a traced ``call``; returns the output, (B, Lq, H, D). ``delegate``: plain attention of the user's own."""
    if narrowed(call):
        return under_autocast(call, delegate, functools.partial(_through, runtime))
    return _through(runtime, call, delegate)


def _through(runtime: Runtime, call: AttentionCall, delegate: Delegate) -> Tensor:
    ready = runtime.prepared
    acted = [*ready.steady]

    def values(kind: str) -> list[Any]:
        found = []
        for step in ready.steps[kind]:
            value = _value(step, call)
            if value is not None:
                found.append(fitted(step.method, call, value) if kind == "pattern" else value)
                acted.append(step.owner)
        return found

    extra: list[ExtraKeys] = values("keys")
    patterns: list[Pattern] = values("pattern")
    if (patterns or extra) and ready.steps["scale"]:
        call.facts["visible_keys"] = keys_seen(call, patterns, extra)
    factor: Any = ready.factor
    for value in values("scale"):
        factor = factor * value
    call, extra = _scaled(call, factor), scaled(call, extra, factor)
    kernel, reasons = "stock", ""
    if ready.steps["form"]:
        (formed,) = values("form")
        out = formed.output if isinstance(formed, Formed) else formed
        if isinstance(formed, Formed):
            kernel, reasons = formed.kernel, formed.reasons
    elif patterns or extra:
        out, kernel, reasons = _softmax(runtime, call, delegate, patterns, extra)
    else:
        out = delegate(call)
    ready.count(kernel, reasons, tuple(sorted(set(acted))))
    return ready.gained(out)


def _value(step: Step, call: AttentionCall) -> Any:
    heads, value = step.contribution.heads, step.contribution.value
    if value is None:
        raise InputError(f"{step.method}: a {step.contribution.kind} contribution needs a value function")
    if heads and max(heads) >= call.query.shape[1]:
        raise InputError(
            f"{step.method}: head {max(heads)} does not exist; there are {call.query.shape[1]} heads"
        )
    return value(call, Statistics(), State())


def _scaled(call: AttentionCall, factor: float | Tensor) -> AttentionCall:
    if isinstance(factor, Tensor):
        query = (call.query.to(call.statistics_dtype) * factor).to(call.query.dtype)
        return replace(call, query=query, mask=bias_times(call.mask, factor, *call.shape[3:]))
    if factor == 1.0:
        return call
    mask = bias_times(call.mask, factor, *call.shape[3:])
    return replace(call, mask=mask, scaling=call.scaling * factor)


def _softmax(
    runtime: Runtime, call: AttentionCall, delegate: Delegate, patterns: list[Pattern], extra: list[ExtraKeys]
) -> tuple[Tensor, str, str]:
    """The output (B, Lq, H, D) under patterns and with further keys, the kernel, and why not a faster one."""
    if call.dropout:
        raise Unsupported(
            f"{runtime.site.name}: attention dropout is on (training mode) and a patch edits this "
            "attention; call model.eval() or remove the patch"
        )
    window, why_not = window_of(call, patterns)
    if window is not None:
        beside, extra = extra_of_image(window, extra)
        choice = choose(call.query, call.key, call.value, beside)
        kernel, reasons = f"window2d/{choice.name}", "; ".join(choice.reasons)
        out, lse = window2d(call.query, call.key, call.value, window=window, scale=call.scaling, extra=beside)
        if extra:
            out, lse = merge_extra(call, out, lse, extra)
    else:
        run = Run(runtime, call, delegate)
        run.why_not = why_not
        out, lse = run.attention(run.visibility(None, patterns), extra)
        kernel, reasons = run.kernel, run.reasons
    return out.transpose(1, 2).contiguous(), kernel, reasons
