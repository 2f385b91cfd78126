"""A packing cache layer that settles into buffers of fixed size.

After a prompt the groups of codes are moved into buffers with room for more of them, and the tokens that wait into a
ring beside them (``kernels.quant_kv.fixed``). A step writes its token into the ring, attends to everything as it lies,
and packs the oldest group of a row where one is due; which rows that are is decided on the device. Token n of a row
stands in slot n, so nothing has to say where a token is. See ``freezing`` for when, and for what makes it thaw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.quant_kv import FixedPacked, fixed_packed, packed_decode
from ..seams import Evict, Lease, Quantise, tokens_of
from .freezing import Freezing, thawing
from .packed import PackedLayer
from .store import Store, StoredRun

RING = 32  # tokens more that a ring in a dynamic cache has room for, until it has its whole size
GROWTH = 16  # in a dynamic cache room is made for one group more, or for this part of those there are


class FixedPackedLayer(Freezing, PackedLayer):
    """Packs as its class does, into buffers whose size does not change from step to step.

    A layer in a static cache is frozen from its prompt on, with room for as many tokens as that was made for. One in a
    dynamic cache is frozen after the first step of one token that finds packed ones, so that a prompt alone takes no
    room for later ones. Nor do groups before they are due, and the ring grows with what waits: then buffers are copied
    into larger ones, and code that was compiled for the smaller ones is compiled again.
    """

    _layer_type = None

    def __init__(
        self,
        rule: Quantise,
        packer: Lease,
        policy: Evict | None = None,
        lease: Lease | None = None,
        capacity: int | None = None,
    ):
        self.capacity = capacity
        self.is_compileable = capacity is not None
        PackedLayer.__init__(self, rule, packer, policy, lease)

    def _clear(self) -> None:
        self.fixed: FixedPacked | None = None
        self.ring = 0  # slots that the ring needs in the end
        self.residual: Tensor | None = None  # (B,) int32: newest tokens that are never packed, while frozen
        # Tokens that may have been fed before a dynamic cache needs more groups, and before it needs a longer ring.
        self.until = self.brim = 0
        super()._clear()

    @property
    def store(self) -> Store:
        """The packed runs; thaws, since they stand in buffers while frozen."""
        self.thaw()
        return self._store

    @store.setter
    def store(self, store: Store) -> None:
        self._store = store

    @property
    def owners(self) -> tuple[Lease | None, Lease | None]:
        return None, self.packer

    @staticmethod
    def suits(rule: Quantise, policy: Evict | None, capacity: int | None) -> bool:
        """Whether buffers of a fixed size can hold what these rules keep: whole groups of one precision."""
        return policy is None and rule.group > 0 and not rule.chosen and not rule.start

    # ------------------------------------------------------------------ freezing and thawing

    def freeze(self) -> None:
        if self._unsettled() or not (self.packer.active and self.lengths) or self.counts != self.ages:
            return
        if self.capacity is None and (not self.store.runs or self.seen - self.past > 1):
            return
        if not self._whole_groups():
            return
        if self.tail is None:
            self._locate(self.real_seen())
        group, residuals = self.rule.group, [tokens_of(self.rule.residual, n) for n in self.lengths]
        run = self.store.runs[0] if self.store.runs else None
        filled = run.filled if run is not None else [0] * self._batch()
        waiting = max(a - f * group for a, f in zip(self.ages, filled, strict=True))
        ring = self._ring(max(residuals) + group, waiting)
        if waiting >= ring:
            return  # more wait than a step may find: what was packed when is not known here
        if self.capacity is not None:
            groups = (self.capacity - min(residuals)) // group
        else:
            groups = max(filled)
        # A row may have fewer groups than there is room for, also where longer rows have left the batch.
        stored = 0 if run is None else run.segment.key.shape[2]
        fixed = fixed_packed(
            self.keys, self.values, k_bits=self.rule.k_bits[0], v_bits=self.rule.v_bits[0],
            group=group, groups=max(1, groups, stored), ring=ring,
        )  # fmt: skip
        self._fill(fixed, run, filled)
        # The next token but so many is packed with a group that there is no room for.
        full = fixed.slots - ring + group - 1
        self.until = self.seen + min(full + r - a for r, a in zip(residuals, self.ages, strict=True))
        self.store.runs, self.tail, self.fixed = [], None, fixed
        self.residual = torch.tensor(residuals, dtype=torch.int32, device=fixed.age.device)
        self.keys, self.values = fixed.tail_key, fixed.tail_value
        self._froze(fixed.age)

    def _ring(self, whole: int, waiting: int) -> int:
        """Slots of a ring of which ``whole`` are needed in the end, and ``waiting`` now."""
        self.ring = whole
        ring = whole if self.capacity is not None else min(whole, waiting + RING)
        self.brim = self.seen + ring - waiting
        return ring

    def _whole_groups(self) -> bool:
        """Whether everything that is packed stands in groups as they were made."""
        runs = self.store.runs
        return len(runs) < 2 and all(r.size == self.rule.group and r.segment.index is None for r in runs)

    def _fill(self, fixed: FixedPacked, run: StoredRun | None, filled: list[int]) -> None:
        """Put what is held into empty buffers."""
        if run is not None:
            for name, tensor in run.segment.tensors().items():
                getattr(fixed, name)[:, :, : tensor.shape[2]] = tensor
        fixed.packed.copy_(torch.tensor([f * fixed.size for f in filled]))
        self._fill_ring(fixed)

    def _fill_ring(self, fixed: FixedPacked) -> None:
        """Put what waits behind the codes of each row."""
        assert self.tail is not None
        ring, device, exists = fixed.tail_key.shape[2], fixed.age.device, self.tail >= 0
        fixed.age.copy_(fixed.packed + exists[:, 0].sum(1))
        width = int(exists.sum(2).max())
        order = (~exists).int().argsort(dim=2, stable=True)[:, :, :width]  # those that exist first, in order
        # A row that has fewer tokens fills further slots of the ring, which no counter reaches.
        place = (fixed.packed[:, None, None].long() + torch.arange(width, device=device)) % ring
        place = place.expand_as(order)[..., None]
        for into, held in ((fixed.tail_key, self.keys), (fixed.tail_value, self.values)):
            wide = (*order.shape, held.shape[3])
            into.scatter_(
                2, place.expand(wide), held.detach().gather(2, order[..., None].expand(wide)).to(into.dtype)
            )

    def thaw(self) -> None:
        fixed = self.fixed
        if fixed is None:
            return
        ages, packed = fixed.age.tolist(), fixed.packed.tolist()
        self.fixed = self.residual = None
        self._thaws(ages, list(ages))
        hkv, device = fixed.key.shape[1], fixed.age.device
        filled = [p // fixed.size for p in packed]
        groups = max(filled)
        self.store.runs = []
        if groups:
            segment = fixed.segments()[0].each(lambda t: t[:, :, :groups].clone())
            number = torch.arange(groups * fixed.size, device=device)
            number = torch.where(number < fixed.packed[:, None], number, -1)
            self.store.runs = [StoredRun(0, segment, _per_head(number.to(torch.int32), hkv), filled)]
        # The newest stands last, whatever a row lacks.
        width = max(a - p for a, p in zip(ages, packed, strict=True))
        token = fixed.age[:, None].long() - width + torch.arange(width, device=device)
        self._unroll(fixed, token, token >= fixed.packed[:, None], token)

    def _unroll(self, fixed: FixedPacked, token: Tensor, exists: Tensor, positions: Tensor) -> None:
        """What waits, out of the ring: tokens (B, W) by their number there, which of them exist, and their positions."""
        hkv = fixed.key.shape[1]
        place = (token % fixed.tail_key.shape[2])[:, None, :, None]
        lacks = ~exists[:, None, :, None]

        def waiting(t: Tensor) -> Tensor:
            return t.gather(2, place.expand(-1, hkv, -1, t.shape[3])).masked_fill(lacks, 0)

        self.keys, self.values = waiting(fixed.tail_key), waiting(fixed.tail_value)
        self.tail = _per_head(positions.masked_fill(~exists, -1).to(torch.int32), hkv)

    # ------------------------------------------------------------------ a step

    def steps(self, rows: int, evictor: Any, packer: Any) -> bool:
        if not super().steps(rows, evictor, packer):
            return False
        if self.capacity is not None or (self._seen < self.until and not self._brimful()):
            return True
        if torch.compiler.is_compiling():
            return False  # it thaws, and settles into larger buffers
        # Outside of inference mode, or later calls could not write.
        with torch.inference_mode(False), torch.no_grad():
            self._enlarge()
        assert self.counters is not None
        self.counters.nbytes = self.nbytes
        return True

    def _enlarge(self) -> None:
        """Make room for further groups, or in the ring; only in a dynamic cache, and nothing waits for the device."""
        assert self.fixed is not None
        if self._brimful():
            self._lengthen()
        if self._seen >= self.until:
            more = max(1, self.fixed.key.shape[2] // GROWTH)
            self.fixed = self.fixed.grown(more)
            self.until += more * self.fixed.size

    def _brimful(self) -> bool:
        """Whether the ring may be full before it has its whole size."""
        return self._seen >= self.brim and self.keys.shape[2] < self.ring

    def _lengthen(self) -> FixedPacked:
        assert self.fixed is not None
        held = self.keys.shape[2]
        size = min(self.ring, held + RING)
        self.fixed = self.fixed.longer(size)
        self.keys, self.values = self.fixed.tail_key, self.fixed.tail_value
        self.brim += size - held
        return self.fixed

    @property
    def aged(self) -> Tensor:
        assert self.fixed is not None
        return self.fixed.age

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
        fixed, new = self.fixed, self.new
        assert fixed is not None and new is not None and self.residual is not None
        self.new = None
        if real is None:
            real = self._told(mask)
        if real is not None:
            real = real.expand(query.shape[0])
        out, _ = packed_decode(
            query,
            *new,
            fixed,
            scale=scale,
            softcap=softcap,
            sink_logits=sinks,
            real=real,
            residual=self.residual,
        )
        return out.transpose(1, 2)

    # ------------------------------------------------------------------ what there is

    def _where(self) -> Tensor | None:
        fixed = self.fixed
        if fixed is None:
            return super()._where()
        # Counted, not held.
        ring, packed = fixed.tail_key.shape[2], fixed.packed[:, None]
        codes = torch.arange(fixed.slots - ring, device=packed.device).expand(packed.shape[0], -1)
        number = torch.cat([codes, packed + (torch.arange(ring, device=packed.device) - packed) % ring], 1)
        return _per_head(torch.where(fixed.holds(), number, -1).long(), fixed.key.shape[1])

    @property
    def evicted(self) -> bool:
        return self.fixed is not None or super().evicted

    def _buffers(self) -> list[Tensor]:
        if self.fixed is None or self.residual is None:
            return []
        return [*self.fixed.tensors().values(), self.residual]

    @property
    def nbytes(self) -> int:
        if self.fixed is None:
            return super().nbytes
        return sum(t.untyped_storage().nbytes() for t in self._buffers())

    @property
    def width(self) -> int:
        return super().width if self.fixed is None else int(self.fixed.age.max())


def _per_head(numbers: Tensor, hkv: int) -> Tensor:
    """(B, n) as (B, Hkv, n) of its own."""
    return numbers[:, None].expand(-1, hkv, -1).contiguous()


# What these look at stands in tensors while the layer is frozen.
thawing(FixedPackedLayer, "evict", "finish", "packing", "altered")
