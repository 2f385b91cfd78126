"""Column mass of chosen rows, a set for each row of the batch: float64 truth, low precision, and its cost."""

import pytest
import torch
from kernel_cases import IDS, KINDS, SHAPES, Largest, make, no_worse, oracle
from torch.utils._python_dispatch import TorchDispatchMode

from trainless.errors import InputError
from trainless.kernels import attention, chosen_mass
from trainless.kernels.common import Terms

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rows_of(b, lq):
    """Half the rows, one of them twice, some absent; another half for each row of the batch."""
    chosen = torch.stack([torch.randperm(lq)[: (lq + 1) // 2] for _ in range(b)])
    return torch.cat([chosen, chosen[:, :1], torch.full((b, 2), -1)], 1)


def times(index, lq):
    return torch.stack([(index == row).sum(1) for row in range(lq)], 1)


def terms_of(case):
    return Terms(
        case.scale, **{name: case.terms.get(name) for name in ("position_bias", "softcap", "sink_logits")}
    )


@pytest.mark.parametrize("with_lse", [False, True], ids=["alone", "lse"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "cap-bias-sinks"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_it_is_exact_in_float64(kind, shape, extras, with_lse):
    case = make(kind, shape, extras=extras)
    _, a, _, lse = oracle(case)
    index = rows_of(shape[0], shape[3])
    weights = times(index, shape[3])
    mass, counts = chosen_mass(
        case.query,
        case.key,
        index,
        visibility=case.seen(),
        terms=terms_of(case),
        lse=lse if with_lse else None,
    )
    torch.testing.assert_close(mass, (a * weights[:, None, :, None]).sum(2), **EXACT)
    seen = case.truth.any(1).expand(shape[0], -1, -1)
    assert torch.equal(counts, (seen * weights[..., None]).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "left", "window"])
def test_low_precision_is_no_worse_than_the_plain_form(kind, dtype):
    case = make(kind, (2, 6, 2, 170, 170, 32), dtype, strength=4.0)
    case.scale = 32**-0.5
    _, a, _, _ = oracle(case)
    z, _, _, _ = oracle(case.to(torch.float32), torch.float32)
    index = rows_of(2, 170)
    weights = times(index, 170)[:, None, :, None]
    plain = (z.softmax(-1).nan_to_num(0.0) * weights).sum(2)
    mass, _ = chosen_mass(case.query, case.key, index, visibility=case.seen(), terms=terms_of(case))
    assert mass.dtype == torch.float32
    no_worse(mass, (a * weights).sum(2), plain)


def test_hidden_pairs_may_be_huge():
    case = make("left", (2, 2, 1, 40, 40, 8), torch.float32)
    case.key[1, :, :13] *= 400
    _, a, _, _ = oracle(case)
    index = torch.arange(40).expand(2, -1)
    mass, _ = chosen_mass(case.query, case.key, index, visibility=case.seen(), terms=terms_of(case))
    torch.testing.assert_close(mass.double(), a.sum(2), rtol=1e-4, atol=1e-4)


def test_views_give_the_same_bits_and_poison_stays_outside():
    case = make("causal", (2, 6, 2, 40, 40, 16), torch.float32)
    index, options = rows_of(2, 40), {"visibility": case.seen(), "terms": terms_of(case)}
    q = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([case.key, torch.full_like(case.key, torch.nan)], 2)[:, :, :40]
    want = chosen_mass(case.query, case.key, index, **options)[0]
    assert torch.equal(chosen_mass(q, k, index, **options)[0], want)
    q = q.clone()
    q[:, :, [n for n in range(40) if not (index == n).any()]] = torch.nan  # rows that nobody asked for
    assert torch.equal(chosen_mass(q, k, index, **options)[0], want)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_empty_calls(lengths):
    case = make("full", (2, 4, 2, *lengths, 8))
    index = torch.full((2, 3), -1)
    mass, counts = chosen_mass(case.query, case.key, index, visibility=case.seen(), terms=terms_of(case))
    assert mass.shape == (2, 4, lengths[1]) and not mass.any() and not counts.any()


class Products(TorchDispatchMode):
    """Counts the multiplications of all products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            self.count += args[0].numel() * args[1].shape[-1]
        return result


def test_cost_and_memory_follow_the_rows():
    case = make("causal", (1, 4, 2, 2000, 2000, 8), torch.float32)
    seen, terms, cost = case.seen(), terms_of(case), {}
    for count in (16, 64, 256):
        index = torch.linspace(0, 1999, count).long()[None]
        with Products() as products, Largest() as largest:
            chosen_mass(case.query, case.key, index, visibility=seen, terms=terms)
        cost[count] = products.count
        assert largest.elements <= 128 * 2000 * 4
    assert cost[64] <= 4 * cost[16] and cost[256] <= 4 * cost[64]
    every = torch.arange(2000)[None]
    with Largest() as largest:
        mass, counts = chosen_mass(case.query, case.key, every, visibility=seen, terms=terms)
    assert largest.elements <= 128 * 2000 * 4
    assert torch.equal(counts, 2000 - every)
    _, lse = attention(*case.qkv, visibility=seen, scale=case.scale)
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 4), 2000.0), rtol=1e-4, atol=0)
    assert lse.shape == (1, 4, 2000)


@pytest.mark.parametrize("index", [torch.zeros(2, 3), torch.zeros(1, 3).long(), torch.full((2, 1), 9)])
def test_rows_that_do_not_exist_are_refused(index):
    case = make("causal", (2, 2, 1, 7, 7, 8))
    with pytest.raises(InputError, match="rows"):
        chosen_mass(case.query, case.key, index, visibility=case.seen(), terms=terms_of(case))
