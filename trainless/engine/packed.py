"""Attention where the cache holds most keys as codes: the softmax of a call on a layer that packs.

Up to FEW_ROWS query rows meet the codes as they lie, and have their probabilities at hand. More rows (a turn)
meet the packed tokens block by block, dequantised, and their own tokens as ever; the parts are merged by their
log-sum-exp. Statistics over keys count the packed slots first and the columns of the call's own keys last.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cache import PackedLayer
from ..errors import Unsupported
from ..kernels.column_mass import chosen_mass, column_mass
from ..kernels.lse import attention as attention_lse
from ..kernels.quant_kv import blocks, choose, merge, packed_attention, packed_rows, weigh
from ..kernels.spread import Parts, spread
from ..kernels.visibility import Visibility, visibility
from ..seams import Entry, MassMove, RowEdit, Statistics
from .chosen_rows import sampled_mass
from .column_sums import probe
from .extra_keys import merge_extra
from .row_edits import move_edit, on_heads
from .run import FEW_ROWS, Run
from .spread import SPREAD, keep_spread, spread_of_rows, wanted_spread


def packed_softmax(
    run: Run, layer: PackedLayer, extra: list[Any], wanted: set[str], moves: tuple[Entry, ...]
) -> Tensor:
    call = run.call
    _refuse(run)
    run.kernel = f"packed/{choose(call.query, layer.segments, terms=run.terms()).name}"
    if call.query.shape[2] <= FEW_ROWS and not extra:
        return _packed_few(run, layer, wanted, moves)
    out = _packed_many(run, layer, extra, wanted)
    for entry, move in _moves(run, moves):
        out = _packed_edit(run, layer, out, entry, move)
    run.observe()
    return out.to(call.query.dtype).transpose(1, 2).contiguous()


def _refuse(run: Run) -> None:
    where = run.runtime.site.name
    if run.call.dropout:
        raise Unsupported(
            f"{where}: attention dropout is on (training mode) and its cache is packed; "
            "call model.eval() or remove the patch"
        )
    if run.call.position_bias is not None:
        raise Unsupported(f"{where}: its position bias needs every key at its place, and they are packed")
    for entry in run.plan.of["pattern"]:
        asked = entry in run.asking or not entry.contribution.dynamic
        if asked and run.value(entry) is not None:
            raise Unsupported(f"{entry.method}: a pattern over keys that are packed; start a new cache")


def _moves(run: Run, moves: tuple[Entry, ...]) -> list[tuple[Entry, MassMove | RowEdit]]:
    found = [(entry, move) for entry in moves if (move := run.value(entry)) is not None]
    run.acted.update(entry.owner for entry, _ in found)
    return found


# ------------------------------------------------------------------ few rows


def _packed_few(run: Run, layer: PackedLayer, wanted: set[str], moves: tuple[Entry, ...]) -> Tensor:
    call = run.call
    lq = call.query.shape[2]
    out, p, lse = _packed_probabilities(run, layer, 0, lq, "lse" in wanted)
    run.stats = Statistics(lse=lse)
    if "column_mass" in wanted:
        rows = p if call.real is None else p * call.real[:, None, :, None]
        run.stats.column_mass = rows.sum(2)
        if run.adds_up(layer):
            layer.score(run.stats.column_mass, rows if layer.rows_apart() else None)
    if SPREAD & wanted:
        spread_of_rows(run, p, wanted)
    if run.probed.index or run.times is not None:
        seen = None if lq == 1 else visibility(_seen(run, layer, 0, lq), causal=False, lq=lq, lk=p.shape[3])
        probe(run, layer, seen, None, p)
    edits = _moves(run, moves)
    for entry, move in edits:
        edit = move.edit if isinstance(move, RowEdit) else move_edit(move)
        p = on_heads(p, entry.contribution.heads, edit, 0)
    run.observe()
    if edits:
        out = weigh(p, layer.segments).to(call.query.dtype)
    return out.transpose(1, 2).contiguous()


def _packed_probabilities(
    run: Run, layer: PackedLayer, start: int, stop: int, lse: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, probabilities (B, H, rows, slots) and log-sum-exp of the rows start..stop."""
    call = run.call
    return packed_rows(
        call.query[:, :, start:stop], layer.segments, valid=_seen(run, layer, start, stop), lse=lse,
        scale=call.scaling, softcap=call.softcap, sink_logits=call.sink_logits,
    )  # fmt: skip


