"""Tensors made under ``torch.inference_mode`` count no versions; patches work there as under ``no_grad``."""

from __future__ import annotations

import pytest
import torch
from oracle import models

import trainless


def _clone(inputs):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize(
    ("family", "method", "parameters"),
    [("llama", "act", {"alpha": 1.0, "skip_layers": 0, "min_rows": 2}), ("flux", "entropy", {"trained": 32})],
)
def test_inference_mode_gives_the_same(family, method, parameters):
    model, inputs = models.build(family), models.inputs(family)
    with trainless.patched(model, method, **parameters) as patch:
        with torch.no_grad():
            want = model(**inputs)[0]
        with torch.inference_mode():
            # Copies made in here are inference tensors, as are the masks that the model builds.
            got = model(**_clone(inputs))[0]
        assert patch.report().methods[0].acted > 0
    assert torch.equal(got, want)
