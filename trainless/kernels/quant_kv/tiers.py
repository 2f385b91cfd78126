"""Packed buffers of fixed size in two tiers, between which the attention of the newest token chooses: a decode step.

The ring of the high tier holds what waits. When ``interval`` tokens do, those of them that the newest token gives most
become a group of the high tier, the others one of the low tier: their sizes add up to the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import Terms, statistics_dtype
from ..dispatch import at_once
from .fixed import FixedPacked, Stepping
from .fixed_plain import put
from .format import RAW, channel_root, quantise
from .steps import choosing


class FixedTiers(NamedTuple):
    """B batch rows, Hkv key heads.

    high, low: a group of each is one chunk; the ring is that of ``high``, of ``interval`` slots as soon as so many tokens
    wait. places: positions of their codes, (B, Hkv,
    slots) int32 each. aged (B,) int32: tokens that a row has seen. others: codes that nothing is added to, of any bits
    and sizes; seen: which of their slots hold a token, (B, Hkv, slots) bool, or None for all of them.
    """

    high: FixedPacked
    low: FixedPacked
    places: tuple[Tensor, Tensor]
    aged: Tensor
    others: tuple[FixedPacked, ...] = ()
    seen: tuple[Tensor | None, ...] = ()

    @property
    def sections(self) -> tuple[FixedPacked, ...]:
        return (self.high, self.low, *self.others)

    @property
    def interval(self) -> int:
        return self.high.size + self.low.size


def tiers_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiers: FixedTiers,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Put one token into the ring, attend over all that is held, and pack the rows of which ``interval`` tokens wait.

    query (B, H, 1, D), key (B, Hkv, 1, D), value (B, Hkv, 1, Dv); sink_logits and real as in ``packed_decode``. Returns
    (B, H, 1, Dv) in the dtype of the query. One registered operator, ``trainless::tiers_decode``; on the CPU, where
    nobody looks, what it calls. Nothing waits for the device.
    """
    if at_once(query):
        return decode(query, key, value, tiers, Terms(scale, None, softcap, sink_logits), real)
    buffers = [t for section in tiers.sections for t in section.tensors().values()]
    bits = [n for section in tiers.sections for n in (section.k_bits, section.v_bits)]
    seen = [t for t in tiers.seen if t is not None]
    masked = [n for n, t in enumerate(tiers.seen) if t is not None]
    out: Tensor = tiers_decode_op(
        query,
        key,
        value,
        buffers,
        list(tiers.places),
        tiers.aged,
        seen,
        real,
        sink_logits,
        scale,
        softcap,
        bits,
        masked,
    )
    return out


@torch.library.custom_op("trainless::tiers_decode", mutates_args=("buffers", "places", "aged"))
def tiers_decode_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buffers: Sequence[Tensor],
    places: Sequence[Tensor],
    aged: Tensor,
    seen: Sequence[Tensor],
    real: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    bits: Sequence[int],
    masked: Sequence[int],
) -> Tensor:
    """See ``tiers_decode``: the tensors of all sections, their bits, and which of the others have a ``seen``."""
    high, low, *others = FixedPacked.of(bits, buffers)
    known: dict[int, Tensor] = dict(zip(masked, seen, strict=True))
    tiers = FixedTiers(
        high,
        low,
        (places[0], places[1]),
        aged,
        tuple(others),
        tuple(known.get(n) for n in range(len(others))),
    )
    return decode(query, key, value, tiers, Terms(scale, None, softcap, sinks), real)


@tiers_decode_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def decode(
    query: Tensor, key: Tensor, value: Tensor, tiers: FixedTiers, terms: Terms, real: Tensor | None
) -> Tensor:
    """See ``tiers_decode``."""
    high, wide = tiers.high, statistics_dtype(query)
    if query.is_cuda and any(choosing.on_triton(query, (section,), terms) for section in tiers.sections):
        out, p = _in_parts(query, key, value, tiers, terms, real)
        due = True
    else:
        p = query.new_empty(*query.shape[:2], high.tail_key.shape[2], dtype=wide)
        how = Stepping((None, None, *tiers.seen), real, p, True, tiers.interval, None, tiers.aged)
        out, _, due = choosing.step(query, key, value, tiers.sections, terms, how)
    if due:
        waiting = high.age - high.packed >= tiers.interval
        # Not to pack is no branch on a device.
        if query.is_cuda or bool(waiting.any()):
            pack_chunk(tiers, p, waiting)
    return out


