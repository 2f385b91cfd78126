"""A window on a grid of tokens: which pairs it has, and attention over them in every form."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Largest, no_worse

from trainless.errors import InputError
from trainless.kernels import Window2d, window2d
from trainless.kernels.dispatch import numba_missing
from trainless.kernels.window2d import api, blocked, choose, reference

EXACT = {"rtol": 0, "atol": 1e-12}
# Odd sides, single rows and columns, sides below a tile, more columns than a whole run of tiles needs.
GRIDS = [(1, 1), (1, 40), (17, 1), (3, 5), (9, 31), (24, 24), (21, 6)]
WINDOWS = [
    {"radius": 1}, {"radius": 3}, {"radius": 4.3}, {"radius": 8}, {"radius": 1e6},
    {"radius": 3, "shape": "square"}, {"radius": 2, "dilation": 3}, {"radius": 2.5, "shape": "square", "dilation": 2},
]  # fmt: skip


@pytest.fixture(params=["numba", "blocked"])
def form(request, monkeypatch):
    """What does not ask for float64 is asked of both forms for the CPU."""
    if request.param == "blocked":
        monkeypatch.setattr(api, "numba_reasons", lambda tensors, **more: ("numba: not in this test",))
    elif numba_missing() is not None:
        pytest.skip(numba_missing())
    return request.param


def seen_by_hand(w: Window2d) -> torch.Tensor:
    """bool (L, L), pair by pair from the definition."""
    rows, columns = w.grid
    image = [(y, x) for y in range(rows) for x in range(columns)]
    words = [None] * w.text
    tokens = words + image if w.text_first else image + words

    def sees(a, b):
        if a is None or b is None:
            return True
        dy, dx = a[0] - b[0], a[1] - b[1]
        if dy % w.dilation or dx % w.dilation:
            return False
        dy, dx = dy // w.dilation, dx // w.dilation
        return dy**2 + dx**2 < w.radius**2 if w.shape == "disc" else max(abs(dy), abs(dx)) < w.radius

    return torch.tensor([[sees(a, b) for b in tokens] for a in tokens])


def plain(q, k, v, seen, scale):
    """Eager attention in the dtype of its inputs, with the log-sum-exp."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    z = (q @ k.transpose(2, 3) * scale).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    z = z.masked_fill(~seen, -torch.inf)
    return z.softmax(-1).to(q.dtype) @ v, z.logsumexp(-1)


def tokens(w, b=2, h=4, hkv=2, d=16, dtype=torch.float64, extra=None):
    """query, key, value, extra: tokens before heads in memory, as image transformers have them."""

    def make(heads, length):
        return torch.randn(b, length, heads, d, dtype=torch.float64).to(dtype).transpose(1, 2)

    more = None if extra is None else (make(hkv, extra), make(hkv, extra))
    return make(h, w.tokens), make(hkv, w.tokens), make(hkv, w.tokens), more


def with_extra(w, q, k, v, more):
    """Keys, values and visible pairs (checked by hand above, on small grids) with the extra ones behind."""
    place = torch.arange(w.tokens)
    seen = w.visible(place[:, None], place[None])
    if more is None:
        return k, v, seen
    first, stop = w.image
    mine = torch.zeros(w.tokens, more[0].shape[2], dtype=torch.bool)
    mine[first:stop] = True
    return torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2), torch.cat([seen, mine], 1)


# ---------------------------------------------------------------- which pairs


