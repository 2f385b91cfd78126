"""A method applies and fires, counted; and at its identity it is nothing, to the bit."""

import pytest
import torch
from oracle import models

import trainless

from .cases import CASES, DENOISERS, LANGUAGE, VLMS, Case, named, pairs
from .tools import CALLS, build, differs, outputs, same

ALL = (*models.CAUSAL, *models.ENCODERS, *models.DENOISERS, *VLMS)


def _calls(family: str) -> int:
    return len(CALLS) if family in (*models.CAUSAL, *VLMS) else 1


def _expected_sites(case: Case, family: str, model: torch.nn.Module) -> tuple[int, int]:
    """Sites matched and candidates."""
    if family in DENOISERS:
        names = [n for n in model.attn_processors if "attn2" not in n or family == "sd3"]
        return case.sites or len(names), len(names)
    copies = 2 if family == "t5" else 1
    return len(case.acted_layers(family)) * copies, 3 * copies


@pytest.mark.parametrize(("case", "family"), pairs(ALL))
def test_applies_and_fires(case: Case, family: str):
    model = build(family)
    stock = outputs(model, family)
    patch = trainless.patch(model, case.method, **case.parameters)
    assert isinstance(patch, trainless.Patch)
    assert patch.report().methods[0].fired == 0
    changed = outputs(model, family)
    report = patch.report().methods[0]
    assert (report.sites, report.of) == _expected_sites(case, family, model)
    assert report.fired == report.sites * _calls(family)
    assert 0 < report.acted <= report.fired
    assert all(layer["fired"] == _calls(family) for layer in report.layers)
    assert differs(changed, stock)
    assert sum(layer["acted"] for layer in report.layers) == report.acted
    assert case.method in str(patch.report()) and patch.report().to_dict()["state"] == "active"
    patch.remove()
    same(outputs(model, family), stock)
    assert patch.report().methods[0].fired == report.fired, "counts outlive the patch"


@pytest.mark.parametrize(("case", "family"), pairs(ALL, [c for c in CASES if c.identity is not None]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_identity_is_bitwise_and_runs_only_the_stock_kernel(case: Case, family: str, dtype: torch.dtype):
    model = build(family, dtype=dtype, exact=False)
    stock = outputs(model, family), outputs(model, family, padded=False)
    same_size = family in DENOISERS and case.trained
    if same_size:  # the entropy of the trained size: 12 x 20 latents are 96 x 160 pixels
        patch = trainless.patch(model, case.method, trained=(96, 160))
    else:
        patch = trainless.patch(model, case.method, **case.identity)
    same(outputs(model, family), stock[0])
    same(outputs(model, family, padded=False), stock[1])
    report = patch.report().methods[0]
    assert set(report.kernels) <= {"stock"}, report.kernels
    assert report.fired == report.sites * _calls(family) * 2 and report.acted == 0
    assert report.inert or same_size or case.late


@pytest.mark.parametrize(("case", "family"), pairs(ALL, [c for c in CASES if c.wide is not None]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_watching_without_changing_is_bitwise(case: Case, family: str, dtype: torch.dtype):
    """Budgets that cover the sequence, thresholds that nothing reaches: measured, and still the same bits."""
    model = build(family, dtype=dtype, exact=False)
    stock = outputs(model, family), outputs(model, family, padded=False)
    patch = trainless.patch(model, case.method, **case.wide)
    same(outputs(model, family), stock[0])
    same(outputs(model, family, padded=False), stock[1])
    assert not patch.report().methods[0].inert


@pytest.mark.parametrize(**named([c for c in LANGUAGE if "llama" in c.families]))
@pytest.mark.parametrize("kind", ["identity", "wide"])
def test_identity_in_generate(case: Case, kind: str):
    given = case.identity if kind == "identity" else case.wide
    if given is None:
        pytest.skip("nothing between identity and edit")
    model = build("llama", dtype=torch.float32, exact=False)
    ids, mask = models.left_padded([12, 7])
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    stock = model.generate(ids, attention_mask=mask, **options)
    with trainless.patched(model, case.method, **given) as patch:
        found = model.generate(ids, attention_mask=mask, **options)
        assert patch.report().methods[0].fired == patch.report().methods[0].sites * len(found.logits)
    assert torch.equal(found.sequences, stock.sequences)
    same(found.logits, stock.logits)