def _in_parts(
    query: Tensor, key: Tensor, value: Tensor, tiers: FixedTiers, terms: Terms, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output and the probabilities of the ring, every section by the form that is best for it."""
    high, sinks = tiers.high, terms.sink_logits
    plain = Terms(terms.scale, None, terms.softcap)
    tiers.aged.add_(1 if real is None else real)
    p = query.new_empty(*query.shape[:2], high.slots, dtype=statistics_dtype(query))
    parts = []
    for number, section in enumerate(tiers.sections):
        how = Stepping((None if number < 2 else tiers.seen[number - 2],))
        k, v = (key, value) if number == 0 else (None, None)
        if number == 0:
            how = how._replace(real=real, scores=p)
        if choosing.on_triton(query, (section,), plain):
            from . import fixed_triton

            parts.append(fixed_triton.decode(query, k, v, section, plain, how.valid[0], how.real, how.scores))
        else:
            parts.append(choosing.step(query, k, v, (section,), plain, how)[:2])
    lse = torch.stack([part for _, part in parts])
    total = torch.logsumexp(lse, 0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(total.dtype).expand_as(total))
    share = torch.exp(lse - total).nan_to_num(0.0)
    out = torch.stack([o.to(share.dtype) for o, _ in parts]).mul_(share[..., None, None]).sum(0)
    return out.to(query.dtype), (p * share[0][..., None])[..., high.slots - high.tail_key.shape[2] :]


def pack_chunk(tiers: FixedTiers, p: Tensor, due: Tensor) -> None:
    """Pack the ring of the rows that are ``due`` (B,), by probabilities p (B, H, ring slots) of the newest token."""
    high, low = tiers.high, tiers.low
    b, hkv, ring, _ = high.tail_key.shape
    if ring < tiers.interval:
        return  # so many cannot wait
    number = torch.arange(ring, device=p.device)
    place = ((high.packed[:, None] + number) % ring)[:, None].expand(b, hkv, ring)

    def ordered(t: Tensor) -> Tensor:
        return t.gather(2, place[..., None].expand(b, hkv, ring, t.shape[3]))

    keys, values = ordered(high.tail_key), ordered(high.tail_value)
    score = p.unflatten(1, (hkv, -1)).sum(2).gather(2, place)
    # The highest first; among equals the newer one.
    best = ring - 1 - score.flip(2).sort(dim=2, descending=True, stable=True).indices
    root = channel_root(values)[:, :, None]
    counted = (tiers.aged[:, None] - ring + number)[:, None].expand(b, hkv, ring)
    for held, start, positions in ((high, 0, tiers.places[0]), (low, high.size, tiers.places[1])):
        chosen = best[:, :, start : start + held.size].sort(dim=2).values
        k, v = (t.gather(2, chosen[..., None].expand(*chosen.shape, t.shape[3])) for t in (keys, values))
        bits = held.k_bits, held.v_bits
        made = quantise(k[:, :, None], v[:, :, None], *bits, root=root if bits[1] < RAW else None)
        groups = held.key.shape[2]
        group = (held.packed // held.size).clamp_max(groups - 1).long()
        for name, new in made.tensors().items():
            put(getattr(held, name), new, group, due)
        put(positions.unflatten(2, (groups, held.size)), counted.gather(2, chosen)[:, :, None], group, due)
        held.packed.add_(due * held.size)
    # What waited is packed: the ring begins anew behind the codes.
    high.age.copy_(torch.where(due, high.packed, high.age))
    low.age.copy_(low.packed)
