"""The Triton kernels of decode steps on buffers of fixed size; run by ``test_triton.py`` like triton_kernels.py."""

import inspect
import os
import random
import re

import pytest
import slot_cases
import torch
from fixed_cases import copied, make, token
from kernel_cases import no_worse
from triton_device import DEVICE, on_the_device  # noqa: F401 — a fixture that every test uses

from trainless.kernels.common import Terms
from trainless.kernels.quant_kv import fixed_pack as pack_form
from trainless.kernels.quant_kv import fixed_plain, reference, unpack
from trainless.kernels.quant_kv import fixed_triton as packed_form
from trainless.kernels.quant_kv.fixed import Stepping
from trainless.kernels.slots import SlotStep
from trainless.kernels.slots import plain as slots_plain
from trainless.kernels.slots import reference as slots_reference
from trainless.kernels.slots import triton as slots_form

ALL = DEVICE == "cuda" or os.environ.get("TRAINLESS_ALL") == "1"
# As in ``fixed_cases``: several groups and parts, two bits and eight, a width that is no power of two, nothing packed.
# In the interpreter the first one has fewer groups and a shorter ring, of several tiles and parts still.
PACKED = [
    (2, 4, 2, 32, 5, 6, 16, 70, 80, 4, 4) if ALL else (2, 4, 2, 16, 3, 4, 16, 20, 24, 4, 4),
    (1, 6, 2, 48, 2, 2, 64, 3, 20, 8, 2),
    (1, 2, 1, 16, 0, 3, 32, 1, 40, 2, 4),
]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CASES = [(s, d) for n, s in enumerate(PACKED) for m, d in enumerate(DTYPES) if ALL or n % 2 == m]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_packed_decode(shape, dtype, monkeypatch):
    monkeypatch.setattr(packed_form, "PROGRAMS", 10 * shape[0] * shape[2])
    mine, hkv = make(shape, dtype), shape[2]
    for step in range(2 + ALL):
        terms = Terms(0.3, None, 2.0 if step else None, torch.randn(shape[1]) if step else None)
        valid = torch.rand(shape[0], hkv, mine.slots) < 0.8 if step else None
        real = torch.tensor([True, False])[: shape[0]] if step else None
        scores = torch.full((shape[0], shape[1], mine.slots), torch.nan) if step else None
        given = token(shape, dtype)
        exact, low = copied(mine, torch.float64), copied(mine)
        want = reference.packed_decode(*(t.double() for t in given), exact, terms, valid, real)
        plain = fixed_plain.decode(*given, (low,), terms, Stepping((valid,), real))
        out, lse = packed_form.decode(*given, mine, terms, valid, real, scores)
        assert out.dtype == dtype and lse.dtype == torch.float32
        no_worse(out, want[0], plain[0], factor=4.0)
        near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 5e-3}
        torch.testing.assert_close(lse.double(), want[1], **near)
        if scores is not None:
            torch.testing.assert_close(scores.double(), want[2], **near)
        for name, t in mine.tensors().items():
            assert torch.equal(t, low.tensors()[name]), name  # the tickets are zero again, too


