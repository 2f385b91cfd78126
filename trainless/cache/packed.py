"""The packing cache layer: holds most tokens as codes, the newest ones as they are, by a ``Quantise`` rule.

Slots are counted through the packed runs first, then through the tail of tokens that wait, which ``keys`` and
``values`` hold. An ``Evict`` rule beside it drops slots anywhere: codes are moved, never computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..kernels.quant_kv import RAW, Segment, channel_root, dequantise, raw
from ..seams import Evict, Lease, Quantise, tokens_of
from .columns import placed
from .compressing import CompressingLayer
from .held import with_new
from .store import Store

SLACK = 32  # empty slots that eviction may leave before the rest is moved together


class PackedLayer(CompressingLayer):
    """A cache layer that packs, and evicts if a rule for that is given as well.

    Each rule has a lease of its own. To an attention other than the engine's it hands out all it holds, as numbers.
    """

    def __init__(
        self, rule: Quantise, packer: Lease, policy: Evict | None = None, lease: Lease | None = None
    ):
        super().__init__(policy or Evict(recent=1 << 62), lease or Lease(packer.name))
        self.rule, self.packer = rule, packer

    def _clear(self) -> None:
        super()._clear()
        self.store = Store()
        self.tail: Tensor | None = None  # (B, Hkv, W): positions of the tokens that wait
        self.high: Tensor | None = (
            None  # (B, Hkv, W), while packing: which waiting tokens go to the high tier
        )
        self.loose = False  # whether something was dropped that still takes a slot
        self.began = False  # whether the first prefill is over

    # ------------------------------------------------------------------ what there is

    @property
    def positions(self) -> Tensor | None:
        """(B, Hkv, slots), packed ones first, held as int32; None until something is packed or dropped."""
        return self._where()

    @positions.setter
    def positions(self, positions: Tensor | None) -> None:
        positions = None if positions is None else positions.to(torch.int32)
        packed = self.store.slots if positions is not None else 0
        if positions is not None and packed:
            self.store.place(positions[:, :, :packed])
        self.tail = positions if positions is None or not packed else positions[:, :, packed:].contiguous()

    def _where(self) -> Tensor | None:
        if self.tail is None:
            return None
        whole = torch.cat([*self.store.positions(), self.tail], 2) if self.store.runs else self.tail
        return whole.long()

    @property
    def leases(self) -> set[Lease]:
        return {self.lease, self.packer}

    @property
    def does(self) -> str:
        return "evicts and packs" if self.lease.terms else "packs"

    @property
    def evicted(self) -> bool:
        """Whether slots are no longer columns."""
        return self.tail is not None

    @property
    def packed(self) -> bool:
        """Whether the attention is given the tail only, and finds the rest in ``segments``."""
        return bool(self.store.runs)

    @property
    def segments(self) -> list[Segment]:
        """Everything held, the tail last."""
        return [*self.store.segments, raw(self.keys, self.values)]

    @property
    def slots(self) -> int:
        return self.store.slots + self.keys.shape[2]

    @property
    def width(self) -> int:
        if self.tail is None:
            return self.seen
        return super().width if self.uneven else max(self.counts, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of every storage that is held: codes, parameters, what waits, positions and scores."""
        return super().nbytes + self.store.nbytes

    def _beside(self) -> tuple[Tensor | None, ...]:
        return self.tail, self.scores, self.pending, self.real

    def valid(self) -> Tensor | None:
        if self.tail is None or (not self.uneven and all(c == self.slots for c in self.counts)):
            return None
        positions = self.positions
        assert positions is not None
        return positions >= 0

    def mask(self, mask: Any, rows: int, causal: bool) -> tuple[Tensor | None, bool]:
        """As for any compressed storage, about the tail only."""
        assert self.tail is not None
        exists = self.tail >= 0
        if mask is None and bool(exists.all()):
            return None, causal or rows > 1
        if rows == 1:
            return exists[:, :, None], False
        return with_new(exists[:, :, :-rows], mask, rows, self.seen), False

    # ------------------------------------------------------------------ a call

    def note(self, real: Tensor | None) -> None:
        if self.tail is None:
            super().note(real)
        else:
            self._note_given(real)
            self._note_last(self.tail, real)

    @property
    def due(self) -> bool:
        """Whether the call under way ends with tokens being packed (at crop(), while drafts are recorded)."""
        return self.packer.active and not self.packer.deferring and any(map(any, self._numbers()))

    def packing(self) -> Tensor:
        """(B, Hkv, W) bool: which of the waiting tokens are about to be packed: the oldest that exist."""
        waits = self._waits()
        return self._oldest(waits, self._numbers())

    @staticmethod
    def _oldest(waits: Tensor, numbers: list[list[int]]) -> Tensor:
        number = torch.tensor(numbers, device=waits.device)[..., None]
        return waits & (waits.long().cumsum(2) <= number)

    def rebind(self, evictor: Lease | None, packer: Lease | None, policy: Evict | None, rule: Any) -> bool:
        if packer is None or rule != self.rule or not self._comes_back(self.packer, packer):
            return False
        if evictor is not None and (policy != self.policy or not self._comes_back(self.lease, evictor)):
            return False
        if evictor is None and self.lease.terms:
            return False  # another rule dropped tokens here
        self.packer, self.lease = packer, evictor or self.lease
        return True

    def altered(self) -> set[Lease]:
        return super().altered() | ({self.packer} if self.store.runs else set())

    def settle(self) -> set[Lease]:
        """Evict, then pack, now that the call is over."""
        return super().settle() | self.finish(None)

    def evict(self) -> set[Lease]:
        """The first half of ``settle``: what goes is marked, and no slot changes its place yet."""
        return super().settle()

    def finish(self, high: Tensor | None) -> set[Lease]:
        """The second half: pack what is due; ``high`` (B, Hkv or 1, W): tokens for the high tier (None: all)."""
        if self.record_past or self.packer.deferring or self.lease.deferring or self.waits:
            return set()
        if high is not None:
            self.high = high.expand(self._batch(), self.keys.shape[1], -1).to(self.keys.device)
        self._tidy()
        return {self.packer} if self.packer.active and self._pack() else set()

    def activate_past_recording(self) -> None:
        """From now on pack, too, only at crop()."""
        if self.rule.chosen and self.packer.active:
            raise Unsupported(
                f"{self.packer.name}: it chooses by attention which tokens are held precisely, and drafts that are "
                "taken back would have had a say; do without assisted decoding"
            )
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        count = -tokens_to_remove
        if self.is_initialized and self.keys.shape[2] < count <= self.seen:
            raise Unsupported(
                f"crop({tokens_to_remove}): only the {self.keys.shape[2]} newest tokens are not packed yet; call "
                "cache.activate_past_recording() before the forward whose tokens you may crop"
            )
        super().crop(tokens_to_remove)
        if self.is_initialized and self.seen:
            self._tidy()
            if self.packer.active:
                self._pack()

    # ------------------------------------------------------------------ packing

    def _waits(self) -> Tensor:
        """(B, Hkv, W): slots of the tail that hold a token."""
        if self.tail is not None:
            return self.tail >= 0
        real = self.real if self.real is not None else self._ones(self.keys.shape[2])
        return real[:, None].expand(-1, self.keys.shape[1], -1)

    def _numbers(self) -> list[list[int]]:
        """How many tokens each row and head are to pack now."""
        hkv = self.keys.shape[1]
        even = not self.uneven and self.counts == self.ages
        whole = even and not any(self.pads) and self.real is None
        if whole and not self.lease.active:
            # Nobody evicts and nothing is padding: all that stands in the tail waits.
            waiting = [[self.keys.shape[2]] * hkv] * self._batch()
        else:
            waiting = self._waits().sum(2).tolist()
        lengths = self.lengths or [max(row) for row in waiting]
        found = []
        for row, length in zip(waiting, lengths, strict=True):
            residual = tokens_of(self.rule.residual, length)
            numbers = [self.rule.packs(w, residual, not self.began) for w in row]
            if length < self.rule.start:
                numbers = [0] * hkv
            elif not self.rule.group and any(numbers):
                # The heads of a row have their chunks at the same time, also where eviction left some fewer tokens.
                numbers = [max(0, w - residual) for w in row]
            found.append(numbers)
        return found

    @torch.no_grad()
    def _pack(self) -> bool:
        numbers = self._numbers()
        if not self.lengths:
            self._freeze()
        self.began = True
        if not any(map(any, numbers)):
            self.high = None
            return False
        if self.tail is None:
            self._locate([self.seen] * self._batch() if self.real is None else self.real.sum(1).tolist())
        assert self.tail is not None
        chosen = self._oldest(self.tail >= 0, numbers)
        packed = self.store.slots
        number = torch.arange(self.slots, device=self.tail.device)
        number = number.expand(*self.tail.shape[:2], -1)
        ids, start = [], 0
        for run in self.store.runs:
            ids.append(number[:, :, start : start + run.slots])
            start += run.slots
        new = number[:, :, packed:]
        high = chosen if self.high is None else chosen & self.high
        keys, values = self.keys.detach(), self.values.detach()
        # Without groups a chunk has one divisor per channel, whatever tier its tokens go to.
        root = None if self.rule.group else channel_root(values, chosen)[:, :, None]
        for tier, mine in enumerate((high, chosen & ~high)):
            bits = self.rule.k_bits[tier], self.rule.v_bits[tier]
            self.store.add(
                tier, bits, self.rule.size, keys, values, self.tail, mine, ids, new,
                root if bits[1] < RAW else None,
            )  # fmt: skip
        left = self._keep_tail((self.tail >= 0) & ~chosen)
        self._follow(torch.cat([*ids, new.gather(2, left)], 2))
        self.high = None
        return True

    def _keep_tail(self, keep: Tensor) -> Tensor:
        """Keep the waiting tokens ``keep`` (B, Hkv, W), in their order, in fresh storage; returns their slots."""
        assert self.tail is not None
        counts = keep.sum(2)
        width = int(counts.max()) if counts.numel() else 0
        # The kept ones stand last, so that the newest is at the right whatever a row lacks.
        order = keep.int().argsort(dim=2, stable=True)[:, :, keep.shape[2] - width :]
        empty = torch.arange(width, device=keep.device) < width - counts[..., None]
        wide = order[..., None]
        self.keys = self.keys.gather(2, wide.expand(*order.shape, self.keys.shape[3]))
        self.values = self.values.gather(2, wide.expand(*order.shape, self.values.shape[3]))
        if bool(empty.any()):
            self.keys = self.keys.masked_fill(empty[..., None], 0)
            self.values = self.values.masked_fill(empty[..., None], 0)
        self.tail = self.tail.gather(2, order).masked_fill(empty, -1)
        if self.high is not None:
            self.high = self.high.gather(2, order)
        return order

    def _follow(self, index: Tensor) -> None:
        """Scores and states go where the slots went: ``index`` (B, Hkv, new slots) into the old ones."""
        if self.scores is not None:
            self.scores = self.scores.gather(2, index)
        self._states_gather(index)

    # ------------------------------------------------------------------ storage

    def _append(self, key: Tensor, value: Tensor) -> None:
        held, added = (self.keys.shape[2] if self.past else 0), key.shape[2]
        self._states_grow(self.store.slots + held, added)
        if held:
            self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        else:
            self.keys, self.values = key, value
        if self.tail is not None:
            self.tail = torch.cat([self.tail, self.tail.new_full((*self.tail.shape[:2], added), -1)], 2)
        if self.scores is not None:
            self.scores = torch.nn.functional.pad(self.scores, (0, added))

    def _can_write(self, key: Tensor) -> bool:
        return False

    def _compact(self) -> None:
        """Holes stay until there are SLACK of them."""

    def _grouped(self, mass: Tensor) -> Tensor:
        positions = self.positions
        if not self.policy.shared or positions is None:
            return super()._grouped(mass)
        # Tiers may put a token into different slots in different heads: they are averaged by token.
        mine = mass.unflatten(1, (self.keys.shape[1], -1)).mean(2)
        order = positions.argsort(dim=2, stable=True)[:, :, None].expand_as(mine)
        found = mine.gather(3, order).mean(1, keepdim=True).expand_as(mine)
        return torch.empty_like(mine).scatter_(3, order, found)

    def _keep_only(self, keep: Tensor, after: list[int]) -> None:
        positions = self.positions
        assert positions is not None
        self.positions, self.counts, self.loose = positions.masked_fill(~keep, -1), after, True

    def _select(self) -> None:
        best, surplus, after = self._best()
        positions = self.positions
        assert positions is not None
        self._keep_only(torch.zeros_like(positions, dtype=torch.bool).scatter_(2, best, ~surplus), after)

    def _take(self, index: Tensor) -> None:
        """What is not to be kept has no position any more: ``_tidy`` moves the rest together."""
        self.loose = True

    def _blank(self) -> None:
        """Empty slots hold finite numbers and are masked; ``_tidy`` clears them."""

    def _tidy(self) -> None:
        """Move slots together once more than SLACK of them are empty."""
        positions = self.positions
        if not self.loose or positions is None:
            return
        self.loose = False
        if self.store.runs and self.slots - max(self.counts) <= SLACK:
            return
        keep, packed = positions >= 0, self.store.slots
        index = self.store.drop(keep[:, :, :packed])
        self._follow(torch.cat([index, self._keep_tail(keep[:, :, packed:]) + packed], 2))

    def _tensors(self, change: Any) -> None:
        for name in ("real", "scores", "pending", "tail", "limits"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor, 0))
        self.store.each(lambda t: change(t, 0))
        self._states_batch(change)

    def _rows(self, rows: list[int], change: Any) -> None:
        super()._rows(rows, change)
        self.store.reorder(rows)

    # ------------------------------------------------------------------ without the engine

    def _laid_out(self, offset: int) -> tuple[Tensor, Tensor]:
        positions = self.positions
        if positions is None:
            return self.keys, self.values
        both = [dequantise(s, 0, s.slots, self.keys.dtype) for s in self.segments if s.slots]
        full = torch.cat([k for k, _ in both], 2), torch.cat([v for _, v in both], 2)
        return placed(self, positions, full, offset)
