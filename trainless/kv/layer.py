"""The compressing cache layer: keeps what an ``Evict`` rule says, deciding anew after each call."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, Unsupported
from ..hosts.base import Lease
from ..seams import Evict, State, tokens_of
from . import columns, scores
from .held import FAR, shifts, with_new
from .slots import Slots

APART = "scores per query head"  # a state of the layer's own


class CompressingLayer(Slots):
    """A cache layer that evicts by its rule once a call is over.

    The engine tells it which new tokens are padding (``note``), what probability each key received
    (``score``), and when the call is over (``settle``). While its lease is inactive it drops nothing.

    The host announces every call that the engine will attend to (``expect``). In any other one the layer hands out
    all it holds, in the columns that the model's own mask is about, or refuses: see ``columns``.
    """

    is_sliding = False
    is_compileable = False
    _layer_type = None
    TAIL = 32  # rows whose scores can be taken back by crop()

    def __init__(self, policy: Evict, lease: Lease):
        super().__init__()
        self.policy, self.lease = policy, lease
        self.record_past = False
        self.home: weakref.ref[Any] | None = None  # the cache that this layer is one of
        self.expected = self.served = False  # whether the engine attends to the next call, to the one under way

    # ------------------------------------------------------------------ what transformers asks

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` can take tokens back."""
        return self.record_past or not self.active

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Full width: layers that keep everything share this mask, and the engine cuts out what it needs.
        offset = 0
        if self.evicted and not self.standing and self.home is not None and (cache := self.home()) is not None:
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
        if self.policy.chosen and self.lease.active:
            raise Unsupported(
                f"{self.lease.name}: it chooses what stays from the tokens that it has seen, and drafts that are taken "
                "back would have had a say; do without assisted decoding"
            )
        self.record_past = True

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
                raise Unsupported(
                    "this cache evicts, so tokens cannot be taken back unless it records its past: call "
                    "cache.activate_past_recording() before the forward whose tokens you may crop"
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
        return not (old.applied or self.strayed or old in self.missed) and bool(old.terms) and old.terms == new.terms

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
            return
        if self.free is not None and self.seen - self.past == 1:
            self._note_written(real)
        else:
            self._note_last(self.positions, real)

    def real_seen(self) -> list[int]:
        """Tokens of each row so far that are no padding."""
        if self.positions is None:
            return [self.seen] * self._batch() if self.real is None else self.real.sum(1).tolist()
        return list(self.ages)

    def scored_by(self) -> str | None:
        """The statistic that the rule needs of the call under way, None when it needs none."""
        policy = self.policy
        if not self.lease.active or policy.score is None or (policy.once and self.done):
            return None
        whole = not (self.lease.deferring or self.record_past)
        if policy.last and whole and policy.capacity is not None and self.seen <= policy.fixed:
            return (
                None  # nothing can be over the budget yet, and no later call asks for the scores of this one
            )
        return policy.score

    def rows_apart(self) -> int:
        """How many of a call's last rows the layer wants to be told about one by one, besides their sum."""
        if self.record_past:
            return self.TAIL + self.policy.last
        # Rows that a rule looks at may stand in several chunks of one prefill.
        return self.policy.last if self.lease.deferring and self.policy.last > 1 else 0

    def score(self, mass: Tensor, tail: Tensor | None = None) -> None:
        """Add column mass (B, H, Lk) of the rows that the rule looks at.

        ``tail`` (B, H, rows, Lk): its last rows one by one, as ``rows_apart`` asked.
        """
        mass = mass.detach()
        if self.policy.last:
            # What earlier calls said is forgotten.
            self.scores = None
            if tail is None:
                self.scores = self._grouped(mass[:, :, None])[:, :, 0]
            else:
                self._join(self._grouped(tail.detach()))
            return
        if self.lease.deferring and self.policy.gqa == "max":
            # The largest head is known when the last chunk of the prefill is: until then heads stay apart.
            apart = self.states.setdefault(APART, State())
            held = apart.get("mass")
            apart.set("mass", mass if held is None else held + mass, keys=2)
            return
        if tail is not None:
            tail = tail.detach()
            mass = mass - tail.sum(2)
        add = self._grouped(mass[:, :, None])[:, :, 0]
        if tail is not None:
            add = self._hold_back(self._grouped(tail), add)
        self._add_scores(add)

    def _add_scores(self, add: Tensor) -> None:
        if self.scores is None:
            self.scores = add
            return
        short = add.shape[2] - self.scores.shape[2]
        if short:
            self.scores = torch.cat([self.scores, self.scores.new_zeros(*self.scores.shape[:2], short)], 2)
        self.scores.add_(add)

    def _hold_back(self, rows: Tensor, add: Tensor) -> Tensor:
        """Keep the last rows (B, Hkv, rows, S) apart until crop() says which stay; returns what to add now."""
        surplus = self._join(rows)
        return add if surplus is None else add + surplus.sum(2)

    def _join(self, rows: Tensor) -> Tensor | None:
        """Keep the last ``rows_apart`` of the rows so far; returns those that are too many."""
        if self.pending is not None:
            # A draft is fed token by token: the rows of its earlier calls may still be taken back, too.
            short = rows.shape[3] - self.pending.shape[3]
            rows = torch.cat([torch.nn.functional.pad(self.pending, (0, short)), rows], 2)
        surplus = max(0, rows.shape[2] - self.rows_apart())
        self.pending = rows[:, :, surplus:]
        return rows[:, :, :surplus] if surplus else None

    def choose(self, keep: Tensor | None) -> None:
        """What stays after this call, for a rule that leaves it to the method: bool (B, S); None: everything."""
        self.keep = keep

    def valid(self) -> Tensor | None:
        """(B, Hkv, S) bool: which slots hold a token; None when all of them do."""
        if self.positions is None or all(c == self.positions.shape[2] for c in self.counts):
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
        return with_new(self.positions[:, :1, :held] >= 0, mask, rows, self.seen), False

    def shifts(self) -> Tensor | None:
        """(B, Hkv, S): how far each key must move so that kept tokens look contiguous; None for nowhere."""
        return None if self.positions is None else shifts(self.positions, self.ages, self.counts)

    @property
    def packed(self) -> bool:
        """Whether the attention is given less than all that is held."""
        return False

    def settle(self) -> set[Lease]:
        """Evict what the rule says, now that the call is over; returns the leases that changed something."""
        if not self.lease.active or self.lease.deferring or self.record_past:
            self.free = None  # the slot is taken, and the next token needs another
            return set()
        apart = self.states.pop(APART, None)
        if apart is not None:
            self._add_scores(self._grouped(apart.tensors["mass"][:, :, None])[:, :, 0])
        self._commit()
        return {self.lease} if self._evict() else set()

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

    # ------------------------------------------------------------------ eviction

    def _grouped(self, mass: Tensor) -> Tensor:
        """(B, H, rows, Lk) of query heads to (B, Hkv, rows, Lk), as the rule says."""
        return scores.grouped(mass, self.keys.shape[1], self.policy)

    def _commit(self) -> None:
        if self.pending is None:
            return
        if self.policy.last:
            self.scores = self.pending[:, :, -self.policy.last :].sum(2)
        else:
            assert self.scores is not None
            self.scores.add_(self.pending.sum(2))
        self.pending = None

    def _freeze(self) -> None:
        """Fix the budgets of every row from the length of its own prompt."""
        self.lengths = self.real_seen()
        self.budgets = [self.policy.total(n) for n in self.lengths]
        self.recents = [tokens_of(self.policy.recent, n) for n in self.lengths]
        self.firsts = [tokens_of(self.policy.sinks, n) for n in self.lengths]

    def _evict(self) -> bool:
        if not self.budgets:
            self._freeze()
        if self.policy.chosen:
            return self._keep_chosen()
        if self.policy.once and self.done:
            self.free = None  # the slot is taken, and the next token needs another
            return False
        dropped = self._over_budget()
        self.done = True
        if self.policy.last:
            self.scores = None  # they were about this call
        return dropped

    def _over_budget(self) -> bool:
        if self.positions is None:
            stored = self.real_seen()  # only a padded batch has to look at its mask, until it evicts
            if all(n <= b for n, b in zip(stored, self.budgets, strict=True)):
                return False
            self._locate(stored)
        over = [c - b for c, b in zip(self.counts, self.budgets, strict=True)]
        if self.free is not None and max(over) <= 1:
            self._evict_one([o > 0 for o in over])
        elif any(o > 0 for o in over):
            if not self.ordered:
                self._compact()  # many may have come while nobody evicted
            self._select()
        return True

    def _keep_chosen(self) -> bool:
        keep, self.keep = self.keep, None
        if keep is None:
            self.free = None  # the slot is taken, and the next token needs another
            return False
        if self.positions is None:
            stored = self._ones(self.seen) if self.real is None else self.real
            if bool(keep[stored].all()):
                return False
            self._locate(stored.sum(1).tolist())
        assert self.positions is not None
        left = keep[:, None] & (self.positions >= 0)
        self._keep_only(left, left[:, 0].sum(1).tolist())
        return True

    def _keep_only(self, keep: Tensor, after: list[int]) -> None:
        """Drop what is not in ``keep`` (B, Hkv, S), of which each row has ``after`` per head."""
        assert self.positions is not None
        self.positions = self.positions.masked_fill(~keep, -1)
        order = self.positions.argsort(dim=2, stable=True)
        self._take(order[:, :, order.shape[2] - max(after) :])
        self.counts, self.free = after, None
        self._blank()

    def _blank(self) -> None:
        """Nothing of a dropped token may linger: its values would still be multiplied by zero."""
        assert self.positions is not None
        if len(set(self.counts)) > 1:
            empty = (self.positions < 0)[..., None]
            self.keys, self.values = self.keys.masked_fill(empty, 0), self.values.masked_fill(empty, 0)

    def _protected(self) -> Tensor:
        """(B, Hkv, S): first tokens, recent tokens and the newest one. Empty slots are not among them."""
        assert self.positions is not None
        newest = [a - max(r, 1) for a, r in zip(self.ages, self.recents, strict=True)]
        held = self.positions >= self._rowwise(newest)
        if any(self.firsts):
            held = held | ((self.positions < self._rowwise(self.firsts)) & (self.positions >= 0))
        return held

    def _worth(self) -> Tensor:
        """(B, Hkv, S): what the rule compares; higher stays."""
        assert self.positions is not None
        if self.scores is None:
            return self.positions.to(torch.float64)
        if self.policy.pool > 1:
            # Slots are still in the order of the prompt here, and pads and protected tokens count as zero.
            return scores.pooled(self.scores.masked_fill(self._protected(), 0), self.policy)
        if not self.policy.normalise:
            return self.scores
        readers = self._rowwise(self.ages) - self.positions
        return self.scores / readers.clamp_min(1)

    def _evict_one(self, over: list[bool]) -> None:
        """A decode step: drop at most one token per row and head; its slot is the next token's."""
        assert self.positions is not None
        if any(over):
            barred = self._protected() | (self.positions < 0)
            if self.scores is None:
                candidates = self.positions.masked_fill(barred, FAR)
            else:
                worth = self._worth().masked_fill(barred, float("inf"))
                lowest = worth.amin(2, keepdim=True)
                # Among equals the older one goes.
                candidates = self.positions.masked_fill(barred | (worth != lowest), FAR)
            victim = candidates.argmin(2, keepdim=True)
            if all(over):
                self.positions.scatter_(2, victim, -1)
                self.free = victim[..., 0]
                self.counts = [c - 1 for c in self.counts]
                return
            rows = torch.tensor(over, device=self.keys.device)[:, None, None]
            left = torch.where(rows, -1, torch.gather(self.positions, 2, victim))
            self.positions.scatter_(2, victim, left)
            self.counts = [c - o for c, o in zip(self.counts, over, strict=True)]
        self.free = None  # rows differ, or nothing was dropped: look for (or make) a slot next time

    def _best(self) -> tuple[Tensor, Tensor, list[int]]:
        """(slots to keep (B, Hkv, W), which of these are too many for their row, tokens left per row)."""
        assert self.positions is not None
        worth = self._worth().masked_fill(self._protected(), float("inf"))
        worth = worth.masked_fill(self.positions < 0, float("-inf"))
        after = [min(c, b) for c, b in zip(self.counts, self.budgets, strict=True)]
        return *scores.best(worth, after), after

    def _select(self) -> None:
        """After a prefill or a turn: keep the protected tokens and the best of the rest, in order."""
        best, surplus, after = self._best()
        assert self.positions is not None
        kept = torch.gather(self.positions, 2, best).masked_fill(surplus, -1)
        self.positions = self.positions.scatter(2, best, kept)
        order = kept.argsort(dim=2, stable=True)
        self._take(torch.gather(best, 2, order))
        self.counts, self.free = after, None
        self._blank()
