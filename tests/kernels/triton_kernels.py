"""Every Triton kernel against float64: in Triton's interpreter on the CPU, or compiled on a GPU where there is one.

Run by ``test_triton.py`` in a process of its own: the interpreter has to be chosen before Triton is imported,
and other tests of the same run may have imported it. It knows no bfloat16 arithmetic: float32 and float16
there, bfloat16 and wide heads on a GPU.
"""

import dataclasses
import os

import pytest
import torch
from kernel_cases import edit, make, no_worse, oracle, times_values
from packed_cases import IDS as PACKED_IDS
from packed_cases import SHAPES as PACKED_SHAPES
from packed_cases import Case as PackedCase
from packed_cases import dense as packed_dense
from test_block_sparse import PATTERNS, pattern_of, truth_of
from triton_device import DEVICE, on_the_device  # noqa: F401 — a fixture that every test uses

from trainless.kernels import attention, visibility
from trainless.kernels import tiles as tiles_of
from trainless.kernels.block_sparse import triton as block_sparse_form
from trainless.kernels.column_mass import triton as column_mass_form
from trainless.kernels.common import Terms
from trainless.kernels.group_mass import triton as group_mass_form
from trainless.kernels.lse import triton as lse_form
from trainless.kernels.mass_move import triton as mass_move_form
from trainless.kernels.quant_kv import reference as packed_reference
from trainless.kernels.quant_kv import triton as packed_form
from trainless.kernels.window2d import Window2d
from trainless.kernels.window2d import reference as window2d_reference
from trainless.kernels.window2d import triton as window2d_form

KINDS = ("full", "causal", "left", "keys", "window", "local", "dense", "per_head", "additive")
SHAPES = [(1, 2, 1, 70, 70, 24), (1, 4, 1, 5, 90, 16), (2, 2, 2, 40, 33, 16), (1, 1, 1, 1, 1, 16)]
DTYPES = [torch.float32, torch.float16]
# The interpreter is slow: by default it sees one shape of each kind, and another one from kind to kind.
ALL = DEVICE == "cuda" or os.environ.get("TRAINLESS_ALL") == "1"
WIDE: list[tuple[int, ...]] = []
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)
    # What models have: several tiles, head widths up to the widest.
    WIDE = [
        (2, 4, 2, 301, 301, 64),
        (1, 8, 2, 200, 333, 128),
        (1, 2, 1, 130, 130, 256),
        (1, 2, 2, 90, 90, 80),
    ]
terms_of = lambda case: Terms(case.scale, **case.terms)  # noqa: E731


# Every second kind with soft-cap, position bias and learned sinks; the other kinds in all shapes.
CASES = [
    pytest.param(kind, shape, bool(n % 2), id=f"{kind}-{shape[3]}x{shape[4]}")
    for n, kind in enumerate(KINDS)
    for shape in SHAPES[: 1 if n % 2 else 4]
    if ALL or shape == SHAPES[0 if n % 2 else n // 2 % 4]
]
# Without mask and bias most tiles are computed without a mask, with and without a cap; also with more queries than keys.
CASES += [
    pytest.param("causal", shape, extras, id=f"causal-{shape[3]}x{shape[4]}-{extras or 'plain'}")
    for shape, extras in (
        (SHAPES[1], False),
        ((1, 2, 1, 150, 70, 16), False),
        (SHAPES[0], "cap"),
    )
]
CASES += [
    pytest.param(kind, shape, False, id=f"{kind}-{shape[3]}x{shape[4]}x{shape[5]}")
    for kind in ("full", "causal", "left", "window")
    for shape in WIDE
]
# A type differs from another in how its products are rounded, so the second one sees one shape of each kind.
TYPED = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}")
    for dtype in DTYPES
    for case in CASES
    if dtype == DTYPES[0] or case.values[1] in (SHAPES[0], *WIDE)
]