def _seen(run: Run, layer: PackedLayer, start: int, stop: int) -> Tensor | None:
    """bool (B, Hkv or H, rows, slots): what the rows start..stop see; None for everything."""
    call, valid, packed = run.call, layer.valid(), layer.store.slots
    if valid is None and call.query.shape[2] == 1:
        return None
    own = _tail_visibility(run, layer).rows(start, stop)
    b, hkv = call.query.shape[0], call.key.shape[1]
    held = torch.ones(b, hkv, 1, packed, dtype=torch.bool, device=call.key.device)
    if valid is not None:
        held = valid[:, :, None, :packed]
    if own is None:
        own = torch.ones(1, 1, stop - start, call.key.shape[2], dtype=torch.bool, device=held.device)
    heads = max(hkv, own.shape[1])
    held = held.repeat_interleave(heads // hkv, 1).expand(b, heads, stop - start, packed)
    return torch.cat([held, own.expand(b, heads, stop - start, -1)], 3)


def _tail_visibility(run: Run, layer: PackedLayer) -> Visibility:
    """Which of the tokens that wait each row sees: all that exist, and new ones as the model says."""
    call = run.call
    _, h, hkv, lq, lk = call.shape
    assert layer.tail is not None
    exists = layer.tail >= 0
    same = bool((exists == exists[:, :1]).all())
    mask = call.mask
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = None  # padding, which `exists` knows as well
    if mask is None and same:
        seen = visibility(None, causal=lq > 1, lq=lq, lk=lk, real=call.real, device=call.query.device)
        return seen if bool(exists.all()) else replace(seen, keys=exists[:, 0])
    whole, causal = layer.mask(mask, lq, True)
    if whole is not None and whole.shape[1] not in (1, h):
        whole = whole.repeat_interleave(h // hkv, 1)
    return visibility(whole, causal=causal, lq=lq, lk=lk, real=call.real, device=call.query.device)


# ------------------------------------------------------------------ many rows


def _packed_many(run: Run, layer: PackedLayer, extra: list[Any], wanted: set[str]) -> Tensor:
    call = run.call
    segments, valid = layer.store.segments, layer.valid()
    held = None if valid is None else valid[:, :, : layer.store.slots]
    out, lse = packed_attention(call.query, segments, valid=held, scale=call.scaling, softcap=call.softcap)
    own = _tail_visibility(run, layer)
    near, weight = attention_lse(
        call.query, call.key, call.value, visibility=own, scale=call.scaling, softcap=call.softcap,
        sink_logits=call.sink_logits,
    )  # fmt: skip
    out, lse = merge(out, lse, near.to(lse.dtype), weight)
    if extra:
        out, lse = merge_extra(call, out, lse, extra)
    run.stats = Statistics(lse=lse)
    if "column_mass" in wanted:
        with torch.no_grad():
            parts = [_mass_of(run, key, lse, seen) for key, _, seen, _ in blocks(call.query, segments, held)]
            parts.append(_mass_of(run, call.key, lse, own))
        run.stats.column_mass = torch.cat(parts, 2)
        if run.adds_up(layer):
            layer.score(run.stats.column_mass, _packed_last(run, layer))
    _packed_spread(run, layer, lse, own, held, wanted)
    _packed_probe(run, layer, lse, own, held)
    return out


def _packed_spread(
    run: Run, layer: PackedLayer, lse: Tensor, own: Visibility, held: Tensor | None, wanted: set[str]
) -> None:
    """Largest entries and entropies of rows and keys, block by block."""
    names = wanted_spread(wanted)
    if not names:
        return
    call, whole = run.call, None
    packed = ((key, seen) for key, _, seen, _ in blocks(call.query, layer.store.segments, held))
    with torch.no_grad():
        for key, seen in itertools.chain(packed, [(call.key, own)]):
            part = spread(
                call.query, key, lse, names, visibility=seen, rows=call.real, scale=call.scaling,
                softcap=call.softcap, finish=False,
            )  # fmt: skip
            assert isinstance(part, Parts)
            whole = part if whole is None else whole.beside(part)
    assert whole is not None
    keep_spread(run.stats, whole.finished())


def _mass_of(run: Run, key: Tensor, lse: Tensor, seen: Visibility) -> Tensor:
    call = run.call
    return column_mass(
        call.query, key, lse, visibility=seen, rows=call.real, scale=call.scaling, softcap=call.softcap
    )


def _packed_last(run: Run, layer: PackedLayer) -> Tensor | None:
    """Probabilities of the last rows, where the layer wants them one by one."""
    lq = run.call.query.shape[2]
    if not layer.rows_apart():
        return None
    starts = range(max(0, lq - layer.rows_apart()), lq, FEW_ROWS)
    return torch.cat([_packed_probabilities(run, layer, i, min(lq, i + FEW_ROWS))[1] for i in starts], 2)


def _packed_probe(run: Run, layer: PackedLayer, lse: Tensor, own: Visibility, held: Tensor | None) -> None:
    """Statistics over chosen rows, block by block."""
    call, segments = run.call, layer.store.segments

    def chosen(index: Tensor) -> tuple[Tensor, Tensor]:
        """Mass (B, H, slots) and counts (B, slots) of the rows ``index``."""
        found = [
            chosen_mass(call.query, key, index, visibility=seen, terms=run.terms(), lse=lse)
            for key, _, seen, _ in blocks(call.query, segments, held)
        ]
        found.append(chosen_mass(call.query, call.key, index, visibility=own, terms=run.terms(), lse=lse))
        return torch.cat([m for m, _ in found], 2), torch.cat([n for _, n in found], 1)

    with torch.no_grad():
        for probes, index in run.probed.index.items():
            run.probed.found[probes] = chosen(index)
        if run.times is not None:
            tail = _packed_last(run, layer)
            if tail is not None:
                tail = tail * run.times[:, None, -tail.shape[2] :, None]
            layer.score(sampled_mass(run.times, call, lambda index: chosen(index)[0]), tail)
    evictor = run.plan.evictor
    if run.probed.index and evictor is not None and layer.scored_by() == "probe_mass":
        if mine := run.probed.of(evictor):
            layer.score(mine["probe_mass"], _packed_last(run, layer))


def _packed_edit(run: Run, layer: PackedLayer, out: Tensor, entry: Entry, move: MassMove | RowEdit) -> Tensor:
    """An edit of many rows, FEW_ROWS of them at a time."""
    lq, heads = run.call.query.shape[2], entry.contribution.heads
    edit = move.edit if isinstance(move, RowEdit) else move_edit(move)
    parts = []
    for start in range(0, lq, FEW_ROWS):
        p = _packed_probabilities(run, layer, start, min(lq, start + FEW_ROWS))[1]
        parts.append(weigh(on_heads(p, heads, edit, start), layer.segments))
    whole = torch.cat(parts, 2).to(out.dtype)
    if heads is None:
        return whole
    out = out.clone()
    out[:, list(heads)] = whole[:, list(heads)]
    return out
