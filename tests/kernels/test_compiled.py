"""The loops that Numba compiles: threads, what is told apart, and what happens where they cannot run."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from packed_cases import SHAPES, Case
from torch.fx.experimental.proxy_tensor import make_fx

from trainless.errors import InputError
from trainless.kernels import Window2d, dispatch, window2d
from trainless.kernels.common import Terms
from trainless.kernels.dispatch import available, compiled_form, numba_missing, numba_reasons
from trainless.kernels.quant_kv import api, choose, packed_rows, raw, weigh
from trainless.kernels.window2d import choose as choose_window

needs_numba = pytest.mark.skipif(numba_missing() is not None, reason=str(numba_missing()))


def grid_of_tokens(b=2, h=4, hkv=2, d=16, dtype=torch.float32, **window):
    """A window with text beside it, and query, key and value."""
    w = Window2d(**{"grid": (13, 18), "radius": 4, "text": 19, **window})
    q, k, v = (torch.randn(b, w.tokens, n, d).to(dtype).transpose(1, 2) for n in (h, hkv, hkv))
    return w, q, k, v


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_numba
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("lost", [False, True], ids=["groups", "lost tokens"])
def test_any_number_of_threads_gives_the_same_bits(bits, lost, threads, monkeypatch):
    from trainless.kernels.quant_kv import compiled, loops

    monkeypatch.setattr(compiled, "ALONE", 0)
    case = Case((2, 6, 2, 1, 16, 40, 65, bits, bits), torch.float32)
    assert case.segment.slots > 2 * loops.SPAN  # three spans, the last a short one
    segment = _every_other_slot(case.segment) if lost else case.segment
    found = []
    for number in (1, 2, 5):
        threads(number)
        found.append(packed_rows(case.query, [segment], scale=0.3, lse=True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_numba
def test_the_rest_of_a_batch_changes_no_bit(threads, monkeypatch):
    from trainless.kernels.quant_kv import compiled

    monkeypatch.setattr(compiled, "ALONE", 0)
    threads(2)
    case = Case((3, 4, 2, 1, 8, 50, 64, 4, 4), torch.float32)
    whole = packed_rows(case.query, [case.segment], scale=0.3)
    for i in range(3):
        one = case.segment.each(lambda t, i=i: t[i : i + 1])
        for a, b in zip(packed_rows(case.query[i : i + 1], [one], scale=0.3)[:2], whole[:2], strict=True):
            assert torch.equal(a[0], b[i])


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_groups_of_heads_and_the_batch_change_no_bit_of_a_window(dtype, threads, monkeypatch):
    from trainless.kernels.window2d import compiled

    w, q, k, v = grid_of_tokens(b=3, dtype=dtype)
    more = (k[:, :, 5:40], v[:, :, 5:40])
    found = []
    for number, copies in ((1, 1), (2, 1 << 30), (5, 1)):
        threads(number)
        monkeypatch.setattr(compiled, "COPIES", copies)
        found.append(window2d(q, k, v, window=w, scale=0.3, extra=more))
    one = window2d(q[1:2], k[1:2], v[1:2], window=w, scale=0.3, extra=(more[0][1:2], more[1][1:2]))
    for first, *others, alone in zip(*found, one, strict=True):
        assert all(torch.equal(first, other) for other in others)
        assert torch.equal(first[1:2], alone)


def _every_other_slot(segment):
    from trainless.cache.store import _chosen

    b, hkv, slots = *segment.key.shape[:2], segment.slots
    order = torch.arange(0, slots, 2).expand(b, hkv, -1)
    return _chosen(segment, order, torch.ones_like(order, dtype=torch.bool))


@needs_numba
def test_nan_in_a_query_stays_with_its_row():
    """Sums may be reordered; what is no number must not be assumed away."""
    case = Case(SHAPES[0], torch.float32)
    want = packed_rows(case.query, case.segments, scale=0.3)[0]
    case.query[0, 1] = torch.nan
    out = packed_rows(case.query, case.segments, scale=0.3)[0]
    assert out[0, 1].isnan().all()
    out[0, 1] = want[0, 1]
    assert torch.equal(out, want)


@needs_numba
def test_nan_and_infinity_in_a_grid_stay_with_the_rows_that_see_them():
    w, q, k, v = grid_of_tokens(grid=(12, 40), text=0)
    want = window2d(q, k, v, window=w, scale=0.3)
    q[0, 1, 3], k[1, 0, 41] = torch.nan, torch.inf
    got = window2d(q, k, v, window=w, scale=0.3)
    hit = torch.zeros(2, 4, w.tokens, dtype=torch.bool)
    hit[0, 1, 3] = True
    hit[1, :2] = w.visible(torch.arange(w.tokens), torch.tensor(41))
    assert got[0][hit].isnan().any(-1).all() and got[1][0, 1, 3].isnan()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[~hit], b[~hit])


@needs_numba
def test_logits_of_thousands_and_a_row_with_a_single_key():
    w, q, k, v = grid_of_tokens(radius=0.5, text=0)
    out, lse = window2d(500 * q, k, v, window=w, scale=1.0)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=1e-6, atol=0)
    exact = (500 * q.double() * k.double().repeat_interleave(2, 1)).sum(-1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-2)


@needs_numba
def test_who_cannot_have_the_loops_of_a_window_is_told():
    w, q, k, v = grid_of_tokens()
    assert choose_window(q, k, v) == dispatch.Choice("numba") and available()["window2d"].name == "numba"

    def reasons(*given):
        chosen = choose_window(*given)
        assert chosen.name == "blocked"
        return str(chosen)

    assert "dtype float64" in reasons(q.double(), k.double(), v.double())
    assert "bfloat16, float32" in reasons(q, k.bfloat16(), v)
    assert "head widths [12]" in reasons(q[..., :12], k[..., :12], v[..., :12])
    assert "head widths [8, 16]" in reasons(q, k, v[..., :8])
    assert "no gradient" in reasons(q, k, v, (k, v.clone().requires_grad_()))
    with torch.device("meta"):  # a default for what is created, and none of the tensors that are given
        assert torch.equal(*(window2d(q, k, v, window=w, scale=0.3)[0] for _ in range(2)))


@needs_numba
def test_half_precision_stays_with_torch_where_the_processor_multiplies_it(monkeypatch):
    from trainless.kernels.window2d import api as window_api

    monkeypatch.setattr(window_api, "half_matmul_is_fast", lambda: True)
    _, q, k, v = grid_of_tokens(dtype=torch.bfloat16)
    assert "half precision" in str(choose_window(q, k, v))
    assert choose_window(q.float(), k.float(), v.float()).name == "numba"


@needs_numba
def test_a_recorded_window_lacks_nothing():
    w, q, k, v = grid_of_tokens()

    def call(q):
        return window2d(q, k, v, window=w, scale=0.3)[0]

    graph = make_fx(call)(torch.zeros_like(q))
    torch.testing.assert_close(graph(q), call(q), rtol=1e-5, atol=1e-5)


@needs_numba
def test_tensors_that_are_not_for_loops_are_an_error_and_no_crash():
    from trainless.kernels.window2d import compiled

    w, q, k, v = grid_of_tokens()
    for given in (
        (q[:, :, 1:], k, v),
        (q[..., :12], k[..., :12], v[..., :12]),
        (q, k, v[:, :, 1:]),
        (q[:, :3], k, v),
    ):
        with pytest.raises(InputError, match="no loop"):
            compiled.window2d(*given, window=w, scale=0.3)
    with pytest.raises(InputError, match="is needed"):
        compiled.window2d(q, k, v, window=w, scale=0.3, extra=(k[:, :, :3], v[:, :, :2]))


@needs_numba
@pytest.mark.parametrize("place", range(3))
def test_a_sign_that_torch_has_yet_to_turn_is_not_lost(place):
    """Such a tensor's memory, which is all that a loop looks at, holds the other sign."""
    window, given = Window2d((5, 7), 3), [torch.randn(1, 2, 35, 16) for _ in range(3)]
    turned = [torch._neg_view(t) if i == place else t for i, t in enumerate(given)]
    said = choose_window(*turned)
    assert said.name == "blocked" and any("sign" in reason for reason in said.reasons)
    whole = [t.resolve_neg() for t in turned]
    assert choose_window(*whole).name == "numba"
    for found, wanted in zip(
        window2d(*turned, window=window, scale=0.3), window2d(*whole, window=window, scale=0.3), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-5)