@pytest.mark.parametrize("first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("kind", WINDOWS, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (7, 4), (6, 11)], ids=str)
def test_pairs_and_counts(grid, kind, first):
    w = Window2d(grid, **kind, text=3, text_first=first)
    place, want = torch.arange(w.tokens), seen_by_hand(w)
    assert torch.equal(w.visible(place[:, None], place[None]), want)
    assert torch.equal(w.counts(), want.sum(1))
    assert w.everything == bool(want.all())


@pytest.mark.parametrize(("radius", "keys"), [(8, 193), (16, 793), (32, 3205)])
def test_interior_discs_have_the_published_sizes(radius, keys):
    w = Window2d((65, 65), radius, text=512)
    assert w.counts()[512 + 32 * 65 + 32] == keys + 512
    assert w.counts()[0] == w.tokens


def test_pairs_grow_with_the_radius_to_all_of_them():
    total = [int(Window2d((9, 12), r).counts().sum()) for r in (1, 2, 3, 5, 8, 13, 14)]
    assert total == sorted(set(total)) and total[0] == 108 and total[-1] == 108**2
    assert not Window2d((4, 5), 5).everything  # strict: a corner does not see its opposite, 5 away


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("kind", WINDOWS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_form_is_exact_in_float64(grid, kind):
    n = grid[0] * grid[1]
    w = Window2d(grid, **kind, text=(0, 5, 1)[n % 3], text_first=bool(n % 2))
    q, k, v, more = tokens(w, extra=(None, 3, 0)[grid[1] % 3])
    keys, values, seen = with_extra(w, q, k, v, more)
    want, lse = plain(q, keys, values, seen, 0.3)
    for form in (reference.window2d, blocked.window2d, window2d):
        out, got = form(q, k, v, window=w, scale=0.3, extra=more)
        torch.testing.assert_close(out, want, **EXACT)
        torch.testing.assert_close(got, lse, **EXACT)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.skipif(numba_missing() is not None, reason=str(numba_missing()))
@pytest.mark.parametrize("kind", WINDOWS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_compiled_form_is_as_near_as_the_blocked_one(grid, kind):
    """Logits of some tens: rows with one large weight and rows with many."""
    n = grid[0] * grid[1]
    w = Window2d(grid, **kind, text=(0, 5, 20)[n % 3], text_first=bool(n % 2))
    q, k, v, more = tokens(w, d=(8, 24, 136)[n % 3], dtype=torch.float32, extra=(None, 100, 0)[grid[1] % 3])
    exact = None if more is None else (more[0].double(), more[1].double())
    want = reference.window2d(q.double(), k.double(), v.double(), window=w, scale=1.0, extra=exact)
    other = blocked.window2d(q, k, v, window=w, scale=1.0, extra=more)
    assert choose(q, k, v, more).name == "numba"
    got = window2d(q, k, v, window=w, scale=1.0, extra=more)
    assert got[0].transpose(1, 2).is_contiguous() and got[1].dtype == torch.float32
    # In a handful of results the other form may be nearer by luck.
    for found, exactly, near in zip(got, want, other, strict=True):
        no_worse(found, exactly, near, factor=2 if n > 100 else 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extra", [None, 9])
def test_low_precision_is_no_worse_than_eager(dtype, extra, form):
    w = Window2d((19, 26), 5, text=11)
    q, k, v, more = tokens(w, h=6, d=32, dtype=dtype, extra=extra)
    keys, values, seen = with_extra(w, q, k, v, more)
    want, lse = plain(q.double(), keys.double(), values.double(), seen, 0.4)
    eager, eager_lse = plain(q, keys, values, seen, 0.4)
    out, got = window2d(q, k, v, window=w, scale=0.4, extra=more)
    assert out.dtype == dtype and got.dtype == torch.float32
    no_worse(out, want, eager)
    no_worse(got, lse, eager_lse)


def test_a_radius_beyond_the_diagonal_is_dense_attention(form):
    w = Window2d((12, 20), 24, text=7, text_first=False)
    q, k, v, _ = tokens(w, h=2, dtype=torch.float32)
    assert w.everything
    out, _ = window2d(q, k, v, window=w, scale=0.25)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.25), rtol=0, atol=1e-5)


def test_text_rows_are_dense_and_extra_keys_are_not_theirs():
    w = Window2d((9, 9), 2, text=6)
    q, k, v, more = tokens(w, h=2, extra=4)
    out, _ = window2d(q, k, v, window=w, scale=0.3, extra=more)
    want = F.scaled_dot_product_attention(q[:, :, :6], k, v, scale=0.3)
    torch.testing.assert_close(out[:, :, :6], want, **EXACT)


def test_extra_keys_equal_to_the_images_own_count_them_twice():
    """Pooling by patches of one token: with everything in the window, each image key is there twice."""
    w = Window2d((5, 7), 100, text=3)
    q, k, v, _ = tokens(w, h=2)
    image = (k[:, :, 3:], v[:, :, 3:])
    out, _ = window2d(q, k, v, window=w, scale=0.3, extra=image)
    bias = torch.zeros(38, dtype=torch.float64)
    bias[3:] = math.log(2)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(38, 38), scale=0.3)
    torch.testing.assert_close(out[:, :, 3:], want[:, :, 3:], **EXACT)


def test_views_and_memory_around_the_inputs(form):
    """Slices of a longer sequence with NaN beside them, and a width that is not the last stride."""
    w = Window2d((13, 21), 4, text=2)
    q, k, v, _ = tokens(w, dtype=torch.float32)
    want = window2d(q, k, v, window=w, scale=0.3)
    odd = [torch.cat([t, torch.full_like(t, torch.nan)], 2)[:, :, : w.tokens] for t in (q, k)]
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    got = window2d(*odd, turned, window=w, scale=0.3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (1, 2)])
def test_empty_and_single_tokens(batch, heads):
    w = Window2d((1, 1), 8)
    q, k, v, _ = tokens(w, b=batch, h=heads, hkv=heads)
    out, lse = window2d(q, k, v, window=w, scale=0.3)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert torch.equal(out, v)


