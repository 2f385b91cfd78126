"""Packed buffers of fixed size: a step against its meaning, packing against the codes of the layers that grow."""

import pytest
import torch
from fixed_cases import IDS, SHAPES, copied, make, token
from kernel_cases import no_worse

from trainless.errors import InputError
from trainless.kernels.common import Terms
from trainless.kernels.dispatch import numba_missing
from trainless.kernels.quant_kv import (
    api,
    choose_fixed,
    fill,
    fixed_packed,
    fixed_plain,
    merge,
    pack_group,
    packed_decode,
    quantise,
    reference,
)
from trainless.kernels.quant_kv.steps import choosing

SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=IDS)


@pytest.fixture(params=["numba", "blocked"], autouse=True)
def form(request, monkeypatch):
    if request.param == "blocked":
        for module in (api, choosing):
            monkeypatch.setattr(module, "numba_reasons", lambda tensors: ("numba: not in this test",))
    elif numba_missing() is not None:
        pytest.skip(numba_missing())


@SHAPED
def test_steps_are_what_the_reference_says(shape):
    mine = make(shape)
    other, terms = copied(mine), Terms(0.3, None, 2.0, torch.randn(shape[1]))
    hkv, slots = shape[2], mine.slots
    before = {n: t.data_ptr() for n, t in mine.tensors().items()}
    for step in range(3):
        given = token(shape)
        valid = torch.rand(shape[0], hkv, slots) < 0.8 if step else None
        real = torch.tensor([True, step != 1])[: shape[0]]
        scores = torch.full((shape[0], shape[1], slots), torch.nan, dtype=torch.float64)
        want = reference.packed_decode(*given, other, terms, valid, real)
        got = packed_decode(
            *given, mine, scale=0.3, softcap=2.0, sink_logits=terms.sink_logits, valid=valid, real=real,
            scores=scores,
        )  # fmt: skip
        for a, b in zip((*got, scores), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for n, t in mine.tensors().items():
            assert torch.equal(t, other.tensors()[n]), n
    assert {n: t.data_ptr() for n, t in mine.tensors().items()} == before


@SHAPED
def test_a_group_is_packed_as_quantise_packs_it(shape):
    """Once it is due, in rows where it is; the rest of the ring, and every other group, stays as it is."""
    _, _, _, _, _, groups, group, _, ring, *bits = shape
    buffers = make(shape, torch.float32)
    residual = torch.full((shape[0],), 2, dtype=torch.int32)
    start = copied(buffers)
    while int(buffers.age.max() - buffers.packed.max()) < ring - 1:
        packed_decode(*token(shape, torch.float32), buffers, scale=1.0)
        old = copied(buffers)
        pack_group(buffers, residual)
        for row in range(shape[0]):
            was, now = int(old.packed[row]), int(buffers.packed[row])
            due = int(old.age[row]) - was >= 2 + group and was < groups * group
            assert now == was + due * group
            place = (was + torch.arange(group)) % ring
            made = quantise(
                old.tail_key[row : row + 1, :, None, place],
                old.tail_value[row : row + 1, :, None, place],
                *bits,
            )
            for name, t in buffers.tensors().items():
                if name in ("packed", "age", "tail_key", "tail_value", "tickets"):
                    assert name == "packed" or torch.equal(t, old.tensors()[name])
                    continue
                g = was // group
                if due:
                    assert torch.equal(t[row, :, g], made.tensors()[name][0, :, 0]), name
                rest = [i for i in range(groups) if not (due and i == g)]
                assert torch.equal(t[row, :, rest], old.tensors()[name][row, :, rest]), name
        if torch.equal(buffers.packed, start.packed) is False:
            break
    if groups > shape[4]:
        assert int(buffers.packed.max()) > int(start.packed.max())


def test_two_buffers_merge_into_one_result():
    shape = SHAPES[0]
    one, two = make(shape), make(shape)
    q, k, v = token(shape)
    out, lse = merge(
        *(x[..., None] if x.dim() == 2 else x for x in packed_decode(q, k, v, one, scale=0.3)),
        *(x[..., None] if x.dim() == 2 else x for x in packed_decode(q, None, None, two, scale=0.3)),
    )
    found = [reference.packed_decode(q, None, None, b, Terms(0.3)) for b in (one, two)]
    total = torch.logaddexp(found[0][1], found[1][1])
    want = sum(o * torch.exp(part - total)[..., None, None] for o, part, _ in found)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse[..., 0], total)


