"""What a cache layer has been given and what it holds, followed call by call beside the layer itself.

The history has every token that was ever fed, in the columns in which they came, and which of them are left: what
the layer says it kept, once that has been held against the rule. Scores are those of the dense probabilities. Where
a choice hangs on rounding, either is right, and the history goes on with what the layer chose.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import ExpandedLayer, Freezing, PackedLayer
from ..kernels.draws import draws
from ..kernels.quant_kv import RAW, Segment
from ..seams import Evict, Quantise
from .dense import wide

Problem = str


@dataclass
class Update:
    """One update of a cache, as an attention module made it."""

    layer: Any
    key: Tensor  # (B, Hc, n, D): the new tokens'
    value: Tensor
    keys: Tensor  # (B, Hc, S, D): what the cache handed back
    values: Tensor


class Lost(Exception):
    """The history cannot be followed any further; says why."""


class History:
    """The sequence of one cache layer. Shapes: T tokens fed so far, Hc heads of the cache.

    key, value: as numbers, what attention meets: (B, H, T, D) with H the query heads. original: (key, value) as they
    were fed (B, Hc, T, D). alive (B, Hc, T); real (B, T); of_head: the cache head that each query head reads.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.shown = layer  # what says what it keeps: the layer, or a copy of it that may be asked
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.original: tuple[Tensor, Tensor] | None = None
        self.alive: Tensor | None = None
        self.real: Tensor | None = None
        self.of_head: Tensor | None = None
        self.scores: Tensor | None = None  # (B, Hc, T)
        self.worth: Tensor | None = None  # (B, Hc, T): what the last choice went by
        self.prompt: list[int] = []
        self.asked: Tensor | None = (
            None  # (B, T): tokens that came several at a time, which were not generated
        )
        self.packed: set[int] = set()  # columns of row 0, head 0 that are codes
        self.order: Tensor | None = (
            None  # (B, Hc, S): the column of each slot after the last call, -1 for none
        )
        self.expanded = False  # whether attention is given something that is made of what is cached
        self.shares: dict[int, list[int]] = {}  # by row: what its heads got, where they share a budget
        self.calls = 0
        self.stamp: Any = None

    # ------------------------------------------------------------------ a call begins

    def check_untouched(self) -> None:
        """Lost when somebody has moved the cache since the last call: beams, cropping, offloading."""
        if self.calls and self.stamp != _stamp(self.layer):
            raise Lost("its cache was reordered, cropped or moved between two calls")

    def lose(self) -> None:
        """The call under way cannot be followed, nor what comes after it."""
        self.stamp, self.calls = None, self.calls + 1

    def feed(self, update: Update, key: Tensor, value: Tensor, heads: int, real: Tensor | None) -> None:
        """The new tokens; key, value (B, Hkv, Lk, D) are what the attention was handed, real (B, n) what exists."""
        b, hc, n, _ = update.key.shape
        of_key, slots = self._read_slots(update, key, value)
        new_key, new_value = self._new(update, key, value, of_key, slots)
        share = heads // new_key.shape[1]
        new_key, new_value = (t.repeat_interleave(share, 1) for t in (new_key, new_value))
        of_head = of_key.repeat_interleave(share)
        real = torch.ones(b, n, dtype=torch.bool, device=key.device) if real is None else real
        alive = real[:, None].expand(b, hc, n)
        if self.key is None:
            # Clones: a layer writes into the tensors that it was given first.
            self.key, self.value = new_key.clone(), new_value.clone()
            self.original = update.key.clone(), update.value.clone()
            self.alive, self.real, self.of_head = alive.clone(), real, of_head
        else:
            assert self.value is not None and self.original is not None and self.alive is not None
            assert self.real is not None
            if self.alive.shape[:2] != alive.shape[:2]:
                raise Lost("its batch changed between two calls")
            self.key, self.value = torch.cat([self.key, new_key], 2), torch.cat([self.value, new_value], 2)
            self.original = (
                torch.cat([self.original[0], update.key], 2),
                torch.cat([self.original[1], update.value], 2),
            )
            self.alive, self.real = torch.cat([self.alive, alive], 2), torch.cat([self.real, real], 1)
        several = real & (real.sum(1, keepdim=True) > (1 if self.calls else 0))
        self.asked = several if self.asked is None else torch.cat([self.asked, several], 1)
        if not self.calls:
            self.prompt = [int(r) for r in self.real.sum(1)]

    def _read_slots(self, update: Update, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the cache head behind each key head, slots of the new tokens where keys are made from what is cached)."""
        hc, hkv = update.keys.shape[1], key.shape[1]
        number = torch.arange(hkv, device=key.device)
        alike = update.keys.shape == key.shape and update.values.shape == value.shape
        if alike and not isinstance(update.layer, ExpandedLayer):
            return number, None
        self.expanded = True
        if update.keys.shape[2] != key.shape[2]:
            raise Lost(
                f"attention was given {key.shape[2]} keys and its cache handed back {update.keys.shape[2]}"
            )
        # Latents that are expanded, or heads that are repeated, after the cache: find the new tokens by their bits.
        # By those of both halves: latents of one word at two places differ in what carries the position.
        pairs = ((update.keys, update.key), (update.values, update.value))
        same = torch.stack([(a[:, :1, :, None] == b[:, :1, None]).all(-1) for a, b in pairs]).all(
            0
        )  # (B, 1, S, n)
        slots = same[:, 0].int().argmax(1)
        if not bool(same[:, 0].any(1).all()):
            raise Lost("the new tokens are not among what its cache handed back")
        if hc == 1:
            return torch.zeros_like(number), slots
        if update.keys.shape[-1] != key.shape[-1] or hkv % hc:
            raise Lost(f"{hkv} heads of keys were made from {hc} that are cached, in a way that is not known")
        match = (key[:, :, None] == update.keys[:, None]).flatten(3).all(-1).all(0)  # (Hkv, Hc)
        if not bool(match.any(1).all()):
            raise Lost("its keys are not those that are cached")
        return match.int().argmax(1), slots

    @staticmethod
    def _new(
        update: Update, key: Tensor, value: Tensor, of_key: Tensor, slots: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if slots is None:
            return update.key, update.value
        found = []
        for tensor in (key, value):
            index = slots[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
            found.append(tensor.gather(2, index))
        return found[0], found[1]

    # ------------------------------------------------------------------ what a call meets

    def placed(self, handed: Tensor) -> Tensor:
        """(B, H, T, D): what attention was handed (B, Hkv, slots and new tokens, D), each in its column, 0 elsewhere."""
        assert self.key is not None and self.of_head is not None
        tokens, held = self.key.shape[2], 0 if self.order is None else self.order.shape[2]
        new = handed.shape[2] - held
        if self.order is None or not 0 < new <= tokens:
            raise Lost(
                "which token each of the numbers stands for, that were made of its codes, is not known"
            )
        fresh = torch.arange(tokens - new, tokens, device=handed.device).expand(*self.order.shape[:2], new)
        columns = torch.cat([self.order, fresh], 2)[:, self.of_head]
        handed = handed.repeat_interleave(columns.shape[1] // handed.shape[1], 1)
        index = columns.masked_fill(columns < 0, tokens)[..., None].expand_as(handed)
        found = handed.new_zeros(*handed.shape[:2], tokens + 1, handed.shape[3])
        return found.scatter_(2, index, handed)[:, :, :tokens]

    def exists(self) -> Tensor:
        """bool (B, H, 1, T): the columns that are left, for each query head."""
        assert self.alive is not None and self.of_head is not None
        return self.alive[:, self.of_head][:, :, None]

    def gone_after(self) -> Tensor:
        """(B, H, T): how many tokens were dropped between each that is left and the newest."""
        assert self.alive is not None and self.real is not None and self.of_head is not None
        gone = self.real[:, None] & ~self.alive
        after = gone.int().flip(2).cumsum(2).flip(2)
        return after.masked_fill(~self.alive, 0)[:, self.of_head]

    # ------------------------------------------------------------------ a call is over

    def settle(
        self, policy: Evict | None, mass: Tensor | None, chosen: Any, slack: float
    ) -> tuple[list[Problem], bool]:
        """Hold what the layer kept against ``policy``; returns what is wrong, and whether anything was dropped.

        mass (B, H, rows, T): probabilities of the rows that the policy looks at, where it scores. chosen: what the
        method itself said stays (bool (B, T)), for a policy that leaves it to the method.
        """
        assert self.alive is not None and self.real is not None
        beyond = self._beyond()
        if beyond is not None:
            self.lose()
            return [beyond], False
        kept = self._kept()
        problems = []
        if bool((kept & ~self.alive).any()):
            problems.append("holds tokens that had been dropped, or padding")
        dropped = bool((self.alive & ~kept).any())
        if policy is not None and not problems:
            worth = self.worth = self._worth(policy, mass)
            problems += self._against(policy, kept, worth, chosen, slack)
        self.alive = kept
        self.calls += 1
        self.stamp = _stamp(self.layer)
        return problems, dropped

    def _beyond(self) -> str | None:
        """A token that the layer says it keeps and that its row never had: then it counts padding for tokens."""
        assert self.real is not None
        for row, heads in enumerate(self.shown.kept()):
            length, last = int(self.real[row].sum()), max((max(p, default=-1) for p in heads), default=-1)
            if last >= length:
                return f"says that it keeps token {last} of a row of {length} tokens (row {row})"
        return None

    def _kept(self) -> Tensor:
        """bool (B, Hc, T), from the positions that the layer says it keeps: numbers of real tokens."""
        assert self.alive is not None and self.real is not None
        kept = torch.zeros_like(self.alive)
        for row, heads in enumerate(self.shown.kept()):
            columns = self.real[row].nonzero()[:, 0]
            for head, positions in enumerate(heads):
                kept[row, head, columns[torch.tensor(positions, dtype=torch.long, device=columns.device)]] = (
                    True
                )
        return kept

    def _worth(self, policy: Evict, mass: Tensor | None) -> Tensor | None:
        """(B, Hc, T): the scores of all columns after this call, by the dense probabilities."""
        if policy.of_keys:
            return self._by_keys(str(policy.score))
        if policy.score is None or mass is None:
            return None
        assert self.alive is not None and self.real is not None and self.of_head is not None
        per_head = mass.sum(2)
        if policy.shared:
            found = per_head.mean(1, keepdim=True).expand_as(self.alive)
        else:
            of = [per_head[:, self.of_head == c] for c in range(self.alive.shape[1])]
            join = {"sum": lambda t: t.sum(1), "mean": lambda t: t.mean(1), "max": lambda t: t.amax(1)}
            by = join.get(policy.gqa, lambda t: t[:, 0])
            found = torch.stack([by(t) for t in of], 1)
        if policy.last:
            self.scores = None
            return found
        if self.scores is not None:
            found = found.clone()
            found[:, :, : self.scores.shape[2]] += self.scores
        self.scores = found
        if policy.normalise:
            number = self.real.long().cumsum(1)
            readers = (number[:, -1:] - number + 1).clamp_min(1)
            return found / readers[:, None]
        return found

    def _by_keys(self, how: str) -> Tensor:
        """(B, Hc, T): the same by the keys of a prompt, as they were fed."""
        assert self.original is not None and self.alive is not None
        key, there = wide(self.original[0]), self.alive[..., None]
        if how == "key_norm":
            return -key.square().sum(-1).sqrt()
        unit = torch.nn.functional.normalize(key, dim=-1)
        mean = torch.where(there, unit, 0).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
        return -torch.nn.functional.cosine_similarity(unit, mean, dim=-1)

    def _against(
        self, policy: Evict, kept: Tensor, worth: Tensor | None, chosen: Any, slack: float
    ) -> list[Problem]:
        assert self.alive is not None and self.real is not None
        if policy.chosen:
            want = self.alive if chosen is None else self.alive & chosen[:, None]
            return [] if torch.equal(kept, want) else ["does not keep what its method chose"]
        if policy.once and self.calls:
            return [] if torch.equal(kept, self.alive) else ["dropped tokens after its one choice"]
        number = self.real.long().cumsum(1) - 1  # (B, T): of each real token
        problems = []
        for row, length in enumerate(self.prompt):
            age = int(number[row, -1]) + 1
            parts = policy.parts(length)
            stays = (number[row] >= age - max(parts.recent, 1)) | (number[row] < parts.sinks)
            limit = policy.total(length)
            if policy.protect:
                assert self.asked is not None
                stays, limit = stays | self.asked[row], limit + int(self.asked[row].sum()) - length
            held = self.real[row] & stays
            budgets, said = self._budgets(policy, row, kept[row], worth, held, limit, slack)
            problems += said
            for head in range(kept.shape[1]):
                before, now = self.alive[row, head], kept[row, head]
                want = min(int(before.sum()), budgets[head])
                where = f"row {row}, head {head}"
                if int(now.sum()) != want:
                    problems.append(f"keeps {int(now.sum())} tokens where its budget leaves {want} ({where})")
                    continue
                if int((held & before).sum()) <= want and bool((held & before & ~now).any()):
                    problems.append(f"dropped a first or recent token that always stays ({where})")
                    continue
                free, gone = now & ~held, before & ~now & ~held
                if not bool(free.any()) or not bool(gone.any()):
                    continue
                value = (
                    number[row].double()
                    if worth is None
                    else self._pooled(policy, worth[row, head], before, held)
                )
                if policy.score is not None and worth is None:
                    continue
                if policy.seed is not None:
                    value = draws(policy.seed, torch.tensor(head, device=number.device), number[row])
                margin = slack * max(float(value[before].abs().max()), 1e-30) if worth is not None else 0.0
                if float(value[free].min()) < float(value[gone].max()) - margin:
                    problems.append(
                        f"dropped a token of worth {float(value[gone].max()):.3g} and kept one of "
                        f"{float(value[free].min()):.3g} ({where})"
                    )
        return problems

    def _budgets(
        self,
        policy: Evict,
        row: int,
        kept: Tensor,
        worth: Tensor | None,
        held: Tensor,
        even: int,
        slack: float,
    ) -> tuple[list[int], list[Problem]]:
        """(the budget of each head of a row, what is wrong with how they shared theirs): kept (Hc, T), held (T,)."""
        assert self.alive is not None
        before, heads = self.alive[row], kept.shape[0]
        if not policy.by_head:
            return [even] * heads, []
        if row in self.shares:
            return self.shares[row], []
        if int(before.sum(1).max()) <= even:
            return [even] * heads, []
        self.shares[row] = now = kept.sum(1).tolist()
        if sum(now) != heads * even:
            return now, [f"its heads keep {sum(now)} tokens where they share {heads * even} (row {row})"]
        least = max(int(policy.floor * even + 1e-9), int((held & before).sum(1).max()))
        if min(now) < min(least, int(before.sum(1).min())):
            return now, [f"a head keeps {min(now)} tokens where each keeps {least} (row {row})"]
        if worth is None:
            return now, []
        stays, goes = [], []
        for head in range(heads):
            value = self._pooled(policy, worth[row, head], before[head], held)
            free = value[kept[head] & ~held].sort(descending=True).values
            stays.append(free[max(0, least - int((held & before[head]).sum())) :])
            goes.append(value[before[head] & ~kept[head] & ~held])
        kept_least, gone_most = torch.cat(stays), torch.cat(goes)
        if kept_least.numel() and gone_most.numel():
            margin = slack * max(float(worth[row].abs().max()), 1e-30)
            if float(kept_least.min()) < float(gone_most.max()) - margin:
                return now, [
                    f"dropped a token of worth {float(gone_most.max()):.3g} and kept one of "
                    f"{float(kept_least.min()):.3g} in another head (row {row})"
                ]
        return now, []

    @staticmethod
    def _pooled(policy: Evict, worth: Tensor, before: Tensor, held: Tensor) -> Tensor:
        """A score shared with its neighbours; first and recent tokens and padding count as nothing."""
        if policy.pool == 1:
            return worth
        free = worth.masked_fill(~before | held, 0)
        around = policy.pool // 2
        padded = torch.nn.functional.pad(free, (around, around)).unfold(0, policy.pool, 1)
        return padded.amax(1) if policy.pooling == "max" else padded.mean(1)

    # ------------------------------------------------------------------ codes

    def unpack(self, rule: Quantise) -> tuple[list[Problem], float, int]:
        """Take over what the layer's codes say, and hold it against what was fed.

        Returns what is wrong, the largest error as a share of what rounding may do (at most 1 is right), and how
        many tokens of the first row and head are codes.
        """
        assert self.original is not None and self.real is not None and self.alive is not None
        assert self.key is not None and self.value is not None and self.of_head is not None
        positions = self.shown.positions
        if positions is None:
            return [], 0.0, 0
        self.order = self._columns(positions).masked_fill(positions < 0, -1)
        problems: list[Problem] = []
        worst, packed, start = 0.0, set[int](), 0
        allowed = {(k, v) for k, v in zip(rule.k_bits, rule.v_bits, strict=True)}
        for segment in self.shown.segments:
            mine = positions[:, :, start : start + segment.slots]
            start += segment.slots
            bits = (segment.k_bits, segment.v_bits)
            if bits == (RAW, RAW):
                continue
            if bits not in allowed:
                problems.append(f"holds tokens at {bits[0]} and {bits[1]} bits, which its rule does not have")
            for which, (numbers, bound) in enumerate((_keys(segment), _values(segment))):
                fed = wide(self._at(self.original[which], mine))
                there = (mine >= 0)[..., None]
                slack = 4 * torch.finfo(self.original[which].dtype).eps * (fed.abs() + numbers.abs()) + 1e-12
                ratio = ((numbers - fed).abs() / (bound + slack)).masked_fill(~there, 0)
                worst = max(worst, float(ratio.max()) if ratio.numel() else 0.0)
                self._take(which, numbers, mine)
            packed |= {int(p) for p in mine[0, 0].tolist() if p >= 0}
        if worst > 1:
            problems.append(f"codes are {worst:.3g} times as far from what was fed as their steps allow")
        self.packed = packed
        return problems, worst, len(packed)

    def tiers(self) -> list[tuple[tuple[int, int, int], int]]:
        """((row, head, position), tier) of every token that is packed."""
        store = getattr(self.shown, "store", None)
        found = []
        for run in () if store is None else store.runs:
            for row, heads in enumerate(run.positions.tolist()):
                for head, positions in enumerate(heads):
                    found += [((row, head, p), run.tier) for p in positions if p >= 0]
        return found

    def _columns(self, positions: Tensor) -> Tensor:
        """Columns (B, Hc, S) of positions, which count real tokens; 0 for empty slots."""
        assert self.real is not None
        order = (~self.real).int().argsort(dim=1, stable=True)
        index = order[:, None].expand(-1, positions.shape[1], -1)
        return index.gather(2, positions.clamp_min(0))

    def _at(self, tensor: Tensor, positions: Tensor) -> Tensor:
        columns = self._columns(positions)[..., None]
        return tensor.gather(2, columns.expand(*columns.shape[:3], tensor.shape[3]))

    def _take(self, which: int, numbers: Tensor, positions: Tensor) -> None:
        """From now on attention meets these numbers."""
        if self.expanded:
            return
        held = self.key if which == 0 else self.value
        assert held is not None and self.of_head is not None
        if numbers.shape[-1] != held.shape[-1]:
            raise Lost("what is packed is not what attention is given")
        full = wide(held)
        columns = self._columns(positions)[:, self.of_head]
        there = (positions >= 0)[:, self.of_head]
        mine = numbers[:, self.of_head]
        for row in range(full.shape[0]):
            for head in range(full.shape[1]):
                at = columns[row, head][there[row, head]]
                full[row, head, at] = mine[row, head][there[row, head]]
        if which == 0:
            self.key = full
        else:
            self.value = full


def answering(layer: Any) -> Any:
    """``layer``, or where it stands in buffers of fixed size a copy that does not, so that asking it changes nothing."""
    if not (isinstance(layer, Freezing) and layer.fed is not None):
        return layer
    copied = copy.copy(layer)  # thawing replaces what a layer holds, and writes into none of it
    if isinstance(layer, PackedLayer):
        vars(copied)["_store"] = copy.copy(vars(layer)["_store"])
    copied.thaw()
    return copied


def _stamp(layer: Any) -> Any:
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor):
        return None
    return id(keys), keys.shape, 0 if keys.is_inference() else keys._version


# ---------------------------------------------------------------- reading codes, once more and in full


def _keys(segment: Segment) -> tuple[Tensor, Tensor]:
    """Numbers (B, Hc, slots, D) that the codes of keys stand for, and how far rounding may have moved each."""
    codes = segment.key.flatten(2, 3)
    if segment.k_bits == RAW:
        return wide(codes), torch.zeros_like(wide(codes))
    assert segment.key_step is not None and segment.key_min is not None
    step, least = _per_group(segment, segment.key_step), _per_group(segment, segment.key_min)
    return _codes(codes, segment.k_bits) * step + least, _bound(step, segment.k_bits, segment.key_step.dtype)


def _values(segment: Segment) -> tuple[Tensor, Tensor]:
    codes = segment.value.flatten(2, 3)
    if segment.v_bits == RAW:
        return wide(codes), torch.zeros_like(wide(codes))
    assert segment.value_step is not None and segment.value_min is not None and segment.value_root is not None
    step, least = (wide(t).flatten(2, 3)[..., None] for t in (segment.value_step, segment.value_min))
    root = _per_group(segment, segment.value_root)
    numbers = (_codes(codes, segment.v_bits) * step + least) * root
    return numbers, _bound(step, segment.v_bits, segment.value_step.dtype) * root.abs()


def _codes(packed: Tensor, bits: int) -> Tensor:
    """Bytes (…, W) to numbers of codes (…, D): code p of byte i is channel p · W + i."""
    per, width = 8 // bits, packed.shape[-1]
    found = torch.zeros(*packed.shape[:-1], per * width, dtype=torch.int64, device=packed.device)
    for p in range(per):
        found[..., p * width : (p + 1) * width] = (packed.long() // 2 ** (bits * p)) % 2**bits
    return wide(found.double() if packed.device.type != "mps" else found.float())


def _per_group(segment: Segment, table: Tensor) -> Tensor:
    """Parameters of groups (B, Hc, T, D), one row for each slot."""
    size = segment.key.shape[3]
    if segment.index is None:
        group = (torch.arange(segment.slots, device=table.device) // size).expand(*table.shape[:2], -1)
    else:
        group = segment.index.long()
    return wide(table).gather(2, group[..., None].expand(*group.shape, table.shape[3]))


def _bound(step: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Half a step, and what the rounding of the parameters themselves adds at the far end of the range."""
    return step.abs() * (0.5 + 2**bits * torch.finfo(dtype).eps)