def test_values_of_another_width_and_gradients_take_the_plain_product():
    w = Window2d((6, 13), 3, text=2)
    q, k, v, _ = tokens(w)
    wide = torch.cat([v, v], 3)
    out, _ = window2d(q, k, wide, window=w, scale=0.3)
    torch.testing.assert_close(out, torch.cat([window2d(q, k, v, window=w, scale=0.3)[0]] * 2, 3), **EXACT)
    grads = []
    for form in (window2d, reference.window2d):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        made, lse = form(*leaves, window=w, scale=0.3)
        (made.square().sum() + lse.sum()).backward()
        grads.append([t.grad for t in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_memory_is_linear():
    """Neither the pairs nor the gathered halos of the whole grid are ever there at once."""
    w = Window2d((96, 96), 8)
    q, k, v, _ = tokens(w, b=1, h=1, hkv=1, dtype=torch.float32)
    with Largest() as largest:
        window2d(q, k, v, window=w, scale=0.3)
    assert largest.elements <= q.numel()


@pytest.mark.parametrize("reach", [0, 3, 7, 30])
@pytest.mark.parametrize("size", [1, 4, 7, 23, 40, 96])
def test_tiles_cover_an_axis_once_and_their_halos_reach_far_enough(size, reach):
    covered = []
    for run in blocked.runs(size, 4, reach):
        for i in range(run.count):
            q0, q1, k0, k1 = (n + i * run.step for n in (run.q0, run.q1, run.k0, run.k1))
            assert (k0, k1) == (max(0, q0 - reach), min(size, q1 + reach))
            covered += range(q0, q1)
    assert covered == list(range(size))


# ---------------------------------------------------------------- refusals and choices


@pytest.mark.parametrize(
    "given",
    [{"radius": 0}, {"radius": -1}, {"radius": 2, "dilation": 0}, {"radius": 2, "shape": "ring"},
     {"radius": 2, "text": -1}],
)  # fmt: skip
def test_windows_that_make_no_sense(given):
    with pytest.raises(InputError, match="window"):
        Window2d((4, 4), **given)
    with pytest.raises(InputError, match="grid"):
        Window2d((0, 4), 2)


def test_shapes_that_do_not_fit():
    w = Window2d((4, 4), 2)
    q, k, v, more = tokens(w, extra=3)
    with pytest.raises(InputError, match="16 x 16"):
        window2d(q[:, :, 1:], k, v, window=w, scale=0.3)
    with pytest.raises(InputError, match="extra value"):
        window2d(q, k, v, window=w, scale=0.3, extra=(more[0], more[1][:, :1]))


def test_the_choice_is_explained():
    q, k, v, _ = tokens(Window2d((4, 4), 2), dtype=torch.float32)
    found = choose(q.double(), k.double(), v.double())
    assert found.name == "blocked" and any("CUDA" in reason for reason in found.reasons)