@pytest.mark.parametrize(("kind", "shape", "extras", "dtype"), TYPED)
def test_attention(kind, shape, extras, dtype):
    case = make(kind, shape, dtype, extras=extras)
    _, _, want, lse = oracle(case)
    _, _, plain, plain_lse = oracle(case, dtype)
    out, got = lse_form.attention(*case.qkv, visibility=case.seen(), terms=terms_of(case))
    assert out.dtype == dtype and got.dtype == torch.float32
    no_worse(out, want, plain)
    sees = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(got), sees)
    no_worse(got[sees], lse[sees], plain_lse[sees])


@pytest.mark.parametrize(("kind", "shape", "extras", "dtype"), TYPED)
def test_column_mass(kind, shape, extras, dtype):
    case = make(kind, shape, dtype, extras=extras)
    _, a, _, _ = oracle(case)
    z, _, _, plain_lse = oracle(case.to(torch.float32), torch.float32)
    b, h, lq = case.query.shape[:3]
    rows = torch.rand(b, lq) < 0.7
    plain = torch.exp(z - plain_lse[..., None]).nan_to_num(0.0) * rows[:, None, :, None]
    want = (a * rows[:, None, :, None]).sum(2)
    heads = [h - 1, 0] if h > 1 else [0]
    options = {"visibility": case.seen(), "terms": terms_of(case), "rows": rows}
    _, lse = lse_form.attention(*case.qkv, visibility=case.seen(), terms=terms_of(case))
    call = (case.query, case.key, lse)
    no_worse(column_mass_form.column_mass(*call, **options), want, plain.sum(2))
    some = column_mass_form.column_mass(*call, heads=heads, **options)
    no_worse(some, want[:, heads], plain.sum(2)[:, heads])
    hkv, lk = case.key.shape[1:3]
    group = column_mass_form.column_mass(*call, group="sum", **options)
    torch.testing.assert_close(group.double(), want.view(b, hkv, -1, lk).sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "keep"), [(d, 0.4 if n else 0.0) for n, d in enumerate(DTYPES)], ids=str)
@pytest.mark.parametrize(("kind", "shape", "extras"), CASES)
def test_mass_move(kind, shape, extras, keep, dtype):
    case = make(kind, shape, dtype, extras=extras)
    b, h, lq = case.query.shape[:3]
    case.key[:, :, 0] *= 3  # rows on both sides of the limit from which they are computed again
    source = torch.rand(b, h, case.key.shape[2]) < 0.3
    source[:, : h // 2 + 1, 0] = True
    rows = torch.rand(b, 1, lq) < 0.8
    _, a, _, _ = oracle(case)
    want = times_values(edit(a, case.truth, source, keep, None, rows), case.value.double())
    _, eager, _, _ = oracle(case, dtype)
    plain = times_values(edit(eager, case.truth, source, keep, None, rows).to(dtype), case.value)
    options = {"visibility": case.seen(), "terms": terms_of(case)}
    out, lse = lse_form.attention(*case.qkv, **options)
    before = out.clone()
    heads = list(range(h))[::-1]
    got = mass_move_form.mass_move(
        *case.qkv, out, lse, source=source.flip(1), keep=keep, rows=rows, heads=heads, **options
    )
    assert torch.equal(out, before)
    no_worse(got, want, plain, factor=4.0 if dtype == torch.float32 else 2.0)
    still = ~rows.expand(b, h, lq)
    assert torch.equal(got[still], out[still])
    assert torch.equal(mass_move_form.mass_move(
        *case.qkv, out, lse, source=source, keep=1.0, rows=None, heads=None, **options
    ), out)  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("kind", "shape", "extras"), CASES)
def test_block_sparse(kind, shape, extras, name):
    if name == "spans" and kind not in ("causal", "left", "window"):
        kind = "causal"
    dtype = DTYPES[len(kind) % len(DTYPES)]
    case = make(kind, shape, dtype, extras=extras)
    pattern, allowed = pattern_of(name, shape)
    got = block_sparse_form.block_sparse(*case.qkv, pattern, visibility=case.seen(), terms=terms_of(case))
    assert got.dtype == dtype
    no_worse(got, truth_of(case, allowed), truth_of(case, allowed, dtype))


