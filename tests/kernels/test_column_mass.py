"""The mass of each column: float64 truth, counted rows, groups, and memory."""

import pytest
import torch
from kernel_cases import IDS, KINDS, SHAPES, Largest, make, no_worse, oracle

from trainless.errors import InputError
from trainless.kernels import attention, column_mass, visibility
from trainless.kernels.column_mass import blocked, choose, fused, reference
from trainless.kernels.common import Terms

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FORMS = {"reference": reference, "fused": fused, "blocked": blocked}
# What the fused form takes: plain logits, a causal or full mask with keys padded away, no fewer keys than rows.
FUSED = ("full", "causal", "left", "keys")
EVERY = [
    pytest.param(form, kind, shape, extras, id=f"{form}-{kind}-{name}{'-cap-bias' if extras else ''}")
    for form in FORMS
    for kind in KINDS
    for shape, name in zip(SHAPES, IDS, strict=True)
    for extras in (False, True)
    if form != "fused" or (kind in FUSED and not extras and not (shape[3] > shape[4] and kind != "full"))
]


def run(form, case, lse, seen=None, **options):
    terms = Terms(case.scale, case.terms.get("position_bias"), case.terms.get("softcap"))
    seen = seen or case.seen()
    assert form != "fused" or not fused.fused_reasons(case.query, case.key, seen, terms)
    return FORMS[form].column_mass(case.query, case.key, lse, visibility=seen, terms=terms, **options)


