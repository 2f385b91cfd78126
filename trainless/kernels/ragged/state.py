"""The buffers of a cache whose heads hold different numbers of tokens.

The key heads of all rows stand one behind the other in flat storage, each in a piece of its own length. Such a piece is
what ``kernels.slots`` calls the slots of a row with one key head, and a step means the same there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..slots import EVERYTHING, FixedSlots
from ..tickets import TICKETS

PAGE = 16  # slots by which the piece of a head grows: it has fewer than a page more than it was asked to have


@dataclass
class RaggedSlots:
    """Slots of one layer. B rows, Hkv key heads, L = B · Hkv lanes, N slots in all.

    keys (N, D), values (N, Dv), positions (N,) int32, scores (N,) float32 (float64 of a float64 model) or None: as in
    ``FixedSlots``, lane after lane. sizes: slots of each lane, whole pages; starts (L,) int64: where each begins.
    free, age, count, limit, recent (L,) int32: as there, for each lane. never (L, R, 2) int32 or None. rows: B.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    starts: Tensor
    sizes: list[int]
    free: Tensor
    age: Tensor
    count: Tensor
    limit: Tensor
    recent: Tensor
    tickets: Tensor
    rows: int
    scores: Tensor | None = None
    never: Tensor | None = None

    @property
    def heads(self) -> int:
        return len(self.sizes) // self.rows

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors().values())

    def lane(self, number: int) -> FixedSlots:
        """One lane as the slots of one row with one key head: views, so that what is written there is written here."""
        start = sum(self.sizes[:number])
        piece = slice(start, start + self.sizes[number])
        one = slice(number, number + 1)

        def slots(t: Tensor) -> Tensor:
            return t[piece][None, None]

        return FixedSlots(
            slots(self.keys), slots(self.values), slots(self.positions), self.free[one][None], self.age[one],
            self.count[one], self.limit[one], self.recent[one], self.tickets[one][None],
            None if self.scores is None else slots(self.scores), None if self.never is None else self.never[one],
        )  # fmt: skip

    def full(self) -> bool:
        """Whether a lane has no room for another token; waits for the device."""
        sizes = torch.tensor(self.sizes, device=self.count.device)
        return bool((self.count >= torch.minimum(self.limit + 1, sizes - 1)).any())

    def grown(self, room: int) -> RaggedSlots:
        """The same with room for at least so many tokens more in every lane."""
        pieces = [self.lane(n) for n in range(len(self.sizes))]
        sizes = [pages(int(c) + room) for c in self.count.tolist()]

        def wider(name: str, fill: float) -> Tensor:
            parts = []
            for piece, size in zip(pieces, sizes, strict=True):
                held = getattr(piece, name)[0, 0][: min(size, piece.size)]
                more = held.new_full((size - held.shape[0], *held.shape[1:]), fill)
                parts += [held, more]
            return torch.cat(parts)

        positions = wider("positions", -1)
        made = RaggedSlots(
            wider("keys", 0), wider("values", 0), positions, _starts(sizes, positions.device), sizes, self.free.clone(),
            self.age, self.count, self.limit, self.recent, self.tickets, self.rows,
            None if self.scores is None else wider("scores", 0), self.never,
        )  # fmt: skip
        for n in range(len(sizes)):
            lane = made.lane(n)
            lane.free.copy_((lane.positions < 0).int().argmax(2))
        return made


def pages(tokens: int) -> int:
    """Slots for so many tokens and one that stays empty, in whole pages."""
    return -(-(tokens + 1) // PAGE) * PAGE


def _starts(sizes: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
    return ends[:-1].to(device)


def ragged_slots(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    age: Tensor,
    limit: Tensor | None = None,
    room: int = 0,
    recent: Tensor | None = None,
    scores: Tensor | None = None,
    never: Tensor | None = None,
) -> RaggedSlots:
    """Buffers that hold what is given: keys (B, Hkv, W, D), values (B, Hkv, W, Dv), positions (B, Hkv, W), -1 for none.

    age (B,): real tokens that each row has seen. limit (B, Hkv): tokens that each head holds after a step at most, for
    which there is room then; None: nothing goes, and there is room for ``room`` tokens more. recent (B,), scores
    (B, Hkv, W), never (B, R, 2) as for ``fixed_slots``. Everything is copied. Waits for the device. Raises InputError
    where shapes do not fit.
    """
    b, hkv, width = positions.shape
    if keys.shape[:3] != (b, hkv, width) or values.shape[:3] != (b, hkv, width):
        raise InputError(
            f"ragged slots: keys {tuple(keys.shape)}, values {tuple(values.shape)} and positions "
            f"{tuple(positions.shape)} do not fit each other"
        )
    device, lanes = keys.device, b * hkv
    there = positions >= 0
    counts = there.sum(2).view(-1)
    most = counts + room if limit is None else torch.maximum(counts, limit.view(-1).to(device))
    sizes = [pages(n) for n in most.tolist()]
    # What is held, head by head in the order of its slots, then empty ones.
    chosen = [at.nonzero()[:, 0] for at in there.view(lanes, width)]

    def flat(t: Tensor, fill: float, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.full((sum(sizes), *t.shape[3:]), fill, dtype=dtype or t.dtype, device=device)
        start = 0
        for lane, (at, size) in enumerate(zip(chosen, sizes, strict=True)):
            made[start : start + len(at)] = t.flatten(0, 1)[lane, at]
            start += size
        return made

    def lanewise(t: Tensor) -> Tensor:
        wide = t.to(device)[:, None].expand(b, hkv) if t.dim() == 1 else t.to(device)
        return wide.reshape(-1).clamp_max(EVERYTHING).to(torch.int32).contiguous().clone()

    return RaggedSlots(
        flat(keys.detach(), 0), flat(values.detach(), 0), flat(positions, -1, torch.int32), _starts(sizes, device), sizes,
        counts.to(torch.int32), lanewise(age), counts.to(torch.int32),
        lanewise(torch.full((b,), EVERYTHING) if limit is None else limit),
        lanewise(torch.zeros(b, dtype=torch.int64) if recent is None else recent),
        torch.zeros(lanes, TICKETS, dtype=torch.int32, device=device), b,
        None if scores is None else flat(scores, 0),
        None if never is None else never.to(device, torch.int32).repeat_interleave(hkv, 0).contiguous(),
    )  # fmt: skip


def padded(slots: RaggedSlots) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(keys (B, Hkv, W, D), values, positions (B, Hkv, W) int64, scores or None) of all that the lanes hold."""
    width = max(slots.sizes)

    def whole(t: Tensor, fill: float) -> Tensor:
        made = t.new_full((len(slots.sizes), width, *t.shape[1:]), fill)
        start = 0
        for lane, size in enumerate(slots.sizes):
            made[lane, :size] = t[start : start + size]
            start += size
        return made.unflatten(0, (slots.rows, slots.heads))

    positions = whole(slots.positions, -1).long()
    empty = (positions < 0)[..., None]
    keys, values = (whole(t, 0).masked_fill(empty, 0) for t in (slots.keys, slots.values))
    return keys, values, positions, None if slots.scores is None else whole(slots.scores, 0)