LISTED = [(1, 4, 1, 70, 90, 16), (2, 2, 2, 40, 33, 16), (1, 6, 2, 50, 50, 24)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "shape"), [
    ("blocks", LISTED[1]), ("blocks-shared", LISTED[0]), ("blocks-shared", LISTED[2]), ("spans", LISTED[0]),
], ids=str)  # fmt: skip
def test_block_sparse_over_lists_of_tiles(name, shape, dtype):
    """Heads of a group together and apart, through descriptors and without, one pattern for two layers."""
    pattern, allowed = pattern_of(name, shape)
    for kind in ("causal",) if name == "spans" else ("causal", "full"):
        for extras in (False, True):
            case = make(kind, shape, dtype)
            if extras:
                case.terms = {"sink_logits": torch.randn(shape[1])}
            before = dict(pattern.made)
            call = (*case.qkv, pattern)
            got = block_sparse_form.block_sparse(*call, visibility=case.seen(), terms=terms_of(case))
            no_worse(got, truth_of(case, allowed), truth_of(case, allowed, dtype))
            assert len(pattern.made) == len(before) + (not extras)
            assert all(pattern.made[key] is value for key, value in before.items())


def test_block_sparse_reads_and_writes_only_its_own():
    case = make("causal", (2, 4, 2, 70, 70, 24), torch.float32)
    options = {"visibility": case.seen(), "terms": terms_of(case)}
    pattern, _ = pattern_of("subset", (2, 4, 2, 70, 70, 24))
    want = block_sparse_form.block_sparse(*case.qkv, pattern, **options)
    q, k, v = (t.clone() for t in case.qkv)
    for tensor in (q, k, v):
        tensor.transpose(1, 2)[~pattern.keys] = torch.nan
    got = block_sparse_form.block_sparse(
        q, k.transpose(2, 3).contiguous().transpose(2, 3), v, pattern, **options
    )
    assert torch.equal(got, want) and not got.transpose(1, 2)[~pattern.keys].any()


@pytest.mark.parametrize(("kind", "shape", "extras", "dtype"), TYPED)
def test_group_mass(kind, shape, extras, dtype):
    case = make(kind, shape, dtype, extras=extras)
    _, a, _, lse = oracle(case)
    _, plain, _, plain_lse = oracle(case.to(torch.float32), torch.float32)
    b, _, hkv, lq, lk, _ = shape
    rows = torch.rand(b, lq) < 0.6
    groups = torch.randint(0, 4, (b, hkv, lk))
    asked = rows[:, None, :, None]

    def summed(p):
        of = groups.repeat_interleave(p.shape[1] // hkv, 1)
        return torch.stack([p.masked_fill((of != g)[:, :, None], 0).sum(-1) for g in (1, 2, 3)], -1) * asked

    for given in (None, plain_lse):
        options = {"groups": groups, "count": 3, "rows": rows, "lse": given}
        got, found = group_mass_form.group_mass(
            case.query, case.key, visibility=case.seen(), terms=terms_of(case), **options
        )
        if given is None:
            no_worse(got, summed(a), summed(plain))
        torch.testing.assert_close(got.double(), summed(a), rtol=1e-4, atol=1e-5)
        sees = torch.isfinite(lse) & rows[:, None]
        assert torch.equal(torch.isfinite(found), sees)
        torch.testing.assert_close(found[sees].double(), lse[sees], rtol=1e-5, atol=1e-5)


def test_views_and_memory_around_the_result():
    """Tokens before heads, a slice of a longer cache: nothing outside is read, nothing beside is written."""
    case = make("causal", (2, 4, 2, 37, 37, 24), torch.float32)
    q = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([case.key, torch.full_like(case.key, torch.nan)], 2)[:, :, :37]
    v = case.value.transpose(2, 3).contiguous().transpose(2, 3)
    options = {"visibility": case.seen(), "terms": terms_of(case)}
    out, lse = lse_form.attention(q, k, v, **options)
    same, _ = lse_form.attention(*case.qkv, **options)
    assert torch.equal(out, same)
    mass = column_mass_form.column_mass(q, k, lse, **options)
    assert torch.equal(mass, column_mass_form.column_mass(*case.qkv[:2], lse, **options))
    guarded = torch.full((2, 4, 39, 26), 7.0)
    view = guarded[:, :, 1:38, 1:25]
    view.copy_(out)
    source = torch.rand(2, 2, 37) < 0.3
    move = {"source": source, "keep": 0.4, "rows": None, "heads": [2, 1], **options}
    got = mass_move_form.mass_move(q, k, v, view, lse, **move)
    assert torch.equal(got, mass_move_form.mass_move(*case.qkv, out, lse, **move))
    assert torch.equal(got[:, [0, 3]], out[:, [0, 3]])
    assert torch.equal(view, out) and (guarded[:, :, 0] == 7).all() and (guarded[..., 25] == 7).all()


def test_rows_that_see_nothing():
    case = make("dense", (1, 2, 1, 20, 20, 16), torch.float32)
    case.truth[0, 0, 4] = False
    options = {"visibility": case.seen(), "terms": terms_of(case)}
    out, lse = lse_form.attention(*case.qkv, **options)
    assert not out[0, :, 4].any() and torch.isneginf(lse[0, :, 4]).all()
    mass = column_mass_form.column_mass(*case.qkv[:2], lse, **options)
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 19.0))
    source = torch.ones(1, 2, 20, dtype=torch.bool)
    got = mass_move_form.mass_move(
        *case.qkv, out, lse, source=source, keep=0.1, rows=None, heads=None, **options
    )
    assert torch.equal(got, out)


