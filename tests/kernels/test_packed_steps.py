"""Decode steps on packed buffers by the compiled loop: against their meaning; two tiers against their parts, merged."""

import pytest
import torch
from fixed_cases import IDS, SHAPES, copied, make, token

from trainless.kernels.common import Terms
from trainless.kernels.dispatch import numba_missing
from trainless.kernels.quant_kv import (
    FixedTiers,
    choose_fixed,
    fill,
    fixed_packed,
    packed_decode,
    quantise,
    reference,
    tiers,
    tiers_decode,
)

pytestmark = pytest.mark.skipif(numba_missing() is not None, reason=str(numba_missing()))
LONG = (2, 6, 2, 16, 40, 44, 32, 70, 1500, 4, 4)  # several spans of codes, and of the ring


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=[*IDS, "long"])
def test_the_loop_is_what_the_reference_says(shape, dtype):
    mine = make(shape, dtype)
    near = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for step in range(3):
        given, exact = token(shape, dtype), copied(mine, torch.float64)
        assert choose_fixed(given[0], mine).name == "numba"
        valid = torch.rand(shape[0], shape[2], mine.slots) < 0.8 if step else None
        real = torch.tensor([True, step != 1])[: shape[0]]
        cap, sinks = (2.0, None) if step == 0 else (None, torch.randn(shape[1]))
        scores = torch.full((shape[0], shape[1], mine.slots), torch.nan)
        want = reference.packed_decode(
            *(t.double() for t in given), exact, Terms(0.3, None, cap, sinks), valid, real
        )
        out, lse = packed_decode(
            *given, mine, scale=0.3, softcap=cap, sink_logits=sinks, valid=valid, real=real, scores=scores
        )
        torch.testing.assert_close(out.double(), want[0], rtol=near, atol=near)
        for a, b in ((lse, want[1]), (scores, want[2])):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
        for n, t in mine.tensors().items():
            assert torch.equal(t.double(), exact.tensors()[n].double()), n


def test_rows_that_see_nothing_give_zeros():
    mine, (q, k, v) = make(SHAPES[0], torch.float32), token(SHAPES[0], torch.float32)
    scores, none = torch.ones(2, 4, mine.slots), torch.zeros(2, 2, mine.slots, dtype=torch.bool)
    out, lse = packed_decode(q, k, v, mine, scale=0.3, valid=none, scores=scores, sink_logits=torch.ones(4))
    assert not out.any() and not scores.any() and bool(lse.isneginf().all())


def test_the_threads_do_not_change_a_bit(monkeypatch):
    from trainless.kernels.quant_kv.steps import compiled

    given, found = token(LONG, torch.float32), []
    first = make(LONG, torch.float32)
    monkeypatch.setattr(compiled, "ALONE", 0)
    for count in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        found.append(packed_decode(*given, copied(first), scale=0.3)[0])
    assert torch.equal(*found)


def made_tiers() -> FixedTiers:
    """Nothing in the tiers yet, and beside them two groups of which some slots are empty."""
    like = torch.zeros(2, 2, 1, 16)
    high = fixed_packed(like, like, k_bits=4, v_bits=4, group=6, groups=3, ring=10)
    low = fixed_packed(like, like, k_bits=2, v_bits=2, group=4, groups=3, ring=1)
    other = fixed_packed(like, like, k_bits=4, v_bits=4, group=8, groups=2, ring=1)
    drawn = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 2, 2, 2, 8, 16, generator=drawn)
    fill(other, quantise(k, v, 4, 4), like[:, :, :0], like[:, :, :0], torch.zeros(2))
    seen = torch.rand(2, 2, 17, generator=drawn) < 0.8
    seen[..., -1] = False
    places = tuple(torch.full((2, 2, size), -1, dtype=torch.int32) for size in (18, 12))
    return FixedTiers(high, low, places, torch.full((2,), 16, dtype=torch.int32), (other,), (seen,))


def test_two_tiers_are_their_parts_merged_and_pack_the_same_tokens():
    """At once, in parts and as the registered operator."""
    one, parts, operator = made_tiers(), made_tiers(), made_tiers()
    buffers = [t for section in operator.sections for t in section.tensors().values()]
    for step in range(25):
        given, sinks = token((2, 4, 2, 16), torch.float32), torch.randn(4)
        real = torch.tensor([True, step % 3 != 0])
        got = tiers_decode(*given, one, scale=0.3, softcap=3.0, sink_logits=sinks, real=real)
        want, p = tiers._in_parts(*given, parts, Terms(0.3, None, 3.0, sinks), real)
        due = parts.high.age - parts.high.packed >= parts.interval
        if bool(due.any()):
            tiers.pack_chunk(parts, p, due)
        again = torch.ops.trainless.tiers_decode(
            *given, buffers, [*operator.places], operator.aged, [operator.seen[0]], real, sinks, 0.3, 3.0,
            [4, 4, 2, 2, 4, 4], [0],
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got, again)
        for other in (parts, operator):
            for a, b in zip(one.sections, other.sections, strict=True):
                for name, tensor in a.tensors().items():
                    assert torch.equal(tensor, b.tensors()[name]), name
            assert all(map(torch.equal, (*one.places, one.aged), (*other.places, other.aged)))
    assert one.high.packed.tolist() == [12, 6] and one.aged.tolist() == [41, 32]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    call = (
        *given, buffers, [*operator.places], operator.aged, [operator.seen[0]], real, None, 0.3, None,
        [4, 4, 2, 2, 4, 4], [0],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.trainless.tiers_decode.default, call, test_utils=tests)
