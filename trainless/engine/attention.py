"""The engine: one attention call through the plan of its site, on the cheapest path that is exact.

Order: position, keys → scale → static pattern → statistics → dynamic pattern or form → mass → gain → kv.
The attention matrix is never stored whole: statistics come from the log-sum-exp of each row and a second
pass over blocks, edits from the few columns that they touch. A call that changes nothing runs the stock
kernel and returns its bits. Few query rows (decode, drafts) have their probabilities computed outright.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cache import CompressingLayer, ExpandedLayer, PackedLayer
from ..errors import Unsupported
from ..kernels.block_sparse import Blocks
from ..kernels.visibility import adds_bias, bias_times
from ..seams import AttentionCall, Entry, Formed, Lease
from .autocast import narrowed, under_autocast
from .extra_keys import scaled
from .packed import packed_softmax
from .patterns import Pattern, blocks_read, fitted, keys_seen
from .run import SAMPLED, Delegate, Run
from .runtime import Runtime
from .softmax import softmax

EXPANDED = "the module works on what its cache returns: codes become numbers for each call"


def attend(runtime: Runtime, call: AttentionCall, delegate: Delegate) -> Tensor:
    """Run ``call`` through the plan of ``runtime``; returns the output, (B, Lq, H, D).

    ``delegate`` computes plain attention for a call with the implementation that the user had.
    """
    runtime.passed()
    if narrowed(call):
        return under_autocast(call, delegate, functools.partial(_attend, runtime))
    return _attend(runtime, call, delegate)


def _attend(runtime: Runtime, call: AttentionCall, delegate: Delegate) -> Tensor:
    # A layer that has dropped or packed tokens is attended to here as long as a hook of ours stands at the site.
    if runtime.plan.inert and not isinstance(call.layer, CompressingLayer):
        return delegate(call)
    run = Run(runtime, call, delegate)
    # Families read learned sinks from the module, so a scale has to reach them on the long way.
    if runtime.plan.direct and call.sink_logits is None and not isinstance(call.layer, CompressingLayer):
        return direct(run)
    return output(run)


# ------------------------------------------------------------------ the order of things


def output(run: Run) -> Tensor:
    call, plan = run.call, run.plan
    layer = call.layer if isinstance(call.layer, CompressingLayer) else None
    if layer is not None:
        # Attending to less than the whole, or to codes, changes a call as dropping and packing do.
        run.acted.update(lease for lease in layer.altered() if lease.active)
        layer.note(call.real)
        run.edited = layer.evicted
        _refuse_bias(run, layer)
        _refuse_hidden_past(run, layer)
    _position(run)
    extra = _extra_keys(run)
    # Asked for before the scale, which may depend on how many keys a row is left with.
    patterns = _static_patterns(run, extra)
    extra = scaled(run.call, extra, _scale(run))
    call = run.call
    dynamic = [e for e in plan.of["pattern"] if e.contribution.dynamic]
    form = plan.of["form"]
    wanted = _wanted(run, layer)
    _ask_groups(run)
    moves = plan.of["mass"]
    formed = _form(run, form[0]) if form else None
    if formed is not None:
        out = formed
    elif isinstance(layer, PackedLayer) and layer.packed:
        out = packed_softmax(run, layer, extra, wanted, moves)
    elif not (run.edited or extra or patterns or wanted or moves or run.groups or dynamic):
        out = run.delegate(call)
        run.observe()  # what asks for facts of the call, not for statistics
    else:
        out = softmax(run, layer, extra, patterns, wanted, moves)
    out = _gain(run, out)
    if isinstance(layer, ExpandedLayer) and layer.store.runs:
        run.reasons = "; ".join(filter(None, (run.reasons, EXPANDED)))
    if layer is not None and plan.evictor is not None and _chooses(layer):
        layer.choose(run.value(plan.evictor))
    if isinstance(layer, PackedLayer):
        run.acted.update(layer.evict())
        run.acted.update(layer.finish(_tiers(run, layer)))
    elif layer is not None:
        run.acted.update(layer.settle())
    _account(run, layer)
    return out


def _refuse_bias(run: Run, layer: CompressingLayer) -> None:
    """A mask that adds to the logits is as wide as the sequence, and the keys are no longer where it says."""
    mask = run.call.mask
    if (layer.evicted or layer.packed) and adds_bias(mask, run.call.query.shape[2]):
        raise Unsupported(
            f"{layer.lease.name}: {run.runtime.site.name} was given a mask that adds a bias to the logits, key by "
            "key, and its cache has dropped or packed keys; use a mask that only hides keys"
        )


def _refuse_hidden_past(run: Run, layer: CompressingLayer) -> None:
    """Where keys are dropped or packed, a row sees every token held: a mask cannot hide one that was real."""
    call, rows = run.call, run.call.query.shape[2]
    mask, past = call.mask, layer.seen - rows
    if not (layer.evicted or layer.packed) or not isinstance(mask, Tensor) or mask.shape[-1] != layer.seen:
        return
    last = mask if mask.dim() == 2 else mask[:, 0, -1]
    shown = last if last.dtype == torch.bool or mask.dim() == 2 else last > torch.finfo(last.dtype).min / 2
    counts = shown[:, :past].bool().sum(1).expand(len(layer.ages)).tolist()
    new = [(rows, 1)] * len(counts)
    if call.real is not None:
        new = torch.stack([call.real.sum(1), call.real[:, -1].long()], 1).tolist()
    # A row whose last token is padding says nothing of what it sees.
    if any(n < age - own and ends for n, age, (own, ends) in zip(counts, layer.ages, new, strict=True)):
        raise Unsupported(
            f"{layer.lease.name}: {run.runtime.site.name} was given a mask that hides earlier tokens which were no "
            "padding when they came, and its cache has dropped or packed keys; start a new cache, or give "
            "attention_mask=1 for them (generate() without one takes every pad token in the text for padding)"
        )


def direct(run: Run) -> Tensor:
    """Scale, the user's own attention, gain: decoding calls this often, so nothing else is looked at."""
    _scale(run)
    out = _gain(run, run.delegate(run.call))
    _account(run, None)
    return out