def test_the_forms_agree_with_the_cpu_forms():
    case = make("left", (2, 4, 2, 70, 70, 16), torch.float32)
    out, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    got, got_lse = lse_form.attention(*case.qkv, visibility=case.seen(), terms=terms_of(case))
    torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_lse, lse, rtol=1e-6, atol=1e-5)


def operands(kind, extras):
    case = make(kind, (2, 2, 1, 20, 20, 16), torch.float32, extras=extras)
    seen, terms = case.seen(), case.terms
    mask = (seen.causal, seen.window, seen.keys, seen.dense, terms.get("position_bias"), terms.get("softcap"))
    return case, mask, terms.get("sink_logits")


@pytest.mark.parametrize(("kind", "extras"), [("causal", False), ("left", True), ("dense", False)])
def test_the_operators_are_registered_correctly(kind, extras):
    case, mask, sinks = operands(kind, extras)
    heads = torch.tensor([1, 0])
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    check(torch.ops.trainless.attention_lse.default, (*case.qkv, 0.3, *mask, sinks), test_utils=tests)
    out, lse = torch.ops.trainless.attention_lse(*case.qkv, 0.3, *mask, sinks)
    arguments = (case.query, case.key, lse.masked_fill(torch.isneginf(lse), torch.inf), heads, 0.3, *mask)
    check(torch.ops.trainless.column_mass.default, arguments, test_utils=tests)
    source = torch.rand(2, 2, 20) < 0.3
    arguments = (*case.qkv, out, lse, source, torch.full((2, 2, 20), 0.4), heads, 0.3, *mask, sinks)
    check(torch.ops.trainless.mass_move.default, arguments, test_utils=tests)
    groups, rows = torch.randint(0, 3, (2, 1, 20), dtype=torch.int32), torch.rand(2, 20) < 0.5
    arguments = (case.query, case.key, groups, 2, rows, None, 0.3, *mask, sinks)
    check(torch.ops.trainless.group_mass.default, arguments, test_utils=tests)


def test_a_compiler_sees_one_operator_each():
    case, mask, sinks = operands("causal", False)
    seen = []

    def record(graph, _):
        seen.extend(str(n.target) for n in graph.graph.nodes if "trainless" in str(n.target))
        return graph.forward

    def both(q, k, v):
        out, lse = torch.ops.trainless.attention_lse(q, k, v, 0.3, *mask, sinks)
        return out, torch.ops.trainless.column_mass(q, k, lse, torch.arange(2), 0.3, *mask)

    got = torch.compile(both, fullgraph=True, backend=record)(*case.qkv)
    assert len(seen) == 2, seen
    for a, b in zip(got, both(*case.qkv), strict=True):
        assert torch.equal(a, b)