@pytest.mark.parametrize("bits", [4, 8, 2])
def test_the_instructions_that_unpack_words_say_what_the_other_form_says(bits):
    """The interpreter cannot run them, so they are carried out here: a shift, and (a & b) | c with the table 0xEA."""
    text = inspect.getsource(getattr(packed_form._planes, "fn", packed_form._planes))
    place = {4: 0, 8: 1, 2: 2}[bits]
    program = text.split("tl.inline_asm_elementwise(")[1 + place].split("dtype=")[0]
    given, out = random.Random(0).getrandbits(32), {}
    source = re.search(r"shr\.u32 t, (\$\d+), 8;", program)[1]
    held = {source: given, "t": given >> 8}
    for to, of, mask, one, table in re.findall(r"lop3\.b32 \$(\d+), (\S+), (\w+), (\w+), (\w+);", program):
        assert (one, table) == ("0x64006400", "0xEA")
        out[int(to)] = held[of] & int(mask, 16) | int(one, 16)
    assert len(out) == int(source[1:]) == 16 // bits
    for half in range(2):
        word = given >> 16 * half & 0xFFFF
        for n, pair in out.items():
            code = word >> 8 * (n % 2) + bits * (n // 2) & (1 << bits) - 1
            number = torch.tensor(pair >> 16 * half & 0xFFFF, dtype=torch.int32, device="cpu").to(torch.int16)
            assert float(number.view(torch.float16)) == 1024 + (code << bits * (n // 2))


def test_packed_decode_of_bfloat16_parameters():
    """They are read in a way of their own. The ring, whose numbers the interpreter cannot multiply, is empty."""
    mine, terms = make(PACKED[0], torch.bfloat16), Terms(0.3)
    mine.age.copy_(mine.packed)
    query = token(PACKED[0], torch.bfloat16)[0]
    want = reference.packed_decode(query.double(), None, None, copied(mine, torch.float64), terms)
    plain = fixed_plain.decode(query, None, None, (copied(mine),), terms, Stepping())
    out, lse = packed_form.decode(query, None, None, mine, terms)
    no_worse(out, want[0], plain[0], factor=4.0)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-3, atol=5e-3)


def test_packed_decode_reads_only_what_there_is():
    """NaN in the ring beside its tokens, codes of ones behind the groups."""
    shape = PACKED[0]
    clean = make(shape, torch.float16)
    dirty = copied(clean)
    dirty.key[:, :, 5:] = 255
    for row, used in enumerate(dirty.packed.tolist()):
        for name in ("key_step", "key_min", "value_step", "value_min", "value_root"):
            getattr(dirty, name)[row, :, used // 16 :] = torch.nan
        held = dirty.holds()[row, -shape[8] :]
        for tensor in (dirty.tail_key, dirty.tail_value):
            tensor[row][:, ~held] = torch.nan
    given = token(shape, torch.float16)
    for a, b in zip(*(packed_form.decode(*given, x, Terms(0.3)) for x in (clean, dirty)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_pack_group(shape, dtype):
    """The same codes and parameters as in torch, in rows that are due; a constant channel and an empty one, too."""
    residual = torch.tensor([1, 60][: shape[0]], dtype=torch.int32)
    ring = max(shape[8], shape[6] + 6)
    mine = make((*shape[:4], max(0, shape[4] - 1), *shape[5:7], ring - 2, ring, *shape[9:]), dtype)
    mine.tail_key[..., 1], mine.tail_value[..., 2] = 3.0, 0.0
    other, before = copied(mine), mine.packed.clone()
    pack_form.pack_group(mine, residual)
    fixed_plain.pack_group(other, residual)
    near = {"rtol": 1e-6 if dtype == torch.float32 else 2e-3, "atol": 1e-6}
    for name, t in mine.tensors().items():
        held = other.tensors()[name]
        if t.is_floating_point():  # torch's root is not always the nearest number
            torch.testing.assert_close(t, held, **near)
        elif t.dtype == torch.uint8:
            bits = mine.k_bits if name == "key" else mine.v_bits
            off = (unpack(t, bits).int() - unpack(held, bits).int()).abs()
            assert off.max() <= 1 and off.float().mean() < 0.01, name
        else:
            assert torch.equal(t, held), name
    assert (mine.packed > before).any()


# (B, H, Hkv, slots, held, D): several parts and blocks, a group of heads, one slot to spare
SLOTS = [(2, 4, 2, 161, 160, 16), (1, 6, 2, 70, 20, 24), (1, 1, 1, 2, 1, 8)]
FEW = {
    "oldest": 1,
    "sum": 0,
    "sum-max-normalised": 1,
    "sum-first": 0,
    "last-mean": 2,
    "last-shared": 0,
    "draw": 0,
}
SLOT_CASES = [
    (name, s, DTYPES[(n + m) % 2])
    for n, name in enumerate(slot_cases.RULES)
    for m, s in enumerate(SLOTS)
    if ALL or m == FEW[name]
]


@pytest.mark.parametrize(("name", "shape", "dtype"), SLOT_CASES, ids=str)
def test_slot_decode(name, shape, dtype, monkeypatch):
    monkeypatch.setattr(slots_form, "BLOCK", 64)
    rule, b = slot_cases.RULES[name], shape[0]
    never = torch.tensor([[[0, 5], [7, 7]]]).expand(b, 2, 2).contiguous() if shape[4] > 8 else None
    moving = name == "oldest"
    mine = slot_cases.make(shape, rule, dtype, never=never, short=True, turned=moving)
    by = slot_cases.turn(shape[5]) if moving else None
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 5e-3}
    for step in range(2 + ALL):
        terms = Terms(0.3, None, 2.0 if step else None, torch.randn(shape[1]) if step else None)
        real = torch.tensor([True, False])[:b] if step == 1 else None
        given = slot_cases.token(shape, dtype)
        exact, low = slot_cases.copied(mine, torch.float64), slot_cases.copied(mine)
        want = slots_reference.decode(SlotStep(*(t.double() for t in given), exact, rule, terms, real, by))
        plain = slots_plain.decode(SlotStep(*given, low, rule, terms, real, by))
        got = slots_form.decode(SlotStep(*given, mine, rule, terms, real, by))
        assert got.dtype == dtype
        no_worse(got, want, plain, factor=4.0)
        for n, t in mine.tensors().items():
            if n == "scores":
                torch.testing.assert_close(t.double(), exact.scores, **near)
            else:
                assert torch.equal(t, low.tensors()[n]), (step, n)
