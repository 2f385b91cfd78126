"""Every method on a GPU gives what it gives on the CPU, is the identity there bitwise, and comes off bitwise.

Skipped where there is no GPU. TRAINLESS_TEST_DEVICE names another device to run this on.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracle import models, real_rows, replay, vlms
from torch import Tensor, nn

import trainless

from .cases import MAIN, VLMS, Case, named, pairs
from .tools import CALLS, build, differs, given_of, same, text

DEVICE = os.environ.get("TRAINLESS_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="no GPU")
ROUNDING = ("kvquant", "zipcache", "zipvl")
ALL = (*models.CAUSAL, *models.ENCODERS, *models.DENOISERS, *VLMS)


@pytest.fixture(autouse=True)
def _plain_float32():
    """Convolutions of cuDNN are cut to TF32 otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def moved(given: Any, device: str) -> Any:
    if isinstance(given, dict):
        return {k: moved(v, device) for k, v in given.items()}
    return given.to(device) if isinstance(given, Tensor) else given


def made(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The float64 model in another type: what is planted in a vision-language one stays planted."""
    if family in vlms.FAMILIES:
        model = vlms.build(family, layers=3, exact=False)
        vlms.plant(model, vlms.batch(model, family))
        return nn.Module.to(model, dtype)
    return models.build(family, dtype=dtype, exact=False)


def said(model: nn.Module, family: str, device: str) -> list[Tensor]:
    """As ``tools.outputs`` with a padded batch, computed on the device; the answer is on the CPU, in float64."""
    if family in vlms.FAMILIES:
        given = vlms.batch(model, family)
        dtype = next(model.parameters()).dtype
        extra = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.extra.items()}
        calls: Sequence[int] = [given.prompt, *CALLS[1:]]
        real = vlms.real(given, calls)
        there = dataclasses.replace(
            given, extra=moved(extra, device),
            **{name: getattr(given, name).to(device) for name in ("ids", "mask", "image")},
        )  # fmt: skip
        found = vlms.replay(model, None, there, calls)
    elif family in models.CAUSAL:
        ids, mask = text()
        real = real_rows(mask, CALLS, ids.shape[0])
        found = replay(model, None, ids.to(device), mask.to(device), CALLS)
    else:
        given = given_of(family, model)
        out = model(**moved(given, device))
        tensor = out[0] if family in models.DENOISERS or not hasattr(out, "logits") else out.logits
        found, real = [tensor], [torch.ones(tensor.shape[:1], dtype=torch.bool)]
        if family == "bert":
            real = [given["attention_mask"].bool()]
    return [a.cpu().double()[r] for a, r in zip(found, real, strict=True)]


@pytest.mark.parametrize(("case", "family"), pairs(ALL))
def test_as_on_the_cpu(case: Case, family: str):
    model = made(family)
    with trainless.patched(model, case.method, **case.parameters):
        want = said(model, family, "cpu")
    there = model.to(DEVICE)
    stock = said(there, family, DEVICE)
    with trainless.patched(there, case.method, **case.parameters) as patch:
        got = said(there, family, DEVICE)
    assert patch.report().methods[0].fired
    largest = max(float(t.abs().max()) for t in want)
    # What is packed is rounded to few levels: a last bit of difference may round it to the next one.
    allowed = 5e-2 if case.method in ROUNDING else 5e-4
    same(got, want, allowed * max(largest, 1.0))
    assert differs(got, stock)
    same(said(there, family, DEVICE), stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(**named([c for c in MAIN if c.identity]))
def test_identity_is_bitwise(case: Case, dtype: torch.dtype):
    family = case.families[0]
    model = made(family, dtype).to(DEVICE)
    stock = said(model, family, DEVICE)
    # Of entropy: the trained size is the one that is run, 12 x 20 latents.
    identity = {"trained": (96, 160)} if case.trained else case.identity
    with trainless.patched(model, case.method, **identity):
        got = said(model, family, DEVICE)
    same(got, stock)


def test_the_model_that_was_moved_is_the_one_that_was_built():
    assert torch.equal(made("llama", torch.float64).lm_head.weight, build("llama").lm_head.weight)