def test_addresses_are_wide(monkeypatch):
    """A batch stride beyond 2**31 elements: the second batch row lies 4 GiB away, in memory never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**31 + 64
    try:
        base = torch.empty(stride + 20 * 16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("cannot reserve 4 GiB of address space")
    q = base.as_strided((2, 1, 20, 16), (stride, 320, 16, 1))
    small = torch.randn(2, 1, 20, 16).half()
    q.copy_(small)
    terms, seen = Terms(0.3), visibility(None, causal=True, lq=20, lk=20)
    got = lse_form.attention(q, q, q, visibility=seen, terms=terms)
    want = lse_form.attention(small, small, small, visibility=seen, terms=terms)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("kind", "tiles"),
    [("left", (32, 64)), ("causal", (64, 32)), ("causal", (128, 16))][: 3 if ALL else 1],
    ids=str,
)
def test_tiles_of_the_table(kind, tiles, monkeypatch):
    """Tiles whose two sides differ, as a measured table has them; taken by half precision where there is memory."""
    monkeypatch.setattr(tiles_of, "shared_memory", lambda device: 1 << 30)
    names = ("attention", "column_mass", "group_mass", "mass_move", "block_sparse")
    monkeypatch.setattr(tiles_of, "HOPPER", {name: {32: (*tiles, 4, 2)} for name in names})
    shape = (1, 2, 1, 150, 170, 24) if ALL else (1, 2, 1, 70, 90, 24)
    case = make(kind, shape, torch.float16)
    plain = case.to(torch.float32)  # which no table is for
    options = {"visibility": case.seen(), "terms": terms_of(case)}
    out, lse = lse_form.attention(*case.qkv, **options)
    wide, wide_lse = lse_form.attention(*plain.qkv, **options)
    near = {"rtol": 5e-3, "atol": 5e-3}
    torch.testing.assert_close(out.float(), wide, **near)
    torch.testing.assert_close(lse, wide_lse, rtol=1e-3, atol=1e-3)
    got = column_mass_form.column_mass(case.query, case.key, lse, **options)
    want = column_mass_form.column_mass(plain.query, plain.key, wide_lse, **options)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    source = torch.rand(1, 2, shape[4]) < 0.2
    move = {"source": source, "keep": 0.4, "rows": None, "heads": None, **options}
    torch.testing.assert_close(
        mass_move_form.mass_move(*case.qkv, out, lse, **move).float(),
        mass_move_form.mass_move(*plain.qkv, wide, wide_lse, **move), rtol=1e-2, atol=1e-2,
    )  # fmt: skip
    groups = torch.randint(0, 3, (1, 1, 170))
    rest = {"groups": groups, "count": 2, "rows": None, "lse": None, **options}
    torch.testing.assert_close(
        group_mass_form.group_mass(case.query, case.key, **rest)[0],
        group_mass_form.group_mass(plain.query, plain.key, **rest)[0], **near,
    )  # fmt: skip
    pattern, _ = pattern_of("subset", shape)
    torch.testing.assert_close(
        block_sparse_form.block_sparse(*case.qkv, pattern, **options).float(),
        block_sparse_form.block_sparse(*plain.qkv, pattern, **options), **near,
    )  # fmt: skip


GRID_WINDOWS = [
    Window2d((17, 11), 4.2, text=5),
    Window2d((9, 16), 3, "square", text=40, text_first=False),
    Window2d((13, 10), 2, dilation=3, text=1),
    Window2d((1, 1), 8),
    Window2d((3, 19), 100, "square", 2),
]


@pytest.mark.parametrize(("dtype", "extra"), [(d, None if n else 3) for n, d in enumerate(DTYPES)], ids=str)
@pytest.mark.parametrize("w", GRID_WINDOWS, ids=str)
def test_window2d(w, dtype, extra):
    width = 64 if DEVICE == "cuda" else 24  # for which there are measured tiles

    def make(heads, length):
        return torch.randn(1, length, heads, width).to(dtype).transpose(1, 2)

    q, k, v = make(2, w.tokens), make(1, w.tokens), make(1, w.tokens)
    more = None if extra is None else (make(1, extra), make(1, extra))
    exact = None if more is None else (more[0].double(), more[1].double())
    want, lse = window2d_reference.window2d(
        q.double(), k.double(), v.double(), window=w, scale=0.3, extra=exact
    )
    plain, plain_lse = window2d_reference.window2d(q, k, v, window=w, scale=0.3, extra=more)
    out, got = window2d_form.window2d(q, k, v, window=w, scale=0.3, extra=more)
    assert out.dtype == dtype and got.dtype == torch.float32
    no_worse(out, want, plain)
    no_worse(got, lse, plain_lse.float())


def test_the_operator_of_window2d_is_registered_correctly():
    w = Window2d((5, 6), 2, text=3)
    q, k, v = (torch.randn(1, 2, w.tokens, 16) for _ in range(3))
    call = (q, k, v, 0.3, 5, 6, 3, True, True, w.most, w.reach, 1, None, None)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.trainless.window2d.default, call, test_utils=tests)


# One group or several of whole tiles, spans of several tiles, and a last one that ends before its tiles do.
LONG_PACKED = [(1, 2, 1, 1, 16, 5, 64, 4, 4), (1, 2, 2, 1, 16, 3, 128, 2, 8), (1, 1, 1, 2, 16, 1, 300, 8, 4)]


@pytest.mark.parametrize("shape", [*PACKED_SHAPES, *LONG_PACKED], ids=str)
def test_packed_rows_read_only_their_own(shape):
    """In spans as they are, with NaN behind every parameter: a tile past the last group would take it up."""
    case = PackedCase(shape, torch.float32)

    def guarded(t):
        if t is None:
            return None
        wide = torch.full((t.numel() + 4096,), torch.nan if t.is_floating_point() else 255).to(t.dtype)
        wide[: t.numel()] = t.flatten()
        return wide[: t.numel()].view(t.shape)

    segments = []
    for s in case.segments:
        names = ("key", "key_step", "key_min", "value", "value_step", "value_min", "value_root")
        segments.append(dataclasses.replace(s, **{n: guarded(getattr(s, n)) for n in names}))
    want = packed_form.rows(case.query, case.segments, Terms(0.3), None, True)
    exact = packed_reference.rows(case.query.double(), case.segments, Terms(0.3))
    got = packed_form.rows(case.query, segments, Terms(0.3), None, True)
    for a, b, c in zip(got, want, exact, strict=False):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=PACKED_IDS)
def test_packed_rows(shape, dtype, monkeypatch):
    monkeypatch.setattr(packed_form, "SPAN", 40)
    case = PackedCase(shape, dtype, holes=shape[0] == 2)
    exact = [packed_reference.dequantise(s, torch.float64) for s in case.segments]
    key, value = (torch.cat(t, 2) for t in zip(*exact, strict=True))
    want = packed_dense(case.query.double(), key, value, 0.3, 2.5, valid=case.valid)
    plain = packed_dense(case.query, key.to(dtype), value.to(dtype), 0.3, 2.5, valid=case.valid)
    out, p, lse = packed_form.rows(case.query, case.segments, Terms(0.3, softcap=2.5), case.valid, True)
    assert out.dtype == dtype and p.dtype == lse.dtype == torch.float32
    no_worse(out, want[0], plain[0])
    no_worse(p, want[1], plain[1].float(), factor=4.0)
    if DEVICE == "cuda" and dtype != torch.float32:  # products of half precision run as TF32 there
        no_worse(lse, want[2], plain[2].float())
    else:
        torch.testing.assert_close(lse.double(), want[2], rtol=0, atol=2e-5)


def test_a_reach_beyond_32_bits_takes_the_other_form(monkeypatch):
    monkeypatch.setattr(window2d_form, "LONGEST", 1)
    w = GRID_WINDOWS[0]
    q, k, v = (torch.randn(1, 2, w.tokens, 16) for _ in range(3))
    got = window2d_form.window2d(q, k, v, window=w, scale=0.3)
    want = window2d_reference.window2d(q, k, v, window=w, scale=0.3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