# ------------------------------------------------------------------ before the softmax


def _position(run: Run) -> None:
    for entry in run.plan.of["position"]:
        steps = run.value(entry)
        if steps is None:
            continue
        rotate = run.runtime.rotate
        if rotate is None:
            raise Unsupported(
                f"{entry.method}: {run.runtime.site.name} has no rotary embedding that can be moved; "
                'use positions="real"'
            )
        run.call = replace(run.call, key=rotate(run.call.key, steps))
        run.edited = True
        run.acted.add(entry.owner)


def _extra_keys(run: Run) -> list[Any]:
    found = []
    for entry in run.plan.of["keys"]:
        extra = run.value(entry)
        if extra is not None:
            found.append(extra)
            run.acted.add(entry.owner)
    return found


def _static_patterns(run: Run, extra: list[Any]) -> list[Pattern]:
    """The static patterns that restrict this call, and for scales the number of keys that each row sees."""
    found = []
    for entry in run.plan.of["pattern"]:
        if entry.contribution.dynamic or (entry.contribution.first and not run.call.fresh):
            continue
        pattern = run.value(entry)
        if pattern is not None:
            found.append(fitted(entry.method, run.call, pattern))
            run.acted.add(entry.owner)
            if isinstance(pattern, Blocks):
                run.read.append((entry.owner, *blocks_read(run.call, pattern)))
    if (found or extra) and any(e.contribution.constant is None for e in run.plan.of["scale"]):
        run.call.facts["visible_keys"] = keys_seen(run.call, found, extra)
    return found


def _scale(run: Run) -> Any:
    """Scale the logits of the call; returns the factor, a number or a tensor for (B, H, Lq, 1)."""
    factor: Any = 1.0
    for entry in run.plan.of["scale"]:
        value = run.value(entry)
        if value is None:
            continue
        factor = factor * value
        run.acted.add(entry.owner)
    if isinstance(factor, float) and factor == 1.0:
        return factor
    call = run.call
    bias = None if call.position_bias is None else call.position_bias * factor
    if isinstance(factor, Tensor):
        if call.softcap is not None or call.sink_logits is not None:
            raise Unsupported(
                f"{run.runtime.site.name}: a scale per head or query cannot be combined with "
                "soft-capped logits or learned sinks; use one number"
            )
        query = (call.query.to(call.statistics_dtype) * factor).to(call.query.dtype)
        mask = bias_times(call.mask, factor, *call.shape[3:])
        run.call = replace(call, query=query, mask=mask, position_bias=bias)
        return factor
    if call.sink_logits is not None:
        run.edited = True  # families read their sinks from the module, whatever they are passed
    # c·tanh(s·x/c) times f is (f·c)·tanh((f·s)·x/(f·c)): scaling all three scales the whole logit.
    run.call = replace(
        call,
        mask=bias_times(call.mask, factor, *call.shape[3:]),
        scaling=call.scaling * factor,
        position_bias=bias,
        softcap=None if call.softcap is None else call.softcap * factor,
        sink_logits=None if call.sink_logits is None else call.sink_logits * factor,
    )
    return factor


