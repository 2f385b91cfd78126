"""Packed keys and values: codes, parameters, and attention on them in every form."""

import copy

import pytest
import torch
from kernel_cases import Largest, no_worse
from packed_cases import IDS, SHAPES, Case, dense, read_back

from trainless.errors import InputError
from trainless.kernels.common import Terms
from trainless.kernels.dispatch import numba_missing
from trainless.kernels.quant_kv import (
    Segment,
    api,
    blocked,
    choose,
    dequantise,
    pack,
    packed_attention,
    packed_rows,
    quantise,
    raw,
    reference,
    unpack,
    weigh,
)

SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=IDS)


@pytest.fixture(params=["numba", "blocked"], autouse=True)
def form(request, monkeypatch):
    """Everything here is asked of both forms for the CPU."""
    if request.param == "blocked":
        monkeypatch.setattr(api, "numba_reasons", lambda tensors: ("numba: not in this test",))
    elif numba_missing() is not None:
        pytest.skip(numba_missing())
    return request.param


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_come_back(bits):
    codes = torch.randint(0, 1 << bits, (3, 5, 24))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == 24 * bits // 8
    assert torch.equal(unpack(packed, bits).long(), codes)


@SHAPED
def test_packing_is_rounding_between_the_ends(shape):
    case = Case(shape)
    key, value = reference.dequantise(case.segment, torch.float64)
    size = case.key.shape[3]
    for g in range(case.key.shape[2]):
        want = read_back(case.key[0, 0, g], case.value[0, 0, g], case.k_bits, case.v_bits)
        for got, right in zip((key, value), want, strict=True):
            torch.testing.assert_close(got[0, 0, g * size : (g + 1) * size], right, rtol=0, atol=1e-12)


def test_what_does_not_exist_has_no_influence():
    case = Case(SHAPES[0], holes=True)
    wild = case.key.masked_fill(~case.exists[..., None], torch.nan), case.value.clone()
    wild[1][~case.exists] = torch.inf
    again = quantise(*wild, 4, 4, case.exists)
    for name, tensor in case.segment.tensors().items():
        assert torch.equal(getattr(again, name), tensor), name


def test_constant_channels_tokens_and_zeros():
    key, value = torch.ones(1, 1, 1, 4, 8), torch.zeros(1, 1, 1, 4, 8)
    k, v = reference.dequantise(quantise(key, value, 2, 2), torch.float32)
    assert torch.equal(k, key[:, :, 0]) and torch.equal(v, value[:, :, 0])


