"""What the cache layers have in common that settle into buffers of fixed size: when they do, and when they thaw.

A prompt, and every later turn of several tokens, goes the way of ``CompressingLayer``. Then the layer is *frozen*:
moved into buffers that keep their size and address, with its counters as tensors beside them. From there on a step of
one token writes, attends and settles in place; no shape and no branch depends on what the tensors hold, so that a
compiler can trace the step whole. Anything else that is asked of the layer *thaws* it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, Unsupported
from ..kernels.draws import lots
from ..kernels.slots import SlotRule
from ..kernels.turning import Rotates
from ..kernels.visibility import shown_at
from ..seams import Lease
from .compressing import CompressingLayer
from .held import kept_a_head


@dataclass
class Counters:
    """What a frozen layer has seen and holds, to be read when somebody asks.

    fed (): tokens fed; held (B,): tokens that each row holds, or (B, Hkv) each of its heads; nbytes: of all buffers;
    per_token: bytes of a token in an unpatched layer.
    """

    fed: Tensor
    held: Tensor
    nbytes: int
    per_token: int

    @property
    def seen(self) -> int:
        return int(self.fed)

    @property
    def width(self) -> int:
        return kept_a_head(self.held) if self.held.dim() == 2 else int(self.held.max())

    @property
    def stock_nbytes(self) -> int:
        return self.seen * self.per_token


class Freezing(CompressingLayer):
    """A layer with buffers, which its subclasses make, fill and step on.

    capacity: for how many tokens of a sequence a static cache was made, in whose place the layer stands; None in a
    dynamic cache.
    """

    _layer_type = None
    settles_uneven = False  # whether its buffers can hold heads with different numbers of tokens
    capacity: int | None
    fed: Tensor | None  # int64 (): tokens fed so far, while frozen
    _seen: int
    _fed_here: int  # tokens fed, as far as the host knows, while frozen in a static cache

    def _clear(self) -> None:
        self.fed = None
        self.counters: Counters | None = None  # of the buffers that it froze into last
        self.stepping = False  # whether the call that begins is a step on the buffers
        self.new: tuple[Tensor, Tensor] | None = None  # the token of the step under way
        # Tokens fed, and ages of the rows, when it was frozen last.
        self.frozen_at: tuple[int, list[int]] = (0, [])
        self.unplaced = False  # whether paddings came in steps, whose columns nobody has kept
        self.shown: Tensor | None = (
            None  # (B,): columns that the mask of the last step has shown; None before the first
        )
        self.whole = False  # whether its steps may change nothing yet: see ``untouched``
        super()._clear()

    # ------------------------------------------------------------------ what a subclass says

    @property
    def owners(self) -> tuple[Lease | None, Lease | None]:
        """Whose rule evicts here, and whose packs."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Settle into buffers, now that a call is over; does nothing where that has to wait."""
        raise NotImplementedError

    def thaw(self) -> None:
        """Back to the state of a layer that decides on the host; waits for the device."""
        raise NotImplementedError

    def attend(
        self,
        query: Tensor,
        mask: Any,
        *,
        real: Tensor | None = None,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        rotate: Rotates | None = None,
    ) -> Tensor:
        """The attention (B, 1, H, D) of the step under way, and what goes after it.

        real (B,) bool: rows whose token is no padding; where it is None, what ``mask`` says of the newest column.
        rotate: the model's rotation, for a rule that presents kept tokens as contiguous.
        """
        raise NotImplementedError

    def untouched(self) -> Tensor:
        """Whether, on the device, all that came is still held as it came; asked only of a layer that is ``whole``."""
        raise NotImplementedError

    def refuse_hidden(self, padding: Tensor) -> None:
        """Unsupported if a 2-D mask (B, seen) hides a token that an earlier one has shown; waits for the device."""
        padding, shown = padding.bool(), self.shown
        if shown is None:
            shown = torch.tensor(self.frozen_at[1], device=padding.device)
        # A row whose newest token is padding says nothing of what it sees.
        if bool(((padding[:, :-1].sum(1) < shown) & padding[:, -1]).any()):
            raise Unsupported(
                f"{self.lease.name}: a mask hides earlier tokens which were no padding when they came, and the cache has "
                "dropped or packed keys; start a new cache, or give attention_mask=1 for them (generate() without one "
                "takes every pad token in the text for padding)"
            )
        self.shown = padding.sum(1)

    @property
    def aged(self) -> Tensor:
        """(B,): real tokens seen, on the device, while frozen."""
        raise NotImplementedError

    def check_shown(self, mask: Any) -> None:
        """In compiled code, what ``refuse_hidden`` is outside of it: a check on the device, a RuntimeError there.

        mask: of the step under way, before its token has been counted; anything but a tensor hides nothing.
        """
        newest = self._told(mask)
        if newest is None:
            return
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        columns = shown if shown.dim() == 2 else shown.flatten(1, -2).any(1)
        earlier = columns.sum(1, dtype=torch.int32) - newest.int()
        torch._assert_async(
            ((earlier >= self.aged) | ~newest).all(),
            f"{self.lease.name}: a mask hides earlier tokens which were no padding when they came, and the cache is one "
            "that drops or packs keys; start a new cache, or show them",
        )

    def _buffers(self) -> Sequence[Tensor]:
        """Every tensor that is held while frozen, the batch first in each."""
        raise NotImplementedError

    # ------------------------------------------------------------------ freezing and thawing

    def _unsettled(self) -> bool:
        """Whether the layer cannot settle now, whatever its rule is."""
        remembers = any(state.tensors for state in self.states.values())
        waits = self.record_past or self.deferred or remembers or self.pending is not None or self.unplaced
        uneven = self.uneven and not self.settles_uneven
        return self.fed is not None or waits or self.strayed or self.keys.requires_grad or uneven

    def _froze(self, held: Tensor) -> None:
        """The buffers are filled: count tokens on the device from now on. held (B,): those that each row holds."""
        per_token = self.stock_nbytes // max(1, self.seen)
        self.fed = torch.tensor(self.seen, device=self.keys.device)
        self.counters = Counters(self.fed, held, self.nbytes, per_token)
        self.shown = None
        self._fed_here = self.seen
        self.frozen_at = self._fed_here, list(self.ages)
        if self.capacity is not None and self.keys.is_cuda:
            for tensor in (*self._buffers(), self.fed):
                torch._dynamo.mark_static_address(tensor)

    def _thaws(self, ages: list[int], counts: list[int]) -> None:
        """The host knows the numbers again."""
        assert self.fed is not None
        seen, self.fed = int(self.fed), None
        self.seen = self.past = seen
        self.ages, self.counts = ages, counts
        before, old = self.frozen_at
        if any(seen - before != age - own for age, own in zip(ages, old, strict=True)):
            self.unplaced = True  # paddings came, and nobody has kept their columns

    def _rule(self) -> SlotRule:
        policy = self.policy
        if policy.seed is not None:
            return SlotRule("draw")
        if policy.score is None or policy.once:
            return SlotRule()
        how = "last" if policy.last else "sum"
        return SlotRule(how, policy.gqa, policy.shared, policy.normalise)

    def _lots(self) -> Tensor | None:
        """(Hkv,): by which a rule that draws tells its heads apart."""
        if self.policy.seed is None:
            return None
        return lots(self.policy.seed, torch.arange(self.keys.shape[1], device=self.keys.device))

    def _never(self, device: torch.device) -> Tensor | None:
        """(B, R, 2): runs of positions that never go."""
        runs = [[(0, first)] if first else [] for first in self.firsts]
        if self.policy.protect:
            runs = [a + list(b) for a, b in zip(runs, self.given, strict=True)]
        most = max(map(len, runs), default=0)
        if not most:
            return None
        return torch.tensor([row + [(0, 0)] * (most - len(row)) for row in runs], device=device)

    # ------------------------------------------------------------------ a step

    def steps(self, rows: int, evictor: Any, packer: Any) -> bool:
        """Whether a call of ``rows`` tokens under the rules of these leases is a step on the buffers."""
        if self.fed is None or rows != 1:
            return False
        if not torch.compiler.is_compiling() and self.fed.is_inference() > torch.is_inference_mode_enabled():
            return False  # buffers made under inference_mode can be written there only
        mine = self.owners
        return evictor is mine[0] and packer is mine[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.fed is not None and self.stepping:
            self.stepping = False
            if self.capacity is not None and not torch.compiler.is_compiling():
                self._count_step()
            self.fed.add_(1)
            if self.capacity is None:
                self._seen = self._seen + 1
            # Under autocast single tokens may come in another dtype than the prompt.
            self.new = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
            return self.keys, self.values
        self.thaw()
        self._check_room(self.seen + key_states.shape[2])
        served = self.expected
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if served or self.capacity is None:
            return keys, values
        # No patch is around this call: the model's own mask has a column for every slot of a static layer.
        after = (0, 0, 0, self.capacity - keys.shape[2])
        return torch.nn.functional.pad(keys, after), torch.nn.functional.pad(values, after)

    def _count_step(self) -> None:
        """One more token in a static cache: InputError if it has no room, before anything is written.

        Nothing waits for a device here: beside another one than the CPU the host counts, and misses what compiled code
        has fed, which finds the end by an index of the mask that is out of range, as in a stock static cache.
        """
        assert self.fed is not None
        self._fed_here = (int(self.fed) if self.fed.device.type == "cpu" else self._fed_here) + 1
        self._check_room(self._fed_here)

    def _check_room(self, number: int) -> None:
        if self.capacity is None or number <= self.capacity:
            return
        names = " and ".join(sorted({lease.name for lease in self.leases}))
        raise InputError(
            f"{names}: a static cache made for {self.capacity} tokens is given {number}; make it larger"
        )

    def _told(self, mask: Any) -> Tensor | None:
        """(B,) or (1,) bool: whether the newest token is no padding, as far as ``mask`` says."""
        if not isinstance(mask, Tensor):
            return None
        if self.capacity is not None:
            assert self.fed is not None
            return shown_at(mask, self.fed - 1)
        own = mask[..., -1]
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
        if self.fed is not None:
            if self.standing:
                return self._seen + query_length, 0
            self.thaw()
        return super().get_mask_sizes(query_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.fed is None or beam_idx.shape[0] != self._batch():
            self.thaw()
            super().reorder_cache(beam_idx)
            return
        rows = self._batch()
        for tensor in self._buffers():
            whole = tensor.unflatten(0, (rows, -1))  # a row's heads may be lanes of their own
            whole.copy_(whole.index_select(0, beam_idx.to(tensor.device)))
        order = beam_idx.tolist()
        for name in ("lengths", "budgets", "recents", "firsts", "pads", "given"):
            held = getattr(self, name)
            if held:
                setattr(self, name, [held[i] for i in order])
        self.frozen_at = self.frozen_at[0], [self.frozen_at[1][i] for i in order]
        self.shown = (
            None if self.shown is None else self.shown.index_select(0, beam_idx.to(self.shown.device))
        )

    def _laid_out(self, offset: int) -> tuple[Tensor, Tensor]:
        if self.unplaced:
            raise Unsupported(
                f"{self.lease.name}: padding came between single tokens of this cache, so what it holds fits no mask of "
                "the model's own; start a new cache"
            )
        return super()._laid_out(offset)


def statistics(tensor: Tensor) -> torch.dtype:
    """The dtype of scores."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def thawing(cls: Any, *names: str) -> None:
    """Make the methods ``names`` of ``cls`` thaw the layer and go on as inherited."""

    def made(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.thaw()
            return getattr(super(cls, self), name)(*args, **kwargs)

        method.__name__, method.__doc__ = name, getattr(super(cls, cls), name).__doc__
        return method

    for name in names:
        setattr(cls, name, made(name))


# What these look at stands in tensors while the layer is frozen.
thawing(
    Freezing, "crop", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch",
    "activate_past_recording", "note", "score", "choose", "settle", "valid", "mask", "shifts", "kept",
    "admissible", "real_seen",
)  # fmt: skip
