"""The loops that Numba compiles: threads, what is told apart, and what happens where they cannot run."""

import builtins
import copy
import os
import subprocess
import sys

import pytest
import torch
from packed_cases import SHAPES, Case
from torch.fx.experimental.proxy_tensor import make_fx

from trainless.errors import InputError
from trainless.kernels import dispatch
from trainless.kernels.common import Terms
from trainless.kernels.dispatch import numba_missing, numba_reasons
from trainless.kernels.quant_kv import api, choose, packed_rows, raw, weigh

needs_numba = pytest.mark.skipif(numba_missing() is not None, reason=str(numba_missing()))


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


def _every_other_slot(segment):
    from trainless.kv.store import _chosen

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
        assert chosen.name == "blocked" and "pip install 'trainless[numba]'" in str(chosen)
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
    env = dict(os.environ)
    if setting == "nowhere":
        env["NUMBA_CACHE_DIR"] = "/proc/nowhere"
    else:
        env[setting] = "1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    name = "blocked" if setting == "NUMBA_DISABLE_JIT" else "numba"
    assert done.stdout.split() == [name, "True"]


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
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | setting
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5


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
    def full(name, *args, **kwargs):
        if name.endswith("compiled") or "compiled" in (args[2] or () if len(args) > 2 else ()):
            raise OSError(28, "No space left on device")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", full)
    api._compiled.cache_clear()
    try:
        case = Case(SHAPES[0], torch.float32)
        chosen = choose(case.query, case.segments, terms=Terms(0.3))
        assert chosen.name == "blocked" and "No space left" in str(chosen)
        assert packed_rows(case.query, case.segments, scale=0.3)[0].isfinite().all()
    finally:
        monkeypatch.undo()
        api._compiled.cache_clear()
