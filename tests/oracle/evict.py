"""What evicting methods share: kept sets, budgets frozen at the first prefill, rolled positions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .core import Call, Rule


def tokens(budget: int | float, length: int) -> int:
    """A budget in tokens: an int as it is; a float as that fraction of ``length``, rounded down (a
    product within 1e-9 of an integer is that integer: 0.29 · 100 is 29)."""
    if isinstance(budget, float):
        return math.floor(budget * length + 1e-9)
    return budget


@dataclass
class Turn:
    """What a layer keeps right after a call: ``kept`` bool (B, Hkv, Lk) over all columns seen so far,
    ``real`` (B, Lk) the columns that are no padding, ``score`` (B, Hkv, Lk) if the rule has one, and
    ``margin`` (B, Hkv): (worst chosen - best refused score) / best refused, inf without a choice."""

    kept: Tensor
    real: Tensor
    score: Tensor | None
    margin: Tensor


class Evictor(Rule):
    """A forward call attends densely over everything kept plus its own tokens; then it evicts, for each
    batch row and key/value head. What has been evicted never returns. Padding is never kept. The newest
    token always is. Budgets given as fractions refer to the row's own real tokens in the first call.

    positions="rolled": the kept tokens and the call's own are numbered 0, 1, 2 … in their order, for each
    row and key/value head, before every call. Only differences count in rotary attention, so the keys
    are turned forward to meet queries at their true positions: key j by (gaps before the newest token) -
    (gaps before j), a gap being an evicted token.
    """

    def __init__(
        self, positions: str = "real", layers: Collection[int] | None = None, part: str | None = None
    ) -> None:
        super().__init__(layers, part)
        self.positions = positions
        self.turns: dict[int, list[Turn]] = {}

    ratio: float | None = None
    protect = False

    def shares(self, ratio: float | None = None, protect: str = "none") -> Evictor:
        """One budget in the place of the rule's own, and tokens that never go.

        ratio: the share of the row's own prompt that stays, all parts together, at least one token. protect
        ("prompt"): tokens of the first call and of later calls of several tokens stay; the budget, without the first
        tokens, is for the others, and what it protects counts from the newest token whoever gave it.
        """
        self.ratio, self.protect = ratio, protect == "prompt"
        return self

    least_share: float | None = None

    def adaptive(self, floor: float = 0.2) -> Evictor:
        """The heads of a layer share one budget, Hkv times what each would have: the best stay, whatever head they are
        of, after the best ``int(floor · budget)`` of each head, and what always stays. From the first time that a row
        drops something, each head keeps as many as it kept then. Ties: newer first, then the lower head."""
        self.least_share = floor
        return self

    def _choose_adaptive(
        self, call: Call, row: int, present: Tensor, score: Tensor | None
    ) -> tuple[list[set[int]], list[float]]:
        total, first, last = self.parts(self.length(call, row))
        start, heads = int(call.real_keys[row].int().argmax()), len(present)
        columns = [head.nonzero().flatten().tolist() for head in present]
        mine = self.state(call).setdefault("shares of heads", {}).get(row)
        if self.once and self.state(call)["calls of this rule"] > 1:
            return [set(c) for c in columns], [math.inf] * heads
        if mine is None and max(map(len, columns)) <= total:
            return [set(c) for c in columns], [math.inf] * heads
        assert score is not None
        ranked, always = [], []
        for head, candidates in enumerate(columns):
            held = set(candidates[-max(1, last) :]) | {j for j in candidates if j - start < first}
            rest = sorted(set(candidates) - held, key=lambda j: (float(score[head, j]), j), reverse=True)
            always.append(held)
            ranked.append([*sorted(held, reverse=True), *rest])
        if mine is not None:
            chosen = [set(order[:n]) for order, n in zip(ranked, mine, strict=True)]
            gaps = [
                _gap(score[h], ranked[h][: mine[h]], ranked[h][mine[h] :], always[h]) for h in range(heads)
            ]
            return chosen, gaps
        forced = [
            set(order[: max(len(held), int(self.least_share * total + 1e-9))])
            for order, held in zip(ranked, always, strict=True)
        ]
        pool = [(float(score[h, j]), j, -h) for h in range(heads) for j in ranked[h] if j not in forced[h]]
        pool.sort(reverse=True)
        places = heads * total - sum(map(len, forced))
        for _, j, h in pool[:places]:
            forced[-h].add(j)
        self.state(call)["shares of heads"][row] = [len(f) for f in forced]
        refused = pool[places][0] if places < len(pool) else 0.0
        gap = (pool[places - 1][0] - refused) / max(refused, 1e-300) if places else math.inf
        return forced, [gap] * heads

    once = False  # whether nothing goes after the first call

    def parts(self, length: int) -> tuple[int, int, int]:
        """(tokens in all, first ones, last ones) of a row whose prompt has ``length`` tokens."""
        raise NotImplementedError

    def _choose_shared(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        total, first, last = self.parts(self.length(call, row))
        start = int(call.real_keys[row].int().argmax())
        held = set(candidates[-max(1, last) :])
        if self.protect:
            given = {j for j in candidates if self.state(call)["given"][row, j]}
            held, total = held | given, total + len(given)
        else:
            held |= {j for j in candidates if j - start < first}
        if len(candidates) <= total:
            return set(candidates), math.inf
        value = {j: float(j if score is None else score[j]) for j in candidates}
        rest = sorted(set(candidates) - held, key=lambda j: (value[j], j), reverse=True)
        places = total - len(held)
        if places == 0:
            return held, math.inf
        worst, refused = value[rest[places - 1]], value[rest[places]]
        return held | set(rest[:places]), (worst - refused) / max(abs(refused), 1e-300)

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        """Columns to keep of ``candidates`` (ascending, real) and the margin; ``score`` is (Lk,)."""
        raise NotImplementedError

    def scores(self, call: Call, p: Tensor) -> Tensor | None:
        """Scores of all columns, (B, Hkv, Lk), after this call."""
        return None

    def kept(self, layer: int, call: int, row: int, kv_head: int) -> list[int]:
        """Real-token indices (0 is the row's first real token) kept after ``call``, ascending."""
        turn = self.turns[layer][call]
        start = int(turn.real[row].int().argmax())
        return (turn.kept[row, kv_head].nonzero().flatten() - start).tolist()

    def margin(self) -> float:
        """The smallest margin of all choices made in the present sequences."""
        every = [turn.margin.min().item() for turns in self.turns.values() for turn in turns]
        return min(every, default=math.inf)

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.turns[call.site.layer] = []

    def length(self, call: Call, row: int) -> int:
        """Real tokens of the row in its first call."""
        return int(self.state(call)["lengths"][row])

    def present(self, call: Call) -> Tensor:
        """Columns that this call may meet: kept before, and its own real tokens; bool (B, Hkv, Lk)."""
        batch, hkv = call.key.shape[:2]
        own = call.real[:, None, :].expand(batch, hkv, -1)
        if not call.past:
            return own
        return torch.cat([self.state(call)["kept"], own], dim=-1)

    def seen(self, call: Call, seen: Tensor) -> Tensor:
        return seen & self.present(call).repeat_interleave(call.groups, dim=1)[:, :, None, :]

    def keys(self, call: Call, key: Tensor) -> Tensor:
        if self.positions == "real":
            return key
        present = self.present(call)
        rank = present.int().cumsum(dim=-1) - 1
        gaps = torch.arange(present.shape[-1]) - rank
        return rotate(key, gaps[..., -1:] - gaps, frequencies(call.model))

    def after(self, call: Call, p: Tensor) -> None:
        state = self.state(call)
        if call.past == 0:
            state["lengths"] = call.real.sum(dim=1)
        several = call.past == 0 or call.query.shape[2] > 1
        own = call.real if several else torch.zeros_like(call.real)
        before = state["given"] if call.past else own[:, :0]
        state["given"] = torch.cat([before, own], dim=1)
        present, score = self.present(call), self.scores(call, p)
        shared = self.protect or self.ratio is not None
        batch, hkv, _ = present.shape
        kept = torch.zeros_like(present)
        margin = torch.full((batch, hkv), math.inf, dtype=torch.float64)
        state["calls of this rule"] = state.get("calls of this rule", 0) + 1 if call.past else 1
        if not call.past:
            state["shares of heads"] = {}
        for row in range(batch):
            if self.least_share is not None:
                sets, gaps = self._choose_adaptive(
                    call, row, present[row], None if score is None else score[row]
                )
                for head, (chosen, gap) in enumerate(zip(sets, gaps, strict=True)):
                    kept[row, head, sorted(chosen)] = True
                    margin[row, head] = gap
                continue
            for head in range(hkv):
                candidates = present[row, head].nonzero().flatten().tolist()
                column = None if score is None else score[row, head]
                choose = self._choose_shared if shared else self.choose
                chosen, gap = choose(call, row, head, candidates, column)
                kept[row, head, sorted(chosen)] = True
                margin[row, head] = gap
        state["kept"] = kept
        self.turns[call.site.layer].append(Turn(kept, call.real_keys, score, margin))


def _gap(score: Tensor, stays: list[int], goes: list[int], always: set[int]) -> float:
    chosen = [float(score[j]) for j in stays if j not in always]
    if not (chosen and goes):
        return math.inf
    best = max(float(score[j]) for j in goes)
    return (min(chosen) - best) / max(best, 1e-300)


class Kept(Evictor):
    """Evict what somebody else has evicted: ``sets[layer][call][row][kv_head]`` holds the real-token
    indices kept right after that call. What is kept is checked to have been there."""

    def __init__(
        self,
        sets: Mapping[int, Sequence[Sequence[Sequence[Iterable[int]]]]],
        positions: str = "real",
        layers: Collection[int] | None = None,
        part: str | None = None,
    ) -> None:
        super().__init__(positions, set(sets) if layers is None else layers, part)
        self.sets = sets

    def choose(
        self, call: Call, row: int, head: int, candidates: list[int], score: Tensor | None
    ) -> tuple[set[int], float]:
        turn = len(self.turns[call.site.layer])
        start = int(call.real_keys[row].int().argmax())
        chosen = {start + i for i in self.sets[call.site.layer][turn][row][head]}
        if not chosen <= set(candidates):
            gone = sorted(i - start for i in chosen - set(candidates))
            raise AssertionError(f"{call.site.name} call {turn} row {row} head {head}: {gone} were not there")
        return chosen, math.inf


def frequencies(model: nn.Module) -> Tensor:
    """The rotary angles per position step, from the model's own rotary module."""
    found = {
        tuple(m.inv_freq.tolist())
        for m in model.modules()
        if isinstance(getattr(m, "inv_freq", None), Tensor)
    }
    if len(found) != 1:
        raise NotImplementedError(f"rolled positions need one set of rotary frequencies, found {len(found)}")
    return torch.tensor(found.pop(), dtype=torch.float64)


def rotate(key: Tensor, steps: Tensor, freq: Tensor) -> Tensor:
    """Turn rotary keys (B, Hkv, Lk, D) forward by ``steps`` (B, Hkv, Lk) positions.

    Channel m and channel m + len(freq) are the two coordinates of one plane; channels beyond
    2 · len(freq) carry no position. A constant factor on the rotation, as some scalings have, commutes.
    """
    half = freq.numel()
    angle = steps[..., None].to(torch.float64) * freq
    x, y, rest = key[..., :half], key[..., half : 2 * half], key[..., 2 * half :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([x * cos - y * sin, x * sin + y * cos, rest], dim=-1)
