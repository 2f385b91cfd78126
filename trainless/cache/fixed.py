"""A compressing cache layer that settles into buffers of fixed size.

A prompt, and every later turn of several tokens, goes the way of ``CompressingLayer``. What stays after it is then
*frozen*: moved into the slots of ``kernels.slots``, one more than the budget, with positions, scores and counters as
tensors beside them. From there on a step of one token writes, attends, scores and evicts in place; no shape and no
branch depends on what the tensors hold, so that a compiler can trace the step whole. Anything else that is asked of
the layer *thaws* it first: it then is a ``CompressingLayer`` again, until the next call freezes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, Unsupported
from ..kernels.common import Terms
from ..kernels.slots import EVERYTHING, FixedSlots, SlotRule, fixed_slots, plain, slot_decode
from ..seams import Evict, Lease
from .compressing import CompressingLayer


class FixedLayer(CompressingLayer):
    """Evicts as its class does, on slots of a number that does not change from step to step.

    capacity: for how many tokens of a sequence a static cache was made, in whose place the layer stands; None in a
    dynamic cache. Such a layer is frozen from its prompt on, one in a dynamic cache once something has gone: until
    then its calls have the bits of stock ones.
    """

    _layer_type = None
    _seen: int

    def __init__(self, policy: Evict, lease: Lease, capacity: int | None = None):
        self.capacity = capacity
        self.is_compileable = capacity is not None
        super().__init__(policy, lease)

    def _clear(self) -> None:
        self.fixed: FixedSlots | None = None
        self.fed: Tensor | None = None  # int64 (): tokens fed so far, while frozen
        self.stepping = False  # whether the call that begins is a step on the slots
        self.new: tuple[Tensor, Tensor] | None = None  # the token of the step under way
        self.whole = False  # whether nothing had gone when it was frozen
        self.frozen_at: tuple[int, list[int]] = (
            0,
            [],
        )  # tokens fed, and ages of the rows, when it was frozen last
        self.unplaced = False  # whether paddings came in steps, whose columns nobody has kept
        super()._clear()

    # ------------------------------------------------------------------ freezing and thawing

    @staticmethod
    def suits(policy: Evict, capacity: int | None) -> bool:
        """Whether what stays under this rule fits into slots whose number is known after the prompt."""
        drawn = policy.chosen or policy.seed is not None
        return not drawn and (capacity is not None or not policy.once)

    def freeze(self) -> None:
        """Settle into slots, now that a call is over and what stays is known; does nothing where that has to wait."""
        remembers = any(state.tensors for state in self.states.values())
        waits = self.record_past or self.deferred or remembers or self.pending is not None or self.unplaced
        if self.fixed is not None or waits or self.strayed or not (self.lease.active and self.budgets):
            return
        if self.keys.requires_grad:
            return
        if self.positions is None:
            if self.capacity is None:
                return
            self._locate(self.real_seen())
        self._compact()
        assert self.positions is not None
        device, policy = self.keys.device, self.policy
        limits = [EVERYTHING] * self._batch() if policy.once else self._limits()
        room = max(limits)
        if policy.once:
            assert self.capacity is not None
            room = max(self.counts) + self.capacity - self.seen
        size = max(room, max(self.counts)) + 1
        rule = self._rule()
        scores = None
        if rule.score is not None:
            scores = self.scores
            if scores is None:
                scores = self.positions.new_zeros(self.positions.shape, dtype=_statistics(self.keys))
        self.fixed = fixed_slots(
            self.keys.detach(), self.values.detach(), self.positions, size,
            age=torch.tensor(self.ages, device=device), limit=torch.tensor(limits, device=device),
            recent=torch.tensor(self.recents, device=device), scores=scores, never=self._never(device),
        )  # fmt: skip
        self.fed = torch.tensor(self.seen, device=device)
        self.keys, self.values = self.fixed.keys, self.fixed.values
        self.positions, self.scores, self.free = self.fixed.positions, self.fixed.scores, None
        self.frozen_at = self.seen, list(self.ages)
        self.whole = self.counts == self.ages
        if self.capacity is not None and device.type == "cuda":
            for tensor in (*self.fixed.tensors().values(), self.fed):
                torch._dynamo.mark_static_address(tensor)

    def _rule(self) -> SlotRule:
        policy = self.policy
        if policy.score is None or policy.once:
            return SlotRule()
        how = "last" if policy.last else "sum"
        return SlotRule(how, policy.gqa, policy.shared, policy.normalise)

    def _never(self, device: torch.device) -> Tensor | None:
        """(B, R, 2): runs of positions that never go."""
        runs = [[(0, first)] if first else [] for first in self.firsts]
        if self.policy.protect:
            runs = [a + list(b) for a, b in zip(runs, self.given, strict=True)]
        most = max(map(len, runs), default=0)
        if not most:
            return None
        return torch.tensor([row + [(0, 0)] * (most - len(row)) for row in runs], device=device)

    def thaw(self) -> None:
        """Back to the state of a layer that decides on the host; waits for the device."""
        fixed = self.fixed
        if fixed is None:
            return
        assert self.fed is not None
        seen = int(self.fed)
        self.fixed = self.fed = None
        self.seen = self.past = seen
        self.counts, self.ages = fixed.count.tolist(), fixed.age.tolist()
        self.positions, self.scores = fixed.positions.long(), fixed.scores
        self.free, self.ordered = None, False
        before, ages = self.frozen_at
        if any(seen - before != age - old for age, old in zip(self.ages, ages, strict=True)):
            self.unplaced = True  # paddings came, and nobody has kept their columns
        self._compact()

    # ------------------------------------------------------------------ a step

    def steps(self, rows: int, lease: Any) -> bool:
        """Whether a call of ``rows`` tokens under the rule of ``lease`` is a step on the slots."""
        return self.fixed is not None and rows == 1 and lease is self.lease

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        fixed = self.fixed
        if fixed is not None and self.stepping:
            assert self.fed is not None
            self.stepping = False
            self.fed.add_(1)
            if self.capacity is None:
                self._seen = self._seen + 1
            self.new = key_states, value_states
            return fixed.keys, fixed.values
        self.thaw()
        if self.capacity is not None and self.seen + key_states.shape[2] > self.capacity:
            raise InputError(
                f"{self.lease.name}: a static cache made for {self.capacity} tokens is given "
                f"{self.seen + key_states.shape[2]}; make it larger"
            )
        return super().update(key_states, value_states, *args, **kwargs)

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
        """The attention (B, 1, H, D) of the step under way, and what goes after it.

        real (B,) bool: rows whose token is no padding; where it is None, what ``mask`` says of the newest column.
        rotate: turns keys by so many positions, for a rule that presents kept tokens as contiguous.
        """
        fixed, new = self.fixed, self.new
        assert fixed is not None and new is not None
        self.new = None
        if real is None:
            real = self._told(mask)
        rule = self._rule()
        if rotate is None or not self.policy.rolled:
            out = slot_decode(
                query, *new, fixed, rule, scale=scale, softcap=softcap, sink_logits=sinks, real=real
            )
            return out.transpose(1, 2)
        plain.write(*new, fixed, real)
        turned = replace(fixed, keys=rotate(fixed.keys, _moved(fixed)))
        out, p = plain.attend(query, turned, Terms(scale, None, softcap, sinks))
        plain.settle(p, fixed, rule, real)
        return out.transpose(1, 2)

    def untouched(self) -> Tensor:
        """Whether, on the device, all that came is still held."""
        assert self.fixed is not None
        return (self.fixed.age == self.fixed.count).all()

    def _told(self, mask: Any) -> Tensor | None:
        if not isinstance(mask, Tensor):
            return None
        if self.capacity is None:
            own = mask[..., -1]
        else:
            assert self.fed is not None
            own = mask.index_select(-1, self.fed[None] - 1)[..., 0]
        shown = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        return shown.flatten(1).any(1) if shown.dim() > 1 else shown

    # ------------------------------------------------------------------ what transformers asks

    @property
    def seen(self) -> int:
        """Tokens fed so far; waits for the device while frozen in a static cache."""
        return self._seen if self.fed is None or self.capacity is None else int(self.fed)

    @seen.setter
    def seen(self, number: int) -> None:
        self._seen = number

    def get_seq_length(self) -> Any:
        """An int, or a tensor while frozen in a static cache, as stock static layers give it."""
        return self._seen if self.fed is None or self.capacity is None else self.fed

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    @property
    def max_cache_len(self) -> int:
        """As a stock static layer names it."""
        return -1 if self.capacity is None else self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.capacity is not None:
            return self.capacity, 0
        if self.fixed is not None:
            if self.standing:
                return self._seen + query_length, 0
            self.thaw()
        return super().get_mask_sizes(query_length)

    @property
    def nbytes(self) -> int:
        held = super().nbytes
        if self.fixed is None:
            return held
        beside = (t for name, t in self.fixed.tensors().items() if name not in ("keys", "values"))
        return held + sum(t.untyped_storage().nbytes() for t in beside)

    @property
    def width(self) -> int:
        return super().width if self.fixed is None else int(self.fixed.count.max())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        fixed = self.fixed
        if fixed is None or beam_idx.shape[0] != self._batch():
            self.thaw()
            super().reorder_cache(beam_idx)
            return
        for tensor in fixed.tensors().values():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        rows = beam_idx.tolist()
        for name in ("lengths", "budgets", "recents", "firsts", "pads", "given"):
            held = getattr(self, name)
            if held:
                setattr(self, name, [held[i] for i in rows])
        self.frozen_at = self.frozen_at[0], [self.frozen_at[1][i] for i in rows]

    def _laid_out(self, offset: int) -> tuple[Tensor, Tensor]:
        if self.unplaced:
            raise Unsupported(
                f"{self.lease.name}: padding came between single tokens of this cache, so what it holds fits no mask of "
                "the model's own; start a new cache"
            )
        return super()._laid_out(offset)


def _moved(fixed: FixedSlots) -> Tensor:
    """(B, Hkv, S): how far each key moves so that kept tokens look contiguous; ``held.shifts`` without the host."""
    empty = fixed.positions < 0
    order = fixed.positions.masked_fill(empty, EVERYTHING).argsort(2)
    place = torch.arange(order.shape[2], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(2, order, place)
    gone = (fixed.age - fixed.count)[:, None, None]
    return (gone - (fixed.positions - rank)).masked_fill(empty, 0)


def _statistics(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _thawed(name: str) -> Callable[..., Any]:
    inherited = getattr(CompressingLayer, name)

    def method(self: FixedLayer, *args: Any, **kwargs: Any) -> Any:
        self.thaw()
        return inherited(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, inherited.__doc__
    return method


# What these look at stands in tensors while the layer is frozen.
for _name in (
    "crop", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch",
    "activate_past_recording", "note", "score", "choose", "settle", "valid", "mask", "shifts", "kept",
    "admissible", "real_seen",
):  # fmt: skip
    setattr(FixedLayer, _name, _thawed(_name))
