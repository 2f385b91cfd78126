"""A layer that packs in two tiers and settles into buffers of fixed size.

For a rule under which a chunk of single tokens goes high or low by the attention of the newest token alone: which ones
do is decided on the device then. Both tiers have groups of their own, ``interval`` tokens make one of each, and the
ring in front of the high ones holds what waits. Chunks of other sizes (a prompt, a turn) stay as they are beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.quant_kv import RAW, FixedPacked, channel_root, fixed_packed, packed_decode, quantise
from ..seams import Evict, Quantise, tokens_of
from .fixed_packed import FixedPackedLayer
from .freezing import statistics
from .store import StoredRun

CHUNKS = 2  # that there is room for beyond those of a prompt, in a dynamic cache, at least
LAST = 1 << 30  # behind any run


class FixedTiersLayer(FixedPackedLayer):
    """Packs in two tiers as ``PackedLayer`` does. ``fixed`` holds the high tier and the ring, ``low`` the other."""

    _layer_type = None

    def _clear(self) -> None:
        self.low: FixedPacked | None = None
        self.others: list[tuple[FixedPacked, StoredRun]] = []  # chunks of other sizes, and their runs
        self.at = [LAST, LAST]  # which of the runs the high and the low tier were
        self.places: tuple[Tensor, Tensor] | None = (
            None  # (B, Hkv, slots) int32: positions of codes, per tier
        )
        self._aged: Tensor | None = None  # (B,) int32: real tokens seen
        super()._clear()

    @staticmethod
    def suits(rule: Quantise, policy: Evict | None, capacity: int | None) -> bool:
        if policy is not None or rule.group or rule.start or rule.residual or not rule.newest:
            return False
        high = tokens_of(rule.high, rule.interval)
        return 0 < high < rule.interval and not 0 < rule.cut < max(high, rule.interval - high)

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a chunk that go high, and low."""
        high = tokens_of(self.rule.high, self.rule.interval)
        return high, self.rule.interval - high

    # ------------------------------------------------------------------ freezing and thawing

    def freeze(self) -> None:
        if self._unsettled() or not (self.packer.active and self.lengths) or self.counts != self.ages:
            return
        if self.capacity is None and (not self.store.runs or self.seen - self.past > 1):
            return
        if any(r.segment.index is not None for r in self.store.runs):
            return
        if self.tail is None:
            self._locate(self.real_seen())
        assert self.tail is not None
        interval, waiting = self.rule.interval, int((self.tail >= 0).sum(2).max())
        if waiting >= interval:
            return
        mine = [
            next((r for r in self.store.runs if (r.tier, r.size) == (tier, size) and _full(r)), None)
            for tier, size in enumerate(self.sizes)
        ]
        filled = [r.filled if r is not None else [0] * self._batch() for r in mine]
        most = max(max(f) for f in filled)
        if self.capacity is not None:
            chunks = (waiting + self.capacity - self.seen) // interval
        else:
            chunks = max(CHUNKS, most // 8)
        self.until = self.seen + (chunks + 1) * interval - 1 - waiting
        tiers, places = [], []
        for tier, (size, run, full) in enumerate(zip(self.sizes, mine, filled, strict=True)):
            stored = 0 if run is None else run.segment.key.shape[2]
            made = fixed_packed(
                self.keys, self.values, k_bits=self.rule.k_bits[tier], v_bits=self.rule.v_bits[tier],
                group=size, groups=max(1, most + chunks, stored), ring=1 if tier else interval,
            )  # fmt: skip
            place = self.tail.new_full((*self.tail.shape[:2], made.slots - made.tail_key.shape[2]), -1)
            if run is not None:
                for name, tensor in run.segment.tensors().items():
                    getattr(made, name)[:, :, : tensor.shape[2]] = tensor
                place[:, :, : run.slots] = run.positions
            made.packed.copy_(torch.tensor([f * size for f in full]))
            made.age.copy_(made.packed)
            tiers.append(made)
            places.append(place)
        others = [(self._apart(run), run) for run in self.store.runs if all(run is not own for own in mine)]
        # The runs come back in this order: slots are counted by it.
        self.at = [next((n for n, r in enumerate(self.store.runs) if r is own), LAST) for own in mine]
        self._fill_ring(tiers[0])
        self._aged = torch.tensor(self.ages, dtype=torch.int32, device=self.tail.device)
        self.residual = torch.zeros_like(self._aged)
        self.store.runs, self.tail, self.high = [], None, None
        self.fixed, self.low = tiers
        self.places, self.others = (places[0], places[1]), others
        self.keys, self.values = self.fixed.tail_key, self.fixed.tail_value
        self._froze(self._aged)

    def _apart(self, run: StoredRun) -> FixedPacked:
        """The codes of a run to which nothing is added; which slots hold a token its positions say."""
        segment = run.segment
        made = fixed_packed(
            self.keys,
            self.values,
            k_bits=segment.k_bits,
            v_bits=segment.v_bits,
            group=run.size,
            groups=1,
            ring=1,
        )
        for name, tensor in segment.tensors().items():
            setattr(made, name, tensor.detach())
        made.packed.fill_(run.slots)
        made.age.fill_(run.slots)
        return made

    def thaw(self) -> None:
        fixed, low, aged = self.fixed, self.low, self._aged
        if fixed is None or low is None or aged is None:
            return
        assert self.places is not None
        places, others = self.places, self.others
        self.fixed = self.low = self.residual = self._aged = self.places = None
        self.others = []
        ages = aged.tolist()
        self._thaws(ages, list(ages))
        self._store.runs = [
            StoredRun(r.tier, held.segments()[0], r.positions, r.filled) for held, r in others
        ]
        tiers = fixed, low
        for tier in sorted((0, 1), key=lambda tier: self.at[tier]):
            held, place = tiers[tier], places[tier]
            filled = (held.packed // held.size).tolist()
            if groups := max(filled):
                segment = held.segments()[0].each(lambda t, n=groups: t[:, :, :n].clone())  # type: ignore[misc]
                positions = place[:, :, : groups * held.size].clone()
                self._store.runs.insert(self.at[tier], StoredRun(tier, segment, positions, filled))
        waits = (fixed.age - fixed.packed)[:, None].long()
        width = int(waits.max())
        # Which of those that wait, from the oldest.
        number = torch.arange(width, device=waits.device) - width + waits
        self._unroll(fixed, fixed.packed[:, None] + number, number >= 0, aged[:, None] - waits + number)

    def _where(self) -> Tensor | None:
        self.thaw()
        return super()._where()

    # ------------------------------------------------------------------ a step

    @property
    def aged(self) -> Tensor:
        assert self._aged is not None
        return self._aged

    def attend(
        self,
        query: Tensor,
        mask: Any,
        *,
        real: Tensor | None = None,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        rotate: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        fixed, low, new, aged = self.fixed, self.low, self.new, self._aged
        assert fixed is not None and low is not None and new is not None and aged is not None
        self.new = None
        if real is None:
            real = self._told(mask)
        b, h, _, _ = query.shape
        if real is not None:
            real = real.expand(b)
        aged.add_(1 if real is None else real)
        p = query.new_empty(b, h, fixed.slots, dtype=statistics(query))
        parts = [
            packed_decode(query, *new, fixed, scale=scale, softcap=softcap, real=real, scores=p),
            packed_decode(query, None, None, low, scale=scale, softcap=softcap),
        ]
        for held, run in self.others:
            seen = torch.nn.functional.pad(run.positions >= 0, (0, 1))
            parts.append(packed_decode(query, None, None, held, scale=scale, softcap=softcap, valid=seen))
        lse = torch.stack([part for _, part in parts])
        total = torch.logsumexp(lse, 0)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(total.dtype).expand_as(total))
        share = torch.exp(lse - total).nan_to_num(0.0)
        out = sum(o.to(share.dtype) * s[..., None, None] for (o, _), s in zip(parts, share, strict=True))
        assert isinstance(out, Tensor)
        due = fixed.age - fixed.packed >= self.rule.interval
        # A compiled step has no branch; elsewhere it costs a look at the counters, which lie in this memory.
        if torch.compiler.is_compiling() or due.is_cuda or bool(due.any()):
            self._pack_chunk(p * share[0][..., None], due)
        return out.to(query.dtype).transpose(1, 2)

    def _pack_chunk(self, p: Tensor, due: Tensor) -> None:
        """Pack the ring of the rows that are ``due``, by probabilities p (B, H, slots) of the newest token."""
        fixed, low = self.fixed, self.low
        assert fixed is not None and low is not None and self.places is not None and self._aged is not None
        b, hkv, ring, _ = fixed.tail_key.shape
        number = torch.arange(ring, device=p.device)
        place = ((fixed.packed[:, None] + number) % ring)[:, None].expand(b, hkv, ring)

        def ordered(t: Tensor) -> Tensor:
            return t.gather(2, place[..., None].expand(b, hkv, ring, t.shape[3]))

        keys, values = ordered(fixed.tail_key), ordered(fixed.tail_value)
        score = p[..., fixed.slots - ring :].unflatten(1, (hkv, -1)).sum(2).gather(2, place)
        # The highest first; among equals the newer one.
        best = ring - 1 - score.flip(2).sort(dim=2, descending=True, stable=True).indices
        root = channel_root(values)[:, :, None]
        counted = (self._aged[:, None] - ring + number)[:, None].expand(b, hkv, ring)
        for tier, (held, start) in enumerate(((fixed, 0), (low, fixed.size))):
            chosen = best[:, :, start : start + held.size].sort(dim=2).values
            k, v = (t.gather(2, chosen[..., None].expand(*chosen.shape, t.shape[3])) for t in (keys, values))
            bits = held.k_bits, held.v_bits
            made = quantise(k[:, :, None], v[:, :, None], *bits, root=root if bits[1] < RAW else None)
            groups = held.key.shape[2]
            group = (held.packed // held.size).clamp_max(groups - 1).long()
            into = [(getattr(held, name), t) for name, t in made.tensors().items()]
            into.append(
                (self.places[tier].unflatten(2, (groups, held.size)), counted.gather(2, chosen)[:, :, None])
            )
            for whole, part in into:
                ones = (1,) * (whole.dim() - 1)
                at = group.view(-1, *ones).expand_as(part)
                whole.scatter_(
                    2, at, torch.where(due.view(-1, *ones), part.to(whole.dtype), whole.gather(2, at))
                )
            held.packed.add_(due * held.size)
        # What waited is packed: the ring begins anew behind the codes.
        fixed.age.copy_(torch.where(due, fixed.packed, fixed.age))
        low.age.copy_(low.packed)

    # ------------------------------------------------------------------ what there is

    def _buffers(self) -> list[Tensor]:
        if self.low is None or self._aged is None or self.places is None:
            return []
        held = [*super()._buffers(), *self.low.tensors().values(), *self.places, self._aged]
        for other, run in self.others:
            held += [*other.tensors().values(), run.positions]
        return held

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        order = beam_idx.tolist()
        for _, run in self.others:
            run.filled = [run.filled[i] for i in order]

    @property
    def width(self) -> int:
        return super().width if self._aged is None else int(self._aged.max())


def _full(run: StoredRun) -> bool:
    """Whether every slot of the groups in use holds a token."""
    held = torch.tensor(run.filled, device=run.positions.device)[:, None, None] * run.size
    unused = torch.arange(run.slots, device=run.positions.device) >= held
    return bool(((run.positions >= 0) | unused).all())
