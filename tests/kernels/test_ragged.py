"""Steps over heads that hold different numbers of tokens: each lane as a row of ``slots`` with one key head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trainless
from trainless.kernels.common import Terms
from trainless.kernels.dispatch import numba_missing
from trainless.kernels.ragged import PAGE, RaggedSlots, choose, plain, ragged_decode, ragged_slots
from trainless.kernels.ragged.state import padded
from trainless.kernels.slots import SlotRule, fixed_slots, slot_decode

ROWS, HEADS, GROUP, WIDTH, HELD = 2, 3, 2, 16, 40


def buffers(dtype: torch.dtype, score: str | None, seed: int = 0) -> RaggedSlots:
    torch.manual_seed(seed)
    key = torch.randn(ROWS, HEADS, HELD, WIDTH).to(dtype)
    value = torch.randn(ROWS, HEADS, HELD, 8).to(dtype)
    positions = torch.arange(HELD).expand(ROWS, HEADS, HELD).clone()
    drop = torch.rand(ROWS, HEADS, HELD) < torch.rand(ROWS, HEADS, 1)
    drop[..., -1] = False
    positions[drop] = -1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ragged_slots(
        key, value, positions, age=torch.tensor([HELD, HELD]), room=PAGE,
        limit=(positions >= 0).sum(2) if score else None, recent=torch.tensor([2, 3]),
        scores=torch.rand(ROWS, HEADS, HELD, dtype=wide) if score else None,
    )  # fmt: skip


def token(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(ROWS, HEADS * GROUP, 1, WIDTH).to(dtype)
    return query, torch.randn(ROWS, HEADS, 1, WIDTH).to(dtype), torch.randn(ROWS, HEADS, 1, 8).to(dtype)


def dense(query: Tensor, slots: RaggedSlots, scale: float) -> Tensor:
    """What the query sees of all that the lanes hold, in float64."""
    key, value, positions, _ = padded(slots)
    key, value = (t.double().repeat_interleave(GROUP, 1) for t in (key, value))
    z = query.double() @ key.mT * scale
    z = z.masked_fill((positions < 0).repeat_interleave(GROUP, 1)[:, :, None], -torch.inf)
    return z.softmax(-1) @ value


@pytest.mark.parametrize("score", [None, "sum", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_steps_are_those_of_the_lanes_and_dense_ones(dtype: torch.dtype, score: str | None) -> None:
    first, second = buffers(dtype, score), buffers(dtype, score)
    rule, slack = SlotRule(score), {torch.float32: 1e-5, torch.bfloat16: 2e-2}.get(dtype, 1e-12)
    if dtype != torch.float64 and numba_missing() is None:
        assert choose(token(dtype)[0], first).name == "numba"
    for step in range(12):
        query, key, value = token(dtype)
        real = torch.tensor([True, step % 3 != 1])
        before = first.grown(0) if score is None else None
        got = ragged_decode(query, key, value, first, rule, scale=0.25, real=real)
        want = plain.decode(query, key, value, second, rule, Terms(0.25), real)
        torch.testing.assert_close(got, want, rtol=slack, atol=slack)
        for name in ("positions", "free", "age", "count"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        if before is not None:  # nothing goes: what was attended to is what is held now
            seen = dense(query, first, 0.25)
            torch.testing.assert_close(got.double(), seen, rtol=slack, atol=slack)
    if score is not None:
        assert torch.equal(first.count, first.limit), "every lane holds as much as it may"


def test_equal_lanes_are_fixed_slots() -> None:
    key, value = torch.randn(2, 3, 20, 16), torch.randn(2, 3, 20, 16)
    positions, age = torch.arange(20).expand(2, 3, 20), torch.tensor([20, 20])
    fixed = fixed_slots(key, value, positions, 32, age=age, limit=24)
    ragged = ragged_slots(key, value, positions, age=age, limit=torch.full((2, 3), 24))
    assert ragged.sizes == [32] * 6
    for _ in range(9):
        query, new = torch.randn(2, 6, 1, 16), (torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 16))
        want = slot_decode(query, *new, fixed, SlotRule(), scale=0.3)
        assert torch.equal(ragged_decode(query, *new, ragged, SlotRule(), scale=0.3), want)


def test_growing_changes_nothing_that_is_held() -> None:
    slots = buffers(torch.float32, None)
    grown = slots.grown(3 * PAGE)
    assert all(b > a for a, b in zip(slots.sizes, grown.sizes, strict=True)) and not grown.full()
    query, key, value = token(torch.float32)
    a = ragged_decode(query, key, value, slots, SlotRule(), scale=0.2)
    assert torch.equal(a, ragged_decode(query, key, value, grown, SlotRule(), scale=0.2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": torch.zeros(2, 6, 2, 16)}, "a step is one token"),
        ({"value": torch.zeros(2, 3, 1, 9)}, "values of width 8"),
        ({"rule": SlotRule("sum")}, "scores"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, says: str) -> None:
    query, key, value = token(torch.float32)
    given = {"query": query, "key": key, "value": value, "rule": SlotRule(), **change}
    with pytest.raises(trainless.InputError, match=says):
        ragged_decode(slots=buffers(torch.float32, None), scale=1.0, **given)
