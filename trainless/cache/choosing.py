"""Which tokens stay: what a layer is told about them, its budgets, and the choice after each call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.draws import draws
from ..seams import Evict, Lease, State
from . import columns, head_budgets, scores
from .held import FAR
from .slots import Slots

APART = "scores per query head"  # a state of the layer's own
UNDECIDED = -1  # the budget of a head whose row has dropped nothing yet


class Choosing(Slots):
    """Stored tokens with a rule for what stays. While its lease is inactive nothing goes."""

    _layer_type = None
    TAIL = 32  # rows whose scores can be taken back by crop()

    def __init__(self, policy: Evict, lease: Lease):
        super().__init__()
        self.policy, self.lease = policy, lease
        self.record_past = False

    # ------------------------------------------------------------------ what it is told

    def scored_by(self) -> str | None:
        """The statistic that the rule needs of the call under way, None when it needs none."""
        policy = self.policy
        if not self.lease.active or policy.score is None or policy.of_keys or (policy.once and self.done):
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

    def times(self, real: Tensor | None, rows: int) -> Tensor | None:
        """How often each of the call's rows counts in column sums, (1 or B, rows) int64; None: once each.

        real (B, rows): which are no padding.
        """
        sample = self.policy.sample
        if sample is None or self.scored_by() != "column_mass":
            return None
        before = self._turn_before(real, rows)
        if max(before) + rows <= sample.whole:
            return None
        device = self.keys.device
        number = torch.arange(rows, device=device)[None] if real is None else real.long().cumsum(1) - 1
        times = sample.times(number + torch.tensor(before, device=device)[:, None])
        return times if real is None else times * real

    def _turn_before(self, real: Tensor | None, rows: int) -> list[int]:
        """Real tokens of each row in earlier chunks of the same prefill."""
        if not self.lease.deferring:
            return [0]
        own = [rows] * self._batch() if real is None else real.sum(1).tolist()
        before = [n - o for n, o in zip(self.real_seen(), own, strict=True)]
        if not self.deferred:
            self.turn = before
        return [n - start for n, start in zip(before, self.turn, strict=True)]

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

    def real_seen(self) -> list[int]:
        """Tokens of each row so far that are no padding."""
        if self.positions is None:
            return [self.seen] * self._batch() if self.real is None else self.real.sum(1).tolist()
        return list(self.ages)

    def _note_given(self, real: Tensor | None) -> None:
        """Tokens that came several at a time were given and not generated, unless they are drafts."""
        added = self.seen - self.past
        if not self.policy.protect or (
            self.past and (self.record_past or added == 1) and not self.lease.deferring
        ):
            return
        own = [added] * self._batch() if real is None else real.sum(1).tolist()
        now = (
            self.real_seen()
            if self.positions is None
            else [a + o for a, o in zip(self.ages, own, strict=True)]
        )
        if self.past and not self.lease.deferring:
            own = [
                n if n > 1 else 0 for n in own
            ]  # a row's one token among others' turns: as it would be alone
        before = self.given or [[] for _ in now]
        self.given = [
            columns.joined(g, [(n - o, n)] if o else []) for g, n, o in zip(before, now, own, strict=True)
        ]

    # ------------------------------------------------------------------ the choice

    def _grouped(self, mass: Tensor) -> Tensor:
        """(B, H, rows, Lk) of query heads to (B, Hkv, rows, Lk), as the rule says."""
        return scores.grouped(mass, self.keys.shape[1], self.policy)

    def _commit(self) -> None:
        if self.pending is None:
            return
        if self.policy.last:
            if not self.budgets:
                self._freeze()
            rows = self.pending[:, :, -self.policy.last :]
            score = [self.policy.parts(n).last for n in self.lengths]
            if min(score) < rows.shape[2]:  # rows of the batch may be scored by fewer
                age = torch.arange(rows.shape[2], 0, -1, device=rows.device)
                looks = age <= torch.tensor(score, device=rows.device)[:, None]
                rows = rows * looks[:, None, :, None]
            self.scores = rows.sum(2)
        else:
            assert self.scores is not None
            self.scores.add_(self.pending.sum(2))
        self.pending = None

    def _freeze(self) -> None:
        """Fix the budgets of every row from the length of its own prompt."""
        self.lengths = self.real_seen()
        parts = [self.policy.parts(n) for n in self.lengths]
        self.budgets = [p.total for p in parts]
        self.recents, self.firsts = [p.recent for p in parts], [p.sinks for p in parts]

    def _limits(self) -> list[int]:
        """How many tokens each row may keep now."""
        if not self.policy.protect:
            return self.budgets
        return [
            b + sum(stop - start for start, stop in g) for b, g in zip(self.budgets, self.given, strict=True)
        ]

    def _evict(self) -> bool:
        """Drop what has to go; whether anything had to."""
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
            if all(n <= b for n, b in zip(stored, self._limits(), strict=True)):
                return False
            self._locate(stored)
        if self.policy.by_head:
            return self._over_by_head()
        over = [c - b for c, b in zip(self.counts, self._limits(), strict=True)]
        if self.free is not None and max(over) <= 1:
            self._evict_one([o > 0 for o in over])
        elif any(o > 0 for o in over):
            if not self.ordered:
                self._compact()  # many may have come while nobody evicted
            self._select()
        return any(o > 0 for o in over)

    def _over_by_head(self) -> bool:
        """The same where heads share a budget, until something goes for the first time, or have one each, afterwards."""
        assert self.positions is not None
        device, shape = self.positions.device, self.positions.shape[:2]
        if self.limits is None:
            self.limits = torch.full(shape, UNDECIDED, device=device)
        even, counts = torch.tensor(self.budgets, device=device), torch.tensor(self.counts, device=device)
        there = self.positions >= 0
        decided = self.limits[:, 0] != UNDECIDED
        first = ~decided & (counts > even)
        if not bool((first | (decided & (there.sum(2) > self.limits).any(1))).any()):
            self.free = None
            return False
        if not self.ordered:
            self._compact()
            there = self.positions >= 0
        worth = self._worth().masked_fill(self._protected(), float("inf")).masked_fill(~there, float("-inf"))
        keep = head_budgets.own(worth, torch.where(decided[:, None], self.limits, FAR))
        if bool(first.any()):
            best = head_budgets.shared(worth, even, self.policy.floor)
            keep = torch.where(first[:, None, None], best, keep)
            self.limits = torch.where(first[:, None], best.sum(2), self.limits)
        return self.keep_heads(keep)

    def _keep_chosen(self) -> bool:
        keep, self.keep = self.keep, None
        if keep is None:
            self.free = None  # the slot is taken, and the next token needs another
            return False
        if self.positions is None:
            stored = self._ones(self.seen) if self.real is None else self.real
            if bool(keep[stored].all() if keep.dim() == 2 else (keep | ~stored[:, None]).all()):
                return False
            self._locate(stored.sum(1).tolist())
        assert self.positions is not None
        if keep.dim() == 3:
            return self.keep_heads(keep)
        left, held = keep[:, None] & (self.positions >= 0), sum(self.counts)
        self._keep_only(left, left[:, 0].sum(1).tolist())
        return sum(self.counts) < held

    def keep_heads(self, keep: Tensor) -> bool:
        """Drop what is not in ``keep`` (B, Hkv, S) over the stored columns; whether anything was dropped.

        Heads may keep different numbers of tokens. A head that is left with none gives no output until tokens come.
        """
        if self.positions is None:
            if bool((keep if self.real is None else keep | ~self.real[:, None]).all()):
                return False
            self._locate(self.real_seen())
        assert self.positions is not None
        there = self.positions >= 0
        left = keep & there
        if torch.equal(left, there):
            self.free = None
            return False
        numbers = left.sum(2)
        self._keep_only(left, numbers.amax(1).tolist())
        self.uneven = self.uneven or bool((numbers != numbers[:, :1]).any())
        if self.uneven:
            self._blank()
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
        if self.uneven or len(set(self.counts)) > 1:
            empty = (self.positions < 0)[..., None]
            self.keys, self.values = self.keys.masked_fill(empty, 0), self.values.masked_fill(empty, 0)

    def _protected(self) -> Tensor:
        """(B, Hkv, S): first tokens, recent tokens and the newest one. Empty slots are not among them."""
        assert self.positions is not None
        newest = [a - max(r, 1) for a, r in zip(self.ages, self.recents, strict=True)]
        held = self.positions >= self._rowwise(newest)
        if any(self.firsts):
            held = held | ((self.positions < self._rowwise(self.firsts)) & (self.positions >= 0))
        for number in range(max(map(len, self.given), default=0)):
            start, stop = zip(*(g[number] if number < len(g) else (0, 0) for g in self.given), strict=True)
            held = held | (
                (self.positions >= self._rowwise(list(start))) & (self.positions < self._rowwise(list(stop)))
            )
        return held

    def _worth(self) -> Tensor:
        """(B, Hkv, S): what the rule compares; higher stays."""
        assert self.positions is not None
        if self.policy.seed is not None:
            heads = torch.arange(self.keys.shape[1], device=self.positions.device)[:, None]
            return draws(self.policy.seed, heads, self.positions)
        if self.policy.of_keys:
            assert self.keys.shape[2] == self.positions.shape[2]  # nothing is packed before the one choice
            return scores.of_keys(self.keys, self.positions >= 0, str(self.policy.score))
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
            if self.scores is None and self.policy.seed is None:
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
        after = [min(c, b) for c, b in zip(self.counts, self._limits(), strict=True)]
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