@needs_numba
@pytest.mark.parametrize("grid", [(1, 600), (600, 2), (3, 301)])
def test_what_is_seen_on_a_long_grid_takes_no_more_than_its_sides(grid):
    compiled, window = compiled_form("trainless.kernels.window2d")[0], Window2d(grid, 1e6)
    seen, _ = compiled.near(window, *compiled._patch(window))
    assert seen.numel() <= 64 * grid[0] * grid[1]
    given = [torch.randn(1, 1, window.tokens, 16) for _ in range(3)]
    out, lse = compiled.window2d(*given, window=window, scale=0.3)
    double = [t.double() for t in given]
    z = double[0] @ double[1].transpose(2, 3) * 0.3
    assert torch.allclose(out.double(), z.softmax(-1) @ double[2], atol=1e-5)
    assert torch.allclose(lse.double(), z.logsumexp(-1), atol=1e-5)


@needs_numba
def test_who_cannot_have_it_is_told():
    assert any("CPU" in r for r in numba_reasons([torch.empty(1, device="meta")]))
    grown = torch.zeros(1, requires_grad=True)
    assert any("gradient" in r for r in numba_reasons([grown]))
    with torch.no_grad():
        assert numba_reasons([grown]) == ()


def test_without_numba_the_blocked_form_runs_and_says_why(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    numba_missing.cache_clear()
    try:
        case = Case(SHAPES[0], torch.float32)
        chosen = choose(case.query, case.segments, terms=Terms(0.3))
        assert chosen.name == "blocked" and "pip install numba" in str(chosen)
        want = case.truth(0.3)
        torch.testing.assert_close(
            packed_rows(case.query, case.segments, scale=0.3)[0].double(), want[0], rtol=0, atol=1e-5
        )
    finally:
        numba_missing.cache_clear()


@needs_numba
@pytest.mark.parametrize("setting", ["NUMBA_DISABLE_JIT", "nowhere"])
def test_odd_surroundings(setting, tmp_path):
    """Switched off by Numba's own variable; and where there is no folder for machine code."""
    code = (
        "import torch, trainless\n"
        "from trainless.kernels.common import Terms\n"
        "from trainless.kernels.quant_kv import choose, packed_rows, quantise\n"
        "torch.manual_seed(0)\n"
        "s = quantise(*torch.randn(2, 1, 1, 4, 32, 8), 4, 4)\n"
        "q = torch.randn(1, 2, 1, 8)\n"
        "print(choose(q, [s], terms=Terms(1.0)).name, packed_rows(q, [s], scale=1.0)[0].isfinite().all().item())\n"
    )
    if (
        setting == "NUMBA_DISABLE_JIT"
    ):  # without a folder every form would be compiled again, which takes its time
        code += "from trainless.kernels.window2d import choose\nprint(choose(q, q, q).name)\n"
    env = dict(os.environ)
    if setting == "nowhere":
        env["NUMBA_CACHE_DIR"] = "/proc/nowhere"
    else:
        env[setting] = "1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    want = ["blocked", "True", "blocked"] if setting == "NUMBA_DISABLE_JIT" else ["numba", "True"]
    assert done.stdout.split() == want


@needs_numba
@pytest.mark.parametrize("setting", [{"OMP_THREAD_LIMIT": "1"}, {}])
def test_however_many_threads_openmp_gives(setting):
    """Nothing may be left out, or done twice, where OpenMP starts another number of threads than was asked for."""
    code = (
        "import torch\n"
        "from trainless.kernels.common import Terms\n"
        "from trainless.kernels.quant_kv import packed_rows, quantise, reference\n"
        "torch.manual_seed(0)\n"
        "torch.set_num_threads(4)\n"
        "s = quantise(*torch.randn(2, 1, 4, 16, 256, 32), 4, 4)\n"
        "q = torch.randn(1, 8, 1, 32)\n"
        "want = reference.rows(q.double(), [s], Terms(0.3))[0]\n"
        "print(max((packed_rows(q, [s], scale=0.3)[0] - want).abs().max().item() for _ in range(20)))\n"
        "from trainless.kernels.window2d import Window2d, reference, window2d\n"
        "w = Window2d((24, 20), 4, text=17)\n"
        "q, k, v = torch.randn(3, 1, 2, w.tokens, 16)\n"
        "want = reference.window2d(q.double(), k.double(), v.double(), window=w, scale=0.3)[0]\n"
        "print(max((window2d(q, k, v, window=w, scale=0.3)[0] - want).abs().max().item() for _ in range(20)))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | setting
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert all(float(error) < 1e-5 for error in done.stdout.split())


@needs_numba
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_half_precision(dtype):
    case = Case(SHAPES[0], torch.float32)
    p = torch.rand(2, 4, 1, case.segment.slots)
    out = weigh(p.to(dtype), [case.segment])
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), weigh(p, [case.segment]), rtol=0.1, atol=0.1)