def test_what_no_token_stands_in_is_never_read():
    shape = SHAPES[0]
    clean = make(shape, torch.float32)
    dirty = copied(clean)
    dirty.key[:, :, 2:] = 255
    held = dirty.holds()[:, -shape[8] :]
    for row in range(2):
        for tensor in (dirty.tail_key, dirty.tail_value):
            tensor[row][:, ~held[row]] = 1e4
    given = token(shape, torch.float32)
    for a, b in zip(*(packed_decode(*given, x, scale=0.3) for x in (clean, dirty)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_no_worse_than_the_plain_form(dtype):
    shape = SHAPES[0]
    buffers, given = make(shape, dtype), token(shape, dtype)
    exact = copied(buffers, torch.float64)
    want, _, _ = reference.packed_decode(*(t.double() for t in given), exact, Terms(0.3))
    low = copied(buffers)
    fixed_plain.append(*given[1:], low)
    plain, _, _ = reference.packed_decode(given[0], None, None, low, Terms(0.3))
    # The folded sums are longer than those over keys that were made whole first.
    no_worse(packed_decode(*given, buffers, scale=0.3)[0], want, plain, factor=4.0)


def test_a_step_is_traced_whole_and_once():
    shape = SHAPES[0]
    mine = make(shape, torch.float32)
    other, graphs = copied(mine), []
    residual = torch.full((2,), 2, dtype=torch.int32)

    def record(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(q, k, v, buffers):
        found = packed_decode(q, k, v, buffers, scale=0.3)
        pack_group(buffers, residual)
        return found

    compiled = torch.compile(lambda q, k, v: step(q, k, v, mine), fullgraph=True, backend=record)
    for _ in range(35):
        given = token(shape, torch.float32)
        for a, b in zip(compiled(*given), step(*given, other), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1 and mine.packed.tolist() == other.packed.tolist() == [96, 64]


@pytest.mark.parametrize("scored", [False, True])
def test_the_operators_are_registered_correctly(scored):
    shape = SHAPES[0]
    b = make(shape, torch.float32)
    sizes, residual = (2, 4, b.slots), torch.zeros(2, dtype=torch.int32)
    held = [*b.tensors().values()]
    call = (
        *token(shape, torch.float32), held, torch.rand(2, 2, b.slots) < 0.8, torch.tensor([True, False]), torch.randn(4),
        torch.zeros(sizes) if scored else None, None if scored else residual, 0.3, None, [4, 4],
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.trainless.packed_decode.default, call, test_utils=tests)
    torch.library.opcheck(torch.ops.trainless.pack_group.default, (held, residual, [4, 4]), test_utils=tests)


def test_what_does_not_fit_is_refused():
    shape = SHAPES[0]
    buffers, (q, k, v) = make(shape), token(shape)
    with pytest.raises(InputError, match="do not fit"):
        packed_decode(q, k[:, :1], v, buffers, scale=1.0)
    with pytest.raises(InputError, match="do not fit"):
        packed_decode(q, k, None, buffers, scale=1.0)
    with pytest.raises(InputError, match="valid"):
        packed_decode(q, k, v, buffers, scale=1.0, valid=torch.ones(2, 2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="scores"):
        packed_decode(q, k, v, buffers, scale=1.0, scores=torch.zeros(2, 4, buffers.slots))
    like = torch.zeros(1, 1, 1, 6)
    with pytest.raises(InputError, match="whole number"):
        fixed_packed(like, like, k_bits=2, v_bits=4, group=4, groups=1, ring=4)
    with pytest.raises(InputError, match="at least one"):
        fixed_packed(like, like, k_bits=4, v_bits=4, group=4, groups=0, ring=4)
    wrong = quantise(torch.zeros(2, 2, 1, 8, 16), torch.zeros(2, 2, 1, 8, 16), 4, 4)
    with pytest.raises(InputError, match="do not fit"):
        fill(buffers, wrong, k, v, torch.ones(2, dtype=torch.int32))
    with pytest.raises(InputError, match="one to spare"):
        fill(buffers, None, k.repeat(1, 1, 48, 1), v.repeat(1, 1, 48, 1), torch.ones(2, dtype=torch.int32))


def test_a_cpu_tensor_is_told_why_not_triton():
    found = choose_fixed(torch.zeros(1, 1, 1, 8), make(SHAPES[0]))
    assert found.name == "torch" and "CUDA" in found.reasons[0]