def _chooses(layer: CompressingLayer | None) -> bool:
    """Whether the method itself says what this layer keeps after the call."""
    return layer is not None and layer.policy.chosen and layer.lease.active


def _wanted(run: Run, layer: CompressingLayer | None) -> set[str]:
    """Statistics that this call has to produce."""
    wanted: set[str] = set()
    scored = None if layer is None else layer.scored_by()
    for entry in run.plan.active:
        state = run.state(entry)
        asked = set(entry.contribution.wanted(run.call, state))
        if "probe_mass" in asked:
            told = scored == "probe_mass" or _chooses(layer)
            cached = entry is not run.plan.evictor or told
            if not (cached and run.probed.ask(entry, run.call, state)):
                asked.remove("probe_mass")
        if asked:
            run.asking.add(entry)
        wanted.update(asked)
    if layer is not None and scored == "column_mass":
        run.times = layer.times(run.call.real, run.call.query.shape[2])
        wanted.add(scored if run.times is None else SAMPLED)
    return wanted


def _ask_groups(run: Run) -> None:
    """The groups of keys whose mass somebody wants to know in this call."""
    for entry in run.plan.active:
        named = entry.contribution.groups
        found = None if named is None else named(run.call, run.state(entry))
        if found is not None:
            run.groups[entry] = found


# ------------------------------------------------------------------ instead of the softmax


def _form(run: Run, entry: Entry) -> Tensor | None:
    """The output by another operator; None where the method leaves this call to the ordinary attention."""
    value = run.value(entry)
    if value is None:
        return None
    run.kernel = entry.method
    run.acted.add(entry.owner)
    if isinstance(value, Formed):
        run.kernel, run.reasons = value.kernel, value.reasons
        return value.output
    out: Tensor = value
    return out


# ------------------------------------------------------------------ after the softmax


def _gain(run: Run, out: Tensor) -> Tensor:
    for entry in run.plan.of["gain"]:
        factor = run.value(entry)
        if factor is None:
            continue
        heads = entry.contribution.heads
        run.acted.add(entry.owner)
        if heads is None:
            out = out * (factor.to(out.dtype) if isinstance(factor, Tensor) else factor)
            continue
        out = out.clone()
        out[:, :, list(heads)] = out[:, :, list(heads)] * (
            factor.to(out.dtype) if isinstance(factor, Tensor) else factor
        )
    return out


def _tiers(run: Run, layer: PackedLayer) -> Tensor | None:
    """Which of the waiting tokens the method wants in the high tier; None where it has no say now."""
    entry = run.plan.quantiser
    if entry is None or not layer.rule.chosen or not layer.due:
        return None
    if not isinstance(layer, ExpandedLayer):
        high: Tensor | None = run.value(entry)
        return high
    # The call is about everything that is held; the method is asked about what waits.
    waiting = layer.keys.shape[2]
    call, found = run.call, run.probed.of(entry)
    if found:
        mass, rows = found["probe_mass"], found["probe_rows"][:, None]
        found = {
            "probe_mass": layer.waiting_columns(mass),
            "probe_rows": layer.waiting_columns(rows)[:, 0],
        }
    for name in ("column_mass", "column_max", "column_entropy"):
        if (whole := getattr(run.stats, name)) is not None:
            found[name] = layer.waiting_columns(whole)
    call = replace(call, key=call.key[:, :, -waiting:], value=call.value[:, :, -waiting:])
    value = entry.contribution.value
    assert value is not None
    tiers: Tensor | None = value(call, replace(run.stats, **found), run.state(entry))
    return tiers


# ------------------------------------------------------------------ bookkeeping


def _account(run: Run, layer: CompressingLayer | None) -> None:
    with run.runtime.counting:
        for owner in run.acted:
            tally = run.runtime.tallies.get(owner)
            if tally is not None:
                tally.acted += 1
        for owner, read, whole in run.read:
            if (tally := run.runtime.tallies.get(owner)) is not None:
                tally.blocks_read, tally.blocks_whole = tally.blocks_read + read, tally.blocks_whole + whole
        for tally in run.runtime.live:
            tally.kernels[run.kernel] += 1
            if run.reasons:
                tally.reasons[run.kernel] = run.reasons
    if layer is None:
        return
    run.runtime.settled = None
    for entry in run.plan.of["kv"]:
        assert isinstance(entry.owner, Lease)
        run.runtime.tallies[entry.owner].hold(layer)