@needs_numba
@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: (setattr(s, "key_step", s.key_step[:, :, :1]), setattr(s, "key_min", s.key_min[:, :, :1])),
        lambda s: setattr(s, "key_min", s.key_min[:, :1]),
        lambda s: setattr(s, "value_step", s.value_step[..., :2]),
        lambda s: setattr(s, "value_root", s.value_root[:, :, :1]),
        lambda s: setattr(s, "index", torch.full((2, 2, s.slots), 1 << 20, dtype=torch.int32)),
        lambda s: setattr(s, "index", torch.full((2, 2, s.slots), -1, dtype=torch.int32)),
    ],
    ids=["step", "min", "slots", "root", "index", "below"],
)
def test_a_segment_that_does_not_fit_is_an_error_and_no_crash(spoil):
    case = Case(SHAPES[0], torch.float32)
    spoil(case.segment)
    with pytest.raises(InputError, match="packed attention"):
        packed_rows(case.query, [case.segment], scale=0.3)


def test_segments_and_probabilities_that_do_not_fit_each_other():
    case, other = Case(SHAPES[0], torch.float32), Case((2, 4, 4, 1, 8, 3, 5, 4, 4), torch.float32)
    with pytest.raises(InputError, match="do not fit"):
        packed_rows(case.query, [case.segment, other.segment], scale=0.3)
    with pytest.raises(InputError, match="over 3 keys"):
        weigh(torch.rand(2, 4, 1, 3), [case.segment])