def summed(mass, hkv):
    b, h, lk = mass.shape
    return mass.view(b, hkv, h // hkv, lk).sum(2)


@pytest.mark.parametrize(("form", "kind", "shape", "extras"), EVERY)
def test_every_form_is_exact_in_float64(form, kind, shape, extras):
    case = make(kind, shape, extras=extras)
    _, a, _, lse = oracle(case)
    b, h, hkv, lq, _, _ = shape
    rows = torch.rand(b, lq) < 0.6
    chosen = sorted({h - 1, h // 2, 0}, reverse=True)
    for counted in (None, rows):
        want = (a if counted is None else a * counted[:, None, :, None]).sum(2)
        torch.testing.assert_close(run(form, case, lse, rows=counted), want, **EXACT)
        torch.testing.assert_close(run(form, case, lse, rows=counted, heads=chosen), want[:, chosen], **EXACT)
        torch.testing.assert_close(
            run(form, case, lse, rows=counted, group="sum"), summed(want, hkv), **EXACT
        )
        some = want * torch.zeros(h).index_fill(0, torch.tensor(chosen), 1)[:, None]
        torch.testing.assert_close(
            run(form, case, lse, rows=counted, heads=chosen, group="sum"), summed(some, hkv), **EXACT
        )


HALVES = [torch.float32, torch.bfloat16, torch.float16]
LOW = [("blocked", k, d) for k in ("causal", "left", "keys", "dense", "window") for d in HALVES]
LOW += [("fused", k, torch.float32) for k in ("causal", "left", "keys")]


@pytest.mark.parametrize(("form", "kind", "dtype"), LOW, ids=str)
@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_low_precision_is_no_worse_than_the_plain_form(form, kind, dtype, strength):
    """Against exp(z - lse) and a sum in float32, dense, with the same log-sum-exp."""
    case = make(kind, (2, 6, 2, 170, 170, 32), dtype, strength=strength)
    case.scale = 32**-0.5
    _, a, _, _ = oracle(case)
    z, _, _, _ = oracle(case.to(torch.float32), torch.float32)
    _, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    plain = torch.exp(z - lse[..., None]).nan_to_num(0.0).sum(2)
    mass = run(form, case, lse)
    assert mass.dtype == torch.float32
    no_worse(mass, a.sum(2), plain)


@pytest.mark.parametrize("kind", ["causal", "left", "keys"])
@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_the_fused_form_in_bfloat16(kind, strength):
    """The bfloat16 operator's own log-sum-exp is good to about 5e-5; the fused form depends on two of them."""
    case = make(kind, (2, 6, 2, 170, 170, 32), torch.bfloat16, strength=strength)
    _, a, _, _ = oracle(case)
    _, lse = attention(*case.qkv, visibility=case.seen(), scale=case.scale)
    torch.testing.assert_close(run("fused", case, lse).double(), a.sum(2), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("form", ["fused", "blocked"])
def test_bfloat16_keeps_all_digits_of_lse(form):
    """-lse as one bfloat16 feature would be wrong by several per cent; the parts are not."""
    case = make("causal", (1, 2, 2, 200, 200, 16), torch.bfloat16, strength=3.0)
    _, a, _, lse = oracle(case)
    assert (lse.bfloat16().double() - lse).abs().max() > 0.03
    mass = run(form, case, lse.float())
    torch.testing.assert_close(mass.double(), a.sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "left", "full", "window"])
def test_blocks_and_tiles_meet_without_a_seam(kind):
    """Longer than one row block and one key tile of the blocked form."""
    case = make(kind, (1, 2, 1, 450, 5000, 8), torch.float64)
    _, a, _, lse = oracle(case)
    torch.testing.assert_close(run("blocked", case, lse), a.sum(2), **EXACT)


def test_many_short_rows_share_a_product():
    case = make("left", (40, 6, 2, 50, 50, 8), torch.float64)
    _, a, _, lse = oracle(case)
    torch.testing.assert_close(run("blocked", case, lse), a.sum(2), **EXACT)


def test_columns_add_up_to_the_rows():
    case = make("left", (2, 6, 2, 90, 90, 16), torch.float32)
    real = torch.ones(2, 90, dtype=torch.bool)
    real[1, :30] = False
    seen = case.seen(real)
    _, lse = attention(*case.qkv, visibility=seen, scale=case.scale)
    mass = column_mass(case.query, case.key, lse, visibility=seen, scale=case.scale)
    want = real.sum(1).float()[:, None].expand(2, 6)
    torch.testing.assert_close(mass.sum(-1), want, rtol=1e-5, atol=1e-4)
    assert not mass[1, :, :30].any()
    group = column_mass(case.query, case.key, lse, visibility=seen, scale=case.scale, group="sum")
    torch.testing.assert_close(group.sum(-1), 3 * want[:, :2], rtol=1e-5, atol=1e-4)


def test_padding_rows_are_left_out_unless_asked_for():
    case = make("keys", (2, 4, 2, 20, 20, 8))
    real = torch.rand(2, 20) < 0.5
    _, a, _, lse = oracle(case)
    options = {"visibility": case.seen(real), "scale": case.scale}
    got = column_mass(case.query, case.key, lse, **options)
    torch.testing.assert_close(got, (a * real[:, None, :, None]).sum(2), **EXACT)
    got = column_mass(case.query, case.key, lse, rows=~real, **options)
    torch.testing.assert_close(got, (a * ~real[:, None, :, None]).sum(2), **EXACT)


@pytest.mark.parametrize("form", ["reference", "blocked", "fused"])
def test_no_row_at_all_gives_zeros(form):
    case = make("causal", (2, 4, 2, 12, 12, 8), torch.float32)
    _, _, _, lse = oracle(case.to(torch.float32))
    mass = run(form, case, lse, rows=torch.zeros(2, 12, dtype=torch.bool))
    assert mass.shape == (2, 4, 12) and not mass.any()
    blind = torch.full_like(lse, -torch.inf)
    assert not run(form, case, blind).any()


@pytest.mark.parametrize("form", ["blocked", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_pairs_may_be_huge(form, dtype):
    """A pair that is not visible may exceed lse by hundreds: its exponential must not leak as inf or NaN."""
    case = make("left", (2, 2, 1, 40, 40, 8), dtype)
    case.key[1, :, :13] *= 400
    case.query[..., :20, :] *= -1
    _, a, _, lse = oracle(case)
    mass = run(form, case, lse.float())
    torch.testing.assert_close(mass.double(), a.sum(2), rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_changes_nothing():
    case = make("left", (2, 4, 2, 30, 30, 8))
    _, _, _, lse = oracle(case)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, :10] = False
    mass = column_mass(case.query, case.key, lse, visibility=case.seen(real), scale=case.scale)
    alone = column_mass(
        case.query[1:, :, 10:], case.key[1:, :, 10:], lse[1:, :, 10:],
        visibility=visibility(None, causal=True, lq=20, lk=20), scale=case.scale,
    )  # fmt: skip
    torch.testing.assert_close(mass[1:, :, 10:], alone, **EXACT)


def test_views_give_the_same_bits():
    case = make("causal", (2, 6, 2, 40, 40, 16), torch.float32)
    _, lse = attention(*case.qkv, visibility=case.seen(), scale=0.3)
    q = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([case.key, torch.full_like(case.key, torch.nan)], 2)[:, :, :40]
    strided = lse.transpose(1, 2).contiguous().transpose(1, 2)
    options = {"visibility": case.seen(), "scale": 0.3}
    assert torch.equal(
        column_mass(q, k, strided, **options), column_mass(case.query, case.key, lse, **options)
    )


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_empty_calls(lengths):
    q, k = torch.randn(2, 4, lengths[0], 8), torch.randn(2, 2, lengths[1], 8)
    seen = visibility(None, causal=True, lq=lengths[0], lk=lengths[1])
    lse = torch.full((2, 4, lengths[0]), -torch.inf)
    mass = column_mass(q, k, lse, visibility=seen, scale=1.0)
    assert mass.shape == (2, 4, lengths[1]) and not mass.any()
    assert column_mass(q, k, lse, visibility=seen, scale=1.0, heads=[]).shape == (2, 0, lengths[1])


@pytest.mark.parametrize("kind", ["causal", "left", "window", "dense"])
def test_no_tensor_of_queries_by_keys(kind):
    case = make(kind, (1, 3, 1, 3000, 3000, 8), torch.float32)
    seen = case.seen()
    _, lse = attention(*case.qkv, visibility=seen, scale=0.3)
    with Largest() as largest:
        column_mass(case.query, case.key, lse, visibility=seen, scale=0.3)
    assert largest.elements < 3000 * 3000 / 2


def test_the_choice_follows_the_machine(monkeypatch):
    case = make("causal", (1, 4, 2, 8, 8, 8), torch.bfloat16)
    arguments = {"visibility": case.seen(), "terms": Terms(1.0)}
    from trainless.kernels.column_mass import api

    monkeypatch.setattr(api, "fast_half_matmul", lambda: False)
    assert choose(case.query, case.key, **arguments).name == "blocked"
    monkeypatch.setattr(api, "fast_half_matmul", lambda: True)
    assert choose(case.query, case.key, **arguments).name == "fused"
    choice = choose(case.query, case.key, visibility=case.seen(), terms=Terms(1.0, softcap=2.0))
    assert choice.name == "blocked" and "soft-cap" in str(choice)
    _, a, _, lse = oracle(case)
    mass = column_mass(case.query, case.key, lse.float(), visibility=case.seen(), scale=case.scale)
    torch.testing.assert_close(mass.double(), a.sum(2), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lse": torch.zeros(2, 4, 7)}, "lse"),
        ({"rows": torch.ones(2, 8)}, "rows"),
        ({"heads": [4]}, "heads=[4]"),
        ({"heads": [1, 1]}, "distinct"),
        ({"group": "mean"}, "group='mean'"),
    ],
)
def test_what_does_not_fit_is_refused(change, named):
    good = {
        "query": torch.randn(2, 4, 8, 8),
        "key": torch.randn(2, 2, 8, 8),
        "lse": torch.zeros(2, 4, 8),
        "visibility": visibility(None, causal=True, lq=8, lk=8),
        "scale": 1.0,
    }
    with pytest.raises(InputError) as caught:
        column_mass(**{**good, **change})
    assert named in str(caught.value)
