"""Storage of a compressing cache layer: slots that hold kept tokens, and everything that moves them.

Every stored token has a position: how many real tokens its row had before it. Pads and empty slots have
position -1. Until the first eviction ``positions`` is None and the layer holds everything, pads included,
exactly as a stock layer would. A decode step writes the new token into the slot of the token that was
evicted last, so that nothing is moved or copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..seams import State
from . import columns
from .carrier import Carrier
from .held import kept_a_head

NUMBERS = ("lengths", "budgets", "recents", "firsts", "counts", "ages", "pads", "given", "turn")


class Slots(Carrier, DynamicLayer):
    """Shapes: keys, values (B, Hkv, S, D); positions (B, Hkv, S) int32, -1 for empty slots; scores
    (B, Hkv, S) in float32 (float64 for a float64 model); free (B, Hkv), the slot the next token goes to.
    """

    _layer_type = None
    policy: Any
    keys: Any  # a tensor from the first update on; the stock class says Tensor | None
    values: Any
    record_past: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.seen = 0  # tokens fed, pads included: what get_seq_length reports
        self.past = 0  # `seen` before the call under way
        self.states: dict[str, State] = {}
        self.real: Tensor | None = None  # (B, S) until the first eviction: which tokens are not padding
        self.positions: Tensor | None = None
        self.scores: Tensor | None = None
        self.pending: Tensor | None = None  # (B, Hkv, rows, S): scores that crop() may still take back
        self.free: Tensor | None = None  # (B, Hkv): the slot that the next token goes to
        self.lengths: list[int] = []  # real prompt tokens per row, frozen at the first prefill
        self.budgets: list[int] = []
        self.recents: list[int] = []
        self.firsts: list[int] = []
        self.counts: list[int] = []  # real tokens stored, per row; in the fullest head where heads differ
        self.uneven = False  # whether the heads of a row may hold different numbers of tokens
        self.limits: Tensor | None = (
            None  # (B, Hkv) int64: tokens that each may hold, where heads have shared a budget
        )
        self.ages: list[int] = []  # real tokens seen, per row
        self.keep: Tensor | None = None  # (B, S): what a method chose to keep after the call under way
        self.done = False  # whether a prefill has been through the rule
        self.ordered = True  # whether slots are in the order of their positions
        self.pads: list[list[tuple[int, int]]] = []  # runs of padding per row, once positions are known
        self.given: list[list[tuple[int, int]]] = []  # runs of positions per row that are never to go
        self.turn: list[int] = []  # real tokens per row before the prefill in chunks that is under way
        self.deferred = False  # whether the last call was a chunk, after which nothing was decided
        self.idle = 0  # tokens that came since a rule was last active
        self.missed: set[Any] = set()  # leases that were not active when the first tokens came
        self.strayed = False  # whether tokens came that the engine did not attend to
        self.prompt: list[Any] = []  # inputs of a prompt that is to be read a second time
        self.reported: tuple[int, int] | None = None  # (tokens seen, first column) of the mask asked for last

    @property
    def evicted(self) -> bool:
        """Whether anything has been dropped: the storage then holds kept tokens only."""
        return self.positions is not None

    @property
    def width(self) -> int:
        """Tokens that the layer keeps for its longest row; the mean of its heads where those differ."""
        if self.uneven and self.positions is not None:
            return kept_a_head((self.positions >= 0).sum(2))
        return max(self.counts, default=0) if self.evicted else self.seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, positions and scores, from the storages themselves."""
        if not isinstance(self.keys, Tensor) or not isinstance(self.values, Tensor):
            return 0
        held = (self.keys, self.values, *self._beside())
        return sum(t.untyped_storage().nbytes() for t in held if t is not None)

    def _beside(self) -> tuple[Tensor | None, ...]:
        """What is held beside keys and values, with an entry for each token."""
        return self.positions, self.scores, self.pending, self.real

    @property
    def stock_nbytes(self) -> int:
        """Bytes that an unpatched layer would hold for the tokens that this one has seen."""
        if not isinstance(self.keys, Tensor) or not isinstance(self.values, Tensor):
            return 0
        pair = (self.keys, self.values)
        per_token = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in pair)
        return self.seen * per_token

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx.tolist(), lambda t, axis: t.index_select(axis, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = [i for i in range(self._batch()) for _ in range(repeats)] if self.seen else []
        self._rows(rows, lambda t, axis: t.repeat_interleave(repeats, axis))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen == 0:
            return
        rows = torch.arange(self._batch())[indices.cpu()].tolist()
        chosen = torch.tensor(rows, dtype=torch.long)
        self._rows(rows, lambda t, axis: t.index_select(axis, chosen.to(t.device)))

    def offload(self) -> None:
        super().offload()
        self._tensors(lambda t, axis: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        if isinstance(self.keys, Tensor):
            device = self.keys.device
            self._tensors(lambda t, axis: t.to(device, non_blocking=True))

    # ------------------------------------------------------------------ storage

    def _batch(self) -> int:
        return self.keys.shape[0]

    def _ones(self, length: int) -> Tensor:
        return torch.ones(self._batch(), length, dtype=torch.bool, device=self.keys.device)

    def _append(self, key: Tensor, value: Tensor) -> None:
        held, added = (self.keys.shape[2] if self.past else 0), key.shape[2]
        self._states_grow(held, added)
        if held:
            self.keys = torch.cat([self.keys, key], 2)
            self.values = torch.cat([self.values, value], 2)
        else:
            self.keys, self.values = key, value
        if self.positions is not None:
            fresh = self.positions.new_full((*self.positions.shape[:2], added), -1)
            self.positions = torch.cat([self.positions, fresh], 2)
        if self.scores is not None:
            self.scores = torch.nn.functional.pad(self.scores, (0, added))

    def _can_write(self, key: Tensor) -> bool:
        return (
            self.positions is not None
            and key.shape[2] == 1
            and not self.record_past
            and not (torch.is_grad_enabled() and key.requires_grad)
        )

    def _write(self, key: Tensor, value: Tensor) -> None:
        """Put one token into the free slot, making one if there is none."""
        assert self.positions is not None
        if self.free is None:
            width = self.positions.shape[2]
            if any(c == width for c in self.counts):
                self._widen()
            self._find_free()
        assert self.free is not None
        self.ordered = False
        slot = self.free[..., None]
        self.keys.scatter_(2, slot[..., None].expand(*slot.shape, key.shape[-1]), key)
        self.values.scatter_(2, slot[..., None].expand(*slot.shape, value.shape[-1]), value)
        if self.scores is not None:
            self.scores.scatter_(2, slot, 0.0)

        def blank(t: Tensor, batch: int | None, keys: int | None, fill: float) -> Tensor:
            if keys is None:
                return t
            index = (
                slot
                if t.shape[1] == slot.shape[1]
                else slot.repeat_interleave(t.shape[1] // slot.shape[1], 1)
            )
            return t.scatter(2, index, fill)

        self._each(blank)

    def _note_written(self, real: Tensor | None) -> None:
        assert self.positions is not None and self.free is not None
        slot, ages = self.free[..., None], self._rowwise(self.ages)
        if real is None and isinstance(ages, int):
            self.positions.scatter_(2, slot, ages)
        else:
            positions = (torch.zeros_like(slot) + ages).to(self.positions.dtype)
            if real is not None:
                positions = torch.where(real[:, :1, None], positions, -1)
            self.positions.scatter_(2, slot, positions)
        self._grow(real)

    def _note_last(self, positions: Tensor, real: Tensor | None) -> None:
        """Give the tokens just added their places in ``positions``, whose last columns they are."""
        added = self.seen - self.past
        if real is None and len(set(self.ages)) == 1:  # most decode steps
            age = self.ages[0]
            new = torch.arange(age, age + added, device=positions.device) if added > 1 else age
            positions[:, :, -added:] = new
        else:
            ages = torch.tensor(self.ages, device=positions.device)[:, None]
            if real is None:
                new = torch.arange(added, device=positions.device) + ages
            else:
                new = torch.where(real, real.long().cumsum(1) - 1 + ages, -1)
            positions[:, :, -added:] = new[:, None]
        self._grow(real)

    def _grow(self, real: Tensor | None) -> None:
        """Count the tokens just added; ``real`` (B, added): which are no padding, None for all."""
        grown = [self.seen - self.past] * self._batch() if real is None else real.sum(1).tolist()
        self.ages = [a + g for a, g in zip(self.ages, grown, strict=True)]
        self.counts = [c + g for c, g in zip(self.counts, grown, strict=True)]
        if real is not None:
            before = self.pads or [[] for _ in range(self._batch())]
            new = columns.runs(real, self.past)
            self.pads = [columns.joined(a, b) for a, b in zip(before, new, strict=True)]

    def _widen(self) -> None:
        """One more slot for every row and head."""
        assert self.positions is not None

        def pad(t: Tensor, fill: float) -> Tensor:
            shape = list(t.shape)
            shape[2] = 1
            return torch.cat([t, t.new_full(shape, fill)], 2)

        self.keys, self.values = pad(self.keys, 0), pad(self.values, 0)
        self.positions = pad(self.positions, -1)
        if self.scores is not None:
            self.scores = pad(self.scores, 0)
        self._each(lambda t, b, keys, fill: t if keys is None else pad(t, fill))

    def _find_free(self) -> None:
        assert self.positions is not None
        self.free = (self.positions < 0).int().argmax(2)

    def _compact(self) -> None:
        """Back to ascending order, empty slots first and only as many as the longest row leaves."""
        if self.positions is None:
            return
        width = max(self.counts)
        order = self.positions.argsort(dim=2, stable=True)
        if not self.ordered or order.shape[2] != width:
            self._take(order[:, :, order.shape[2] - width :])
        self.free = None

    def _take(self, index: Tensor) -> None:
        """Keep the slots at ``index`` (B, Hkv, W), in fresh storage."""
        assert self.positions is not None
        wide = index[..., None]
        self.keys = torch.gather(self.keys, 2, wide.expand(*index.shape, self.keys.shape[-1]))
        self.values = torch.gather(self.values, 2, wide.expand(*index.shape, self.values.shape[-1]))
        self.positions = torch.gather(self.positions, 2, index)
        if self.scores is not None:
            self.scores = torch.gather(self.scores, 2, index)
        self._states_gather(index)
        self.ordered = True

    def _drop_last(self, count: int) -> None:
        """Take back the newest ``count`` columns."""
        if not self.ordered:
            self._drop_newest(count)
            return
        added = self.pending.shape[2] if self.pending is not None else count
        self.keys, self.values = self.keys[:, :, :-count].clone(), self.values[:, :, :-count].clone()
        self._states_crop(count)
        if self.scores is not None:
            self.scores = self.scores[:, :, :-count]
        if self.pending is not None:
            self.pending = self.pending[:, :, : added - count, :-count]
        if self.real is not None:
            self.real = self.real[:, :-count]
        if self.positions is not None:
            # New tokens stand at the right in every head, also where heads hold different numbers.
            gone = (self.positions[:, 0, -count:] >= 0).sum(1).tolist()
            self.positions = self.positions[:, :, :-count]
            self.ages = [a - g for a, g in zip(self.ages, gone, strict=True)]
            self.counts = [c - g for c, g in zip(self.counts, gone, strict=True)]
        self._shorten(count)

    def _drop_newest(self, count: int) -> None:
        """The same where slots are in no order: by position. Nothing has been dropped since they came."""
        assert self.positions is not None
        pads = self.pads or [[]] * self._batch()
        padding = [
            sum(b - max(a, self.seen - count) for a, b in row if b > self.seen - count) for row in pads
        ]
        self.ages = [a - count + p for a, p in zip(self.ages, padding, strict=True)]
        self.counts = [c - count + p for c, p in zip(self.counts, padding, strict=True)]
        self.positions = self.positions.masked_fill(self.positions >= self._rowwise(self.ages), -1)
        self.free = None
        self._compact()
        self._shorten(count)

    def _shorten(self, count: int) -> None:
        self.seen -= count
        self.idle = max(0, self.idle - count)
        self.pads = [columns.cut(row, self.seen) for row in self.pads]
        if self.positions is not None:
            self.given = [columns.cut(row, age) for row, age in zip(self.given, self.ages, strict=False)]
        elif self.given:
            real = [self.seen] * self._batch() if self.real is None else self.real.sum(1).tolist()
            self.given = [columns.cut(row, age) for row, age in zip(self.given, real, strict=True)]

    def _tensors(self, change: Callable[[Tensor, int], Tensor]) -> None:
        for name in ("real", "positions", "scores", "pending", "free", "limits"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor, 0))
        self._states_batch(change)

    def _rows(self, rows: list[int], change: Callable[[Tensor, int], Tensor]) -> None:
        if self.seen == 0:
            return
        self.keys, self.values = change(self.keys, 0), change(self.values, 0)
        self._tensors(change)
        for name in NUMBERS:
            held = getattr(self, name)
            if held:
                setattr(self, name, [held[i] for i in rows])

    def _locate(self, stored: list[int]) -> None:
        """Give every stored token its position; from here on the layer counts as compressed."""
        length, hkv = self.keys.shape[2], self.keys.shape[1]
        real = self.real if self.real is not None else self._ones(length)
        positions = torch.where(real, real.cumsum(1, dtype=torch.int32) - 1, -1)
        self.positions = positions[:, None].expand(-1, hkv, -1).contiguous()
        self.pads = [] if self.real is None else columns.runs(self.real)
        self.real = None
        self.counts, self.ages = list(stored), list(stored)

    def _rowwise(self, numbers: list[int]) -> Tensor | int:
        """Per-row numbers, broadcastable to (B, Hkv, S); a plain int when all rows agree."""
        if len(set(numbers)) == 1:
            return numbers[0]
        return torch.tensor(numbers, device=self.keys.device)[:, None, None]