@needs_numba
def test_an_index_of_any_integer_type():
    case = Case(SHAPES[0], torch.float32)
    some = _every_other_slot(case.segment)
    want = packed_rows(case.query, [some], scale=0.3)[0]
    some.index = some.index.long()
    assert torch.equal(packed_rows(case.query, [some], scale=0.3)[0], want)


@needs_numba
@pytest.mark.parametrize("who", ["tail", "sinks", "step"])
def test_a_gradient_for_anything_but_the_query(who, monkeypatch):
    torch.manual_seed(0)
    case = Case(SHAPES[0])
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(api, "numba_reasons", lambda tensors: ("numba: not in this test",))
        tail = case.near[0].clone().requires_grad_(who == "tail")
        sinks = torch.zeros(4, dtype=torch.float64, requires_grad=who == "sinks")
        segment = copy.copy(case.segment)
        segment.key_step = segment.key_step.clone().requires_grad_(who == "step")
        both = [segment, raw(tail, case.near[1])]
        packed_rows(case.query, both, scale=0.3, sink_logits=sinks)[0].square().sum().backward()
        grown = {"tail": tail, "sinks": sinks, "step": segment.key_step}[who]
        found.append(grown.grad)
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1])


@needs_numba
def test_a_recorded_graph_lacks_nothing():
    case = Case(SHAPES[0], torch.float32)

    def call(q):
        return packed_rows(q, case.segments, scale=0.3)[0]

    graph = make_fx(call)(torch.zeros_like(case.query))
    torch.testing.assert_close(graph(case.query), call(case.query))
    _, tangent = torch.func.jvp(call, (case.query,), (torch.ones_like(case.query),))
    assert tangent.isfinite().all() and tangent.any()


@needs_numba
def test_where_machine_code_cannot_be_written_the_blocked_form_runs(monkeypatch):
    def full(name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dispatch.importlib, "import_module", full)
    compiled_form.cache_clear()
    try:
        case = Case(SHAPES[0], torch.float32)
        chosen = choose(case.query, case.segments, terms=Terms(0.3))
        assert chosen.name == "blocked" and "No space left" in str(chosen)
        assert packed_rows(case.query, case.segments, scale=0.3)[0].isfinite().all()
        window, q, k, v = grid_of_tokens()
        assert "No space left" in str(choose_window(q, k, v))
        assert window2d(q, k, v, window=window, scale=0.3)[0].isfinite().all()
    finally:
        monkeypatch.undo()
        compiled_form.cache_clear()
