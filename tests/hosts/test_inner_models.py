"""Patches on a model and on one inside it: what generation around them does, and coming off in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import models
from torch import Tensor, nn

import trainless

BUDGET = {"heavy": 2, "recent": 2}
PROMPT = torch.arange(3, 23)[None] % 40


def _generate(model: nn.Module, **options: Any) -> Tensor:
    found: Tensor = model.generate(  # type: ignore[operator]
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return found


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}]
)
@pytest.mark.parametrize("method", ["h2o", "act"])
def test_what_a_patch_inside_cannot_prepare_for_is_refused(method: str, options: dict[str, Any]) -> None:
    model = models.build("llama")
    given = BUDGET if method == "h2o" else {"skip_layers": 0}
    with trainless.patched(model.model, method, **given):
        _generate(model)
        if method == "act" and "use_cache" in options:
            assert _generate(model, **options).shape[1] > PROMPT.shape[1]
            return
        with pytest.raises(
            trainless.Unsupported, match=rf"{method}: .*put the patch on {type(model).__name__}"
        ):
            _generate(model, **options)
    _generate(model, **options)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("removed", [False, True])
def test_a_patch_on_the_outer_model_prepares_for_sites_that_were_patched_inside(
    options: dict[str, Any], removed: bool
) -> None:
    model, other = models.build("llama"), models.build("llama")
    inside = trainless.patch(model.model, "attn_temperature", temperature=1.0)
    trainless.patch(model, "h2o", **BUDGET)
    if removed:
        inside.remove()
    with trainless.patched(other, "h2o", **BUDGET):
        expected = _generate(other, **options)
    assert torch.equal(_generate(model, **options), expected)


@pytest.mark.parametrize("inner_first", [False, True])
def test_inputs_are_noted_whichever_patch_comes_off_first(inner_first: bool) -> None:
    model = models.build("llama")
    first, second = (model.model, model) if inner_first else (model, model.model)
    stays = {name for module in model.modules() for name in vars(module)}
    gone, left = trainless.patch(first, "head_gain", gain=0.5), trainless.patch(second, "h2o", **BUDGET)
    gone.remove()
    packed = torch.cat([torch.arange(10), torch.arange(10)])[None]
    with pytest.raises(trainless.Unsupported, match="several sequences"):
        model(PROMPT, position_ids=packed)
    left.remove()
    assert {name for module in model.modules() for name in vars(module)} == stays