@SHAPED
@pytest.mark.parametrize("holes", [False, True], ids=["full", "holes"])
@pytest.mark.parametrize("tile", [1, 200, 1 << 19])
def test_rows_equal_dense_attention(shape, holes, tile, monkeypatch):
    monkeypatch.setattr(blocked, "TILE", tile)
    case = Case(shape, holes=holes)
    h, lq, slots = shape[1], shape[3], case.segment.slots + 3
    terms = {
        "softcap": 2.5,
        "bias": torch.randn(1, h, lq, slots, dtype=torch.float64),
        "sinks": torch.randn(h),
    }
    want = case.truth(0.3, **terms)
    names = {"softcap": 2.5, "position_bias": terms["bias"], "sink_logits": terms["sinks"]}
    got = packed_rows(case.query, case.segments, scale=0.3, valid=case.valid, lse=True, **names)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    same = reference.rows(case.query, case.segments, Terms(0.3, **names), case.valid)
    for a, b in zip(same, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@SHAPED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_that_of_ordinary_attention_on_the_same_numbers(shape, dtype):
    case = Case(shape, dtype)
    exact = [reference.dequantise(s, torch.float64) for s in case.segments]
    key, value = (torch.cat(t, 2) for t in zip(*exact, strict=True))
    want = dense(case.query.double(), key, value, 0.3)
    plain = dense(case.query, key.to(dtype), value.to(dtype), 0.3)
    out, p, lse = packed_rows(case.query, case.segments, scale=0.3, lse=True)
    assert out.dtype == dtype and p.dtype == lse.dtype == torch.float32
    # Codes times steps and minima are added up apart, and the two sums partly cancel: in float32 that shows.
    no_worse(out, want[0], plain[0], factor=4.0 if dtype == torch.float32 else 2.0)
    no_worse(p, want[1], plain[1].float())
    torch.testing.assert_close(weigh(p, case.segments).double(), want[0], rtol=0, atol=2e-6)


@SHAPED
@pytest.mark.parametrize("holes", [False, True], ids=["full", "holes"])
def test_many_rows_meet_blocks(shape, holes, monkeypatch):
    monkeypatch.setattr("trainless.kernels.quant_kv.api.BLOCK", 7)
    case = Case(shape, holes=holes)
    want = case.truth(0.3)
    held = None if case.valid is None else case.valid[:, :, 0]
    out, lse = packed_attention(case.query, case.segments, scale=0.3, valid=held)
    torch.testing.assert_close(out, want[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want[2], rtol=0, atol=1e-12)


def test_groups_that_have_lost_tokens(form):
    """Slots moved together keep the parameters of the group they came from."""
    case = Case((2, 4, 2, 2, 8, 3, 5, 4, 2))
    order = torch.stack([torch.randperm(15)[:6].sort().values for _ in range(4)]).view(2, 2, 6)
    whole = case.segment
    take = lambda t: t.flatten(2, 3).gather(2, order[..., None].expand(2, 2, 6, t.shape[4]))[:, :, None]  # noqa: E731
    slot = lambda t: t.flatten(2, 3).gather(2, order)[:, :, None]  # noqa: E731
    some = Segment(
        4, 2, take(whole.key), take(whole.value), whole.key_step, whole.key_min, slot(whole.value_step),
        slot(whole.value_min), whole.value_root, (order // 5).int(),
    )  # fmt: skip
    key, value = (
        t.gather(2, order[..., None].expand(2, 2, 6, 8)) for t in reference.dequantise(whole, torch.float64)
    )
    want = dense(case.query, key, value, 0.3)
    for a, b in zip(packed_rows(case.query, [some], scale=0.3, lse=True), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    chosen = choose(case.query, [some], terms=Terms(0.3))
    assert chosen.name == form and (form == "numba" or "lost tokens" in str(chosen))
    for a, b in zip(dequantise(some, 1, 5, torch.float64), (key, value), strict=True):
        torch.testing.assert_close(a, b[:, :, 1:5], rtol=0, atol=1e-12)


def test_views_and_rows_that_see_nothing():
    case = Case(SHAPES[0], torch.float32)
    wide = copy.copy(case.segment)
    wide.key = torch.cat([wide.key, torch.full_like(wide.key, 255)], 4)[..., : wide.key.shape[4]]
    query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    want = packed_rows(case.query, case.segments, scale=0.3)[0]
    assert torch.equal(packed_rows(query, [wide, case.segments[1]], scale=0.3)[0], want)
    nothing = torch.zeros(2, 2, 1, case.segment.slots + 3, dtype=torch.bool)
    out, p, lse = packed_rows(case.query, case.segments, scale=0.3, valid=nothing, lse=True)
    assert not out.any() and not p.any() and lse.isneginf().all()


def test_empty_segments():
    case = Case(SHAPES[0], torch.float32)
    empty = raw(*(t[:, :, :0] for t in case.near))
    got = packed_rows(case.query, [case.segment, empty, case.segments[1]], scale=0.3)
    for a, b in zip(got[:2], packed_rows(case.query, case.segments, scale=0.3)[:2], strict=True):
        assert torch.equal(a, b)


def test_no_tensor_of_all_keys_as_numbers(monkeypatch):
    monkeypatch.setattr(blocked, "TILE", 1 << 13)
    case = Case((1, 4, 2, 1, 32, 64, 16, 4, 4), torch.float32)
    with Largest() as largest:
        packed_rows(case.query, case.segments, scale=0.3)
    assert largest.elements <= max(1 << 13, 64 * 2 * 2 * 32) < case.key.numel()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: setattr(c, "segments", []), "at least one segment"),
        (lambda c: setattr(c, "query", c.query[..., :4]), "do not fit"),
        (lambda c: setattr(c.segment, "key_step", None), "without their parameters"),
        (lambda c: setattr(c, "valid", torch.ones(2, 2, 1, 3, dtype=torch.bool)), "over 18 slots"),
    ],
)
def test_what_does_not_fit_is_said(change, words):
    case = Case(SHAPES[0])
    change(case)
    with pytest.raises(InputError, match=words):
        packed_rows(case.query, case.segments, scale=0.3, valid=case.valid)


def test_widths_that_are_no_whole_bytes():
    with pytest.raises(InputError, match="whole number of bytes"):
        quantise(torch.randn(1, 1, 1, 3, 6), torch.randn(1, 1, 1, 3, 6), 2, 4)
    with pytest.raises(InputError, match="3 bits"):
        quantise(torch.randn(1, 1, 1, 3, 8), torch.randn(1, 1, 1, 3, 8), 3, 4)


def test_a_gradient_goes_through_packed_keys_in_several_tiles(monkeypatch):
    """Tiles lie in memory that is used again; a backward pass must still find what was there."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, 2, 4, 3, 8, dtype=torch.float64)
    segment = quantise(key, value, 4, 2)
    found = []
    for tile in (1, 1 << 20):  # one group at a time, all at once
        monkeypatch.setattr(blocked, "TILE", tile)
        query = torch.linspace(-1, 1, 64, dtype=torch.float64).view(1, 4, 2, 8).requires_grad_()
        packed_rows(query, [segment], scale=0.4)[0].square().sum().backward()
        found.append(query.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
