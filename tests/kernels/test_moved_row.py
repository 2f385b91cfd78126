"""One row with moved probability: float64 truth, every dtype, masks, named heads, gaps between heads."""

import pytest
import torch
from kernel_cases import no_worse

from trainless.errors import InputError
from trainless.kernels.common import Terms
from trainless.kernels.dispatch import numba_missing
from trainless.kernels.moved_row import MovedRow, choose, moved_row

needs_numba = pytest.mark.skipif(numba_missing() is not None, reason=str(numba_missing()))


def truth(row: MovedRow) -> torch.Tensor:
    """Head by head, in float64."""
    q, k, v = (t.double() for t in row[:3])
    b, h = q.shape[:2]
    out = torch.zeros(b, h, 1, v.shape[3], dtype=torch.float64)
    named = list(range(h)) if row.heads is None else list(row.heads)
    for batch in range(b):
        for head in range(h):
            group = head // (h // k.shape[1])
            z = k[batch, group] @ q[batch, head, 0] * row.terms.scale
            if row.terms.softcap is not None:
                z = row.terms.softcap * torch.tanh(z / row.terms.softcap)
            if row.visible is not None:
                z = z.masked_fill(~row.visible.expand(b, h, 1, -1)[batch, head, 0], -torch.inf)
            if row.terms.sink_logits is not None:
                z = torch.cat([z, row.terms.sink_logits[head, None].double()])
            p = torch.softmax(z, 0)[: k.shape[2]]
            if head in named:
                source = row.source[batch, named.index(head)]
                if p[~source].sum() > 0:
                    total = p.sum()
                    p = torch.where(source, p * row.keep, p)
                    p[~source] *= (total - p[source].sum()) / p[~source].sum()
            out[batch, head, 0] = p @ v[batch, group]
    return out


def make(dtype, heads=None, visible=None, terms=None, lk=37, d=24):
    b, h, hkv = 2, 6, 2
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)  # noqa: E731
    key, value = (draw(b, hkv, lk + 5, d)[:, :, :lk] for _ in range(2))  # as in a buffer with room to grow
    source = torch.rand(b, h if heads is None else len(heads), lk) < 0.2
    seen = None
    if visible is not None:
        seen = torch.rand(*visible, 1, lk) < 0.7
        seen[..., -1] = True
    source[..., -1] = False
    return MovedRow(draw(b, h, 1, d), key, value, source, 0.4, terms or Terms(0.3), seen, heads)


CASES = {
    "plain": {},
    "heads": {"heads": (4, 1)},
    "padding": {"visible": (2, 1)},
    "by head": {"visible": (1, 6), "heads": (0, 5)},
    "cap-sinks": {"terms": Terms(0.3, None, 2.0, torch.linspace(-1, 1, 6))},
}


@pytest.mark.parametrize("name", CASES)
def test_torch_is_exact_in_float64(name):
    row = make(torch.float64, **CASES[name])
    assert choose(row).name == "torch"
    torch.testing.assert_close(moved_row(row), truth(row), rtol=1e-10, atol=1e-10)


@needs_numba
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loops_are_as_good_as_torch(name, dtype, monkeypatch):
    from trainless.kernels.moved_row import compiled, reference

    monkeypatch.setattr(compiled, "ALONE", 0)
    row = make(dtype, **CASES[name])
    assert choose(row).name == "numba"
    no_worse(moved_row(row), truth(row), reference.moved_row(row), factor=2.0)


@needs_numba
def test_a_row_that_sees_sources_only_stays():
    row = make(torch.float32)
    row = row._replace(source=torch.ones_like(row.source))
    torch.testing.assert_close(moved_row(row).double(), truth(row), rtol=1e-5, atol=1e-5)


def test_the_operator_is_registered_correctly():
    row = make(torch.float32, heads=(4, 1), visible=(2, 1))
    call = (*row[:4], row.visible, torch.randn(6), list(row.heads), row.keep, 0.3, 2.0)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.trainless.moved_row.default, call, test_utils=tests)


def test_what_does_not_fit_is_refused():
    row = make(torch.float32, heads=(4, 1))
    for bad, said in (
        ({"source": row.source[:, :1]}, "is needed"), ({"heads": (4, 6)}, "from 0 to 5"), ({"keep": 1.5}, "a part of"),
        ({"key": row.key[:, :, 1:]}, "do not fit"), ({"visible": row.source[:, :, None]}, "is needed"),
        ({"terms": Terms(0.3, torch.zeros(1, 1, 1, 37))}, "bias"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            moved_row(row._replace(**bad))
