"""The compressing cache layer: keeps what an ``Evict`` rule says, deciding anew after each call."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, Unsupported
from ..seams import Evict, Lease
from . import columns
from .choosing import APART, Choosing
from .held import shifts, with_new


class CompressingLayer(Choosing):
    """A cache layer that evicts by its rule once a call is over.

    The engine tells it which new tokens are padding (``note``), what probability each key received
    (``score``), and when the call is over (``settle``). While its lease is inactive it drops nothing.

    The host announces every call that the engine will attend to (``expect``). In any other one the layer hands out
    all it holds, in the columns that the model's own mask is about, or refuses: see ``columns``.
    """

    is_sliding = False
    is_compileable = False
    _layer_type = None

    def __init__(self, policy: Evict, lease: Lease):
        super().__init__(policy, lease)
        self.home: weakref.ref[Any] | None = None  # the cache that this layer is one of
        self.expected = self.served = (
            False  # whether the engine attends to the next call, to the one under way
        )

    # ------------------------------------------------------------------ what transformers asks

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether ``crop`` can take tokens back."""
        return self.record_past or not self.active

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Full width: layers that keep everything share this mask, and the engine cuts out what it needs.
        offset = 0
        if (
            self.evicted
            and not self.standing
            and self.home is not None
            and (cache := self.home()) is not None
        ):
            offset = columns.agreed(cache)
        self.reported = self.seen, offset
        return self.seen - offset + query_length, offset

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.served, self.expected = self.expected, False
        if not self.served:
            return self._hand_out(key_states, value_states)
        self._check_seen()
        if self.waits and not self.lease.deferring:
            raise Unsupported(
                f"{self.lease.name}: the prompt was not read a second time, since its call ended otherwise than in its "
                "model's forward; start a new cache, and call the model"
            )
        if self.deferred and not self.lease.deferring:
            self.settle()  # the prefill in chunks is over, and nobody has said so
        self._came(key_states.shape[-2])
        if self._can_write(key_states):
            self._write(key_states, value_states)
        else:
            self._compact()
            self._append(key_states, value_states)
        return self.keys, self.values

    def _check_seen(self) -> None:
        """A rule that is active has seen every token so far, or at least that they came."""
        for lease in (held for held in self.leases if held.active and self.seen):
            if self.strayed:
                raise Unsupported(
                    f"{lease.name}: this cache was used by a model without the patch meanwhile; start a new cache"
                )
            if lease in self.missed:
                raise InputError(
                    f"{lease.name}: the cache already holds {self.seen} tokens that came while the patch was paused, "
                    "the prompt among them; start with an empty cache while it is active"
                )

    def _came(self, added: int) -> None:
        if self.seen == 0:
            self.missed = {lease for lease in self.leases if lease.applied and not lease.active}
        self.idle = 0 if self.active else self.idle + added
        if not self.lease.active:
            self._commit()  # what crop() could have taken back of the scores is settled
        self.past, self.seen = self.seen, self.seen + added

    def reset(self) -> None:
        self._clear()
        super().reset()

    def activate_past_recording(self) -> None:
        """From now on evict only at crop(), which comes after every draft that may be rejected."""
        if self.policy.replay is not None and self.lease.active and not self.done:
            raise Unsupported(
                f"{self.lease.name}: the prompt is read a second time, and the first call of assisted decoding brings a "
                "draft along with it; do without assisted decoding"
            )
        if self.policy.chosen and self.lease.active:
            raise Unsupported(
                f"{self.lease.name}: it chooses what stays from the tokens that it has seen, and drafts that are taken "
                "back would have had a say; do without assisted decoding"
            )
        self.record_past = True

    @property
    def does(self) -> str:
        """What it does to tokens that cannot be undone later."""
        return "evicts"

    def crop(self, tokens_to_remove: int) -> None:
        count = -tokens_to_remove
        if count < 0:
            raise InputError(f"crop({tokens_to_remove}): give minus the number of tokens to take back")
        if not self.is_initialized or self.seen == 0:
            return
        if count > self.seen:
            raise InputError(f"crop({tokens_to_remove}): the cache has seen {self.seen} tokens only")
        if count:
            if not ((self.record_past and self.active) or count <= self.idle):
                names = " and ".join(sorted({lease.name for lease in self.leases}))
                raise Unsupported(
                    f"{names}: this cache {self.does}, so tokens cannot be taken back unless it records its "
                    "past: call cache.activate_past_recording() before the forward whose tokens you may crop"
                )
            tail = self.pending.shape[2] if self.pending is not None else 0
            if self.policy.last:
                tail = self.TAIL
            if self.scored_by() and count > tail:
                raise Unsupported(
                    f"crop({tokens_to_remove}): the scores of the last {tail} tokens only can be taken back; "
                    "use drafts shorter than that"
                )
            self._drop_last(count)
        self._commit()
        if self.seen == 0:
            self._clear()
        elif self.lease.active:
            self._evict()

    # ------------------------------------------------------------------ whose it is

    @property
    def leases(self) -> set[Lease]:
        """Whose rules this layer follows."""
        return {self.lease}

    @property
    def active(self) -> bool:
        """Whether a patch cares for this layer now."""
        return any(lease.active for lease in self.leases)

    @property
    def standing(self) -> bool:
        """Whether one is on a model, paused or not: the engine then attends to this layer there."""
        return any(lease.applied or lease.active for lease in self.leases)

    def expect(self, cache: Any) -> None:
        """The engine attends to the next call on this layer of ``cache``."""
        if self.home is None or self.home() is not cache:
            self.home = weakref.ref(cache)
        self.expected = True

    def rebind(self, evictor: Lease | None, packer: Lease | None, policy: Evict | None, rule: Any) -> bool:
        """Follow other leases from now on, if they are those of the same methods; whether they are."""
        if packer is not None or evictor is None or policy != self.policy:
            return False
        if not self._comes_back(self.lease, evictor):
            return False
        self.lease = evictor
        return True

    def _comes_back(self, old: Lease, new: Lease) -> bool:
        """Whether ``new`` is a patch with the same method and parameters as one that is on no model any more."""
        return (
            not (old.applied or self.strayed or old in self.missed)
            and bool(old.terms)
            and old.terms == new.terms
        )

    def __getstate__(self) -> dict[str, Any]:
        cache = None if self.home is None else self.home()
        return {**vars(self), "home": cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cache = state["home"]
        vars(self).update(state, home=None if cache is None else weakref.ref(cache))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressingLayer:
        made = object.__new__(type(self))
        memo[id(self)] = made
        cache = None if self.home is None else self.home()
        copied = None if cache is None else memo.get(id(cache))
        for name, held in vars(self).items():
            setattr(made, name, None if name == "home" else copy.deepcopy(held, memo))
        made.home = None if copied is None else weakref.ref(copied)
        return made

    # ------------------------------------------------------------------ what the engine asks

    def note(self, real: Tensor | None) -> None:
        """Tell the layer which of the tokens just added are not padding (None: all); (B, Lq) bool."""
        if self.positions is None:
            added = self.seen - self.past
            if real is not None or self.real is not None:
                held = self.keys.shape[2] - added
                before = self.real if self.real is not None else self._ones(held)
                now = real if real is not None else self._ones(added)
                self.real = torch.cat([before, now.to(before.device)], 1)
            self._note_given(real)
            return
        self._note_given(real)
        if self.free is not None and self.seen - self.past == 1:
            self._note_written(real)
        else:
            self._note_last(self.positions, real)

    def valid(self) -> Tensor | None:
        """(B, Hkv, S) bool: which slots hold a token; None when all of them do."""
        if self.positions is None:
            return None
        if not self.uneven and all(c == self.positions.shape[2] for c in self.counts):
            return None
        return self.positions >= 0

    def mask(self, mask: Any, rows: int, causal: bool) -> tuple[Tensor | None, bool]:
        """(mask, causal) for a call on compressed storage: kept tokens are visible, new ones as the model says.

        The model's own mask (None, bool, additive or a flex BlockMask) is as wide as the whole sequence; its
        last ``rows`` columns are about the new tokens.
        """
        assert self.positions is not None
        valid = self.valid()
        if valid is None and mask is None:
            return None, causal or rows > 1
        if rows == 1:
            heads = self.positions >= 0
            return heads[:, :, None, :], False
        held = self.positions.shape[2] - rows
        told = self.positions if self.uneven else self.positions[:, :1]
        return with_new(told[:, :, :held] >= 0, mask, rows, self.seen), False

    def shifts(self) -> Tensor | None:
        """(B, Hkv, S): how far each key must move so that kept tokens look contiguous; None for nowhere."""
        return None if self.positions is None else shifts(self.positions, self.ages, self.counts)

    @property
    def packed(self) -> bool:
        """Whether the attention is given less than all that is held."""
        return False

    def altered(self) -> set[Lease]:
        """Whose rules have changed what a call on this layer finds of the tokens before it, or how precisely."""
        dropped = self.uneven or any(count < age for count, age in zip(self.counts, self.ages, strict=True))
        return {self.lease} if dropped else set()

    def settle(self) -> set[Lease]:
        """Evict what the rule says, now that the call is over; returns the leases that changed something."""
        if not self.lease.active or self.lease.deferring or self.record_past or self.waits:
            self.free = None  # the slot is taken, and the next token needs another
            self.deferred = self.lease.deferring
            return set()
        self.deferred = False
        apart = self.states.pop(APART, None)
        if apart is not None:
            self._add_scores(self._grouped(apart.tensors["mass"][:, :, None])[:, :, 0])
        self._commit()
        return {self.lease} if self._evict() else set()

    @property
    def waits(self) -> bool:
        """Whether its prompt is there and still has to be read a second time, before which nothing goes."""
        return self.policy.replay is not None and self.lease.active and not self.done and self.seen > 0

    def keep_pairs(self, keep: Tensor) -> set[Lease]:
        """Keep of the prompt what was chosen after its second reading, bool (B, Hkv, S); what ``settle`` returns."""
        self._freeze()
        self.done, self.deferred = True, False
        dropped = {self.lease} if self.keep_heads(keep) else set()
        return dropped | self.settle()

    def kept(self) -> list[list[list[int]]]:
        """Positions kept, ascending, per row and key/value head."""
        if self.positions is None:
            rows = self.real if self.real is not None else self._ones(self.seen)
            return [[list(range(int(r.sum())))] * self.keys.shape[1] for r in rows]
        return [[sorted(int(p) for p in head if p >= 0) for head in row] for row in self.positions.tolist()]

    # ------------------------------------------------------------------ without the engine

    def admissible(self) -> tuple[int, int]:
        """From which columns on (least, largest) the model's own mask would be right; ``columns`` says how."""
        return columns.admissible(self.pads, self.counts, self.ages, self.seen)

    def _hand_out(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All that is held and the new tokens, for an attention that applies the model's mask as it is."""
        if self.uneven:
            names = " and ".join(sorted({lease.name for lease in self.leases}))
            raise Unsupported(
                f"{names}: the heads of this cache hold different numbers of tokens, which the model's own attention "
                "cannot tell apart; use it with the patch on the model, or start a new cache"
            )
        cache = None if self.home is None else self.home()
        offset = 0 if cache is None else columns.reported(cache, self.seen)
        low, high = self.admissible() if self.evicted else (0, 0)
        if not low <= offset <= high:
            names = " and ".join(sorted({lease.name for lease in self.leases}))
            raise Unsupported(f"{names}: {columns.misfit(self.standing, cache, low, high)}")
        self._came(key.shape[-2])
        self.strayed = True
        self._compact()
        self._append(key, value)
        self.note(None)
        return self._laid_out(offset)

    def _laid_out(self, offset: int) -> tuple[Tensor, Tensor]:
        """What is held, in the columns from ``offset`` on."""
        if self.positions is None or not any(self.pads):
            return self.keys, self.values
        return columns.placed(self, self.positions, (self.keys, self.values), offset)
