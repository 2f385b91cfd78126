"""A decode step over fixed slots: the torch form against the meaning, and against the cache layer that grows."""

import os

import pytest
import torch
from kernel_cases import no_worse
from slot_cases import RULES, SHAPES, copied, make, token, turn

from trainless.cache import CompressingLayer
from trainless.errors import InputError
from trainless.kernels.common import Terms
from trainless.kernels.dispatch import numba_missing
from trainless.kernels.slots import SlotRule, SlotStep, choose, fixed_slots, reference, slot_decode
from trainless.seams import Evict, Lease

STEPS = 6
# Each is compiled by itself; how float16 is read is tried on one row by default (test_moved_row.py).
DTYPES = [torch.float32, torch.bfloat16, *[torch.float16] * (os.environ.get("TRAINLESS_ALL") == "1")]


@pytest.mark.parametrize(
    ("name", "shape", "moving"),
    [(name, shape, False) for name in RULES for shape in SHAPES] + [("oldest", s, True) for s in SHAPES]
    + [("sum", SHAPES[0], True)],
)  # fmt: skip
def test_steps_are_what_the_reference_says(name, shape, moving):
    rule, never = RULES[name], torch.tensor([[[0, 5], [7, 7]]]).expand(shape[0], 2, 2)
    if shape[4] < 9:
        never = None
    mine = make(shape, rule, never=never, short=True, turned=moving)
    other, by = copied(mine), turn(shape[5]) if moving else None
    before = {n: t.data_ptr() for n, t in mine.tensors().items()}
    for step in range(STEPS):
        given = token(shape)
        terms = Terms(0.3, None, 2.0 if step % 2 else None, torch.randn(shape[1]) if step % 3 else None)
        real = torch.tensor([True, step % 2 == 0])[: shape[0]] if step > 1 else None
        want = reference.decode(SlotStep(*given, other, rule, terms, real, by))
        more = {"softcap": terms.softcap, "sink_logits": terms.sink_logits, "real": real, "turn": by}
        got = slot_decode(*given, mine, rule, scale=0.3, **more)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        for n, t in mine.tensors().items():
            held = other.tensors()[n]
            if n == "shifts":
                t, held = (x.masked_fill(mine.positions < 0, 0) for x in (t, held))
            if t.is_floating_point():
                torch.testing.assert_close(t, held, rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(t, held), n
        if never is not None:
            kept = set(mine.positions[0, 0].tolist())
            assert {3, 4} <= kept
    assert {n: t.data_ptr() for n, t in mine.tensors().items()} == before


@pytest.mark.skipif(numba_missing() is not None, reason=str(numba_missing()))
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loops_do_what_the_operators_do(name, dtype, monkeypatch):
    from trainless.kernels.slots import compiled, plain

    monkeypatch.setattr(compiled, "ALONE", 0)
    near = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    rule = RULES[name]
    for shape in SHAPES:
        never = torch.tensor([[[0, 5], [7, 7]]]).expand(shape[0], 2, 2) if shape[4] >= 9 else None
        moving = name in ("oldest", "sum") and shape[5] % 16 == 0
        mine = make(shape, rule, dtype, never=never, short=True, turned=moving)
        other, by = copied(mine), turn(shape[5]) if moving else None
        assert choose(token(shape, dtype)[0], mine).name == "numba"
        for step in range(STEPS):
            given = token(shape, dtype)
            terms = Terms(0.3, None, 2.0 if step % 2 else None, torch.randn(shape[1]) if step % 3 else None)
            real = torch.tensor([True, step % 2 == 0])[: shape[0]] if step > 1 else None
            want = plain.decode(SlotStep(*given, other, rule, terms, real, by))
            more = {"softcap": terms.softcap, "sink_logits": terms.sink_logits, "real": real, "turn": by}
            got = slot_decode(*given, mine, rule, scale=0.3, **more)
            torch.testing.assert_close(got, want, rtol=near, atol=near)
            for n, t in mine.tensors().items():
                torch.testing.assert_close(t, other.tensors()[n], rtol=1e-5, atol=1e-6)


LAYER_RULES = {
    "streaming": (Evict(sinks=2, recent=5), SlotRule()),
    "h2o": (Evict(heavy=4, recent=4, score="column_mass"), SlotRule("sum")),
    "h2o-normalise": (
        Evict(heavy=4, recent=4, score="column_mass", gqa="mean", normalise=True),
        SlotRule("sum", gqa="mean", normalise=True),
    ),
    "tova": (
        Evict(capacity=8, score="probe_mass", last=1, gqa="mean", shared=True),
        SlotRule("last", gqa="mean", shared=True),
    ),
}


@pytest.mark.parametrize("name", LAYER_RULES)
def test_the_cache_layer_that_grows_keeps_the_same_tokens(name):
    policy, rule = LAYER_RULES[name]
    lease = Lease("test")
    lease.applied = lease.active = True
    layer = CompressingLayer(policy, lease)
    shape = (2, 4, 2, 0, 20, 16)
    b, h, hkv, _, length, d = shape

    def probabilities(query, keys, seen):
        z = (query.view(b, hkv, -1, d) * 0.3) @ keys.mT
        z = z if seen is None else z.masked_fill(~seen[:, :, None], -torch.inf)
        return torch.softmax(z, -1).view(b, h, -1)

    def call(query, key, value):
        layer.expected = True
        keys, values = layer.update(key, value)
        layer.note(None)
        p = probabilities(query, keys, layer.valid())
        if layer.scored_by():
            layer.score(p)
        layer.settle()
        return (p.view(b, hkv, -1, p.shape[2]) @ values).view(b, h, 1, d)

    make = lambda n, heads: torch.randn(b, heads, n, d, dtype=torch.float64)  # noqa: E731
    call(make(1, h), make(length, hkv), make(length, hkv))
    sinks = torch.tensor([[[0, policy.sinks]]]).expand(b, 1, 2) if policy.sinks else None
    size = layer.positions.shape[2] + 1
    scores = layer.scores if layer.scores is not None else torch.zeros(b, hkv, size - 1, dtype=torch.float64)
    slots = fixed_slots(
        layer.keys, layer.values, layer.positions, size, age=torch.tensor(layer.ages),
        limit=torch.tensor(layer.budgets), recent=torch.tensor(layer.recents),
        scores=scores if rule.score else None, never=sinks,
    )  # fmt: skip
    for _ in range(40):
        given = make(1, h), make(1, hkv), make(1, hkv)
        want = call(*given)
        torch.testing.assert_close(slot_decode(*given, slots, rule, scale=0.3), want, rtol=1e-9, atol=1e-9)
        held = [[sorted(p for p in head if p >= 0) for head in row] for row in slots.positions.tolist()]
        assert held == layer.kept()
    assert slots.age.tolist() == layer.ages and slots.count.tolist() == layer.counts


def test_a_buffer_that_is_never_full_is_filled_in_order_and_then_becomes_a_ring():
    """What a method that compresses once needs: the prompt stays; of the rest the newest that there is room for."""
    shape = (1, 2, 1, 8, 4, 8)
    slots = make(shape, SlotRule(), never=torch.tensor([[[0, 7]]]))
    slots.limit.fill_(1 << 30)
    slots.recent.zero_()
    for _ in range(3):
        slot_decode(*token(shape), slots, SlotRule(), scale=1.0)
    assert slots.positions.flatten().tolist() == [3, 4, 5, 6, 7, 8, 9, -1]
    slot_decode(*token(shape), slots, SlotRule(), scale=1.0)
    assert slots.positions.flatten().tolist() == [3, 4, 5, 6, -1, 8, 9, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_no_worse_than_the_plain_form(dtype):
    shape, rule = SHAPES[1], RULES["sum"]
    slots, given = make(shape, rule, dtype), token(shape, dtype)
    exact = copied(slots, torch.float64)
    want = reference.decode(SlotStep(*(t.double() for t in given), exact, rule, Terms(0.3)))
    low = copied(slots)
    low.keys[:, :, 20:21], low.values[:, :, 20:21] = given[1], given[2]
    z = (given[0].view(1, 2, 3, 24) @ low.keys.mT * 0.3).float()
    z[..., 21:] = -torch.inf
    plain = (torch.softmax(z, -1).to(dtype) @ low.values).view(1, 6, 1, 24)
    no_worse(slot_decode(*given, slots, rule, scale=0.3), want, plain)


def test_a_step_is_traced_whole_and_once():
    shape, rule = SHAPES[0], RULES["sum"]
    mine = make(shape, rule, torch.float32)
    other = copied(mine)
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda q, k, v: slot_decode(q, k, v, mine, rule, scale=0.3), fullgraph=True, backend=record
    )
    for _ in range(8):
        given = token(shape, torch.float32)
        torch.testing.assert_close(step(*given), slot_decode(*given, other, rule, scale=0.3))
    assert len(graphs) == 1
    assert torch.equal(mine.positions, other.positions)


@pytest.mark.parametrize("name", ["oldest", "sum"])
def test_the_operator_is_registered_correctly(name):
    shape, rule = SHAPES[0], RULES[name]
    s = make(shape, rule, torch.float32, never=torch.tensor([[[0, 4]]]).expand(2, 1, 2))
    call = (
        *token(shape, torch.float32), s.keys, s.values, s.positions, s.scores, s.free, s.age, s.count, s.limit,
        s.recent, s.tickets, s.never, s.shifts, s.lots, None, None, None, torch.tensor([True, False]), torch.randn(4),
        0.3, 2.0, rule.score, rule.gqa, rule.shared, rule.normalise,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.trainless.slot_decode.default, call, test_utils=tests)


def test_what_does_not_fit_is_refused():
    shape, rule = SHAPES[0], RULES["sum"]
    slots, (q, k, v) = make(shape, rule), token(shape)
    for given in ((q, k[:, :1], v), (q, k.repeat(1, 1, 2, 1), v), (q[..., :8], k, v)):
        with pytest.raises(InputError, match="do not fit"):
            slot_decode(*given, slots, rule, scale=1.0)
    with pytest.raises(InputError, match="score is None"):
        slot_decode(q, k, v, slots, SlotRule(), scale=1.0)
    with pytest.raises(InputError, match="stay empty"):
        fixed_slots(slots.keys, slots.values, slots.positions, 13, age=slots.age, limit=4)
    with pytest.raises(InputError, match="one of"):
        SlotRule("best")


def test_a_cpu_tensor_is_told_why_not_triton():
    found = choose(torch.zeros(1, 1, 1, 8), make(SHAPES[2], RULES["oldest"]))
    assert found.name == "torch" and "CUDA" in found.reasons[0]
