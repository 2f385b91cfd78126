"""attn_temperature's schedules beside caches that drop tokens, under other masks, and where none by rows is taken."""

from __future__ import annotations

import pytest
import torch
from oracle import H2O, Scheduled, models, replay

import trainless
from trainless.patchers import get
from trainless.seams import Site

LOGN = {"schedule": "logn", "trained": 4}


def test_tokens_that_were_dropped_still_count():
    model = models.build("llama", seed=2)
    ids, mask = models.left_padded([19, 12])
    calls = [15, 1, 2, 1]
    with torch.no_grad():
        want = replay(model, [Scheduled(**LOGN), H2O(4, 3, reduce="call")], ids, mask, calls)
        trainless.patch(
            model,
            [{"use": "attn_temperature", "with": LOGN}, {"use": "h2o", "with": {"heavy": 4, "recent": 3}}],
        )
        found = replay(model, None, ids, mask, calls)
    for a, b, shown in zip(found, want, mask.bool().split(calls, 1), strict=True):
        torch.testing.assert_close(a[shown], b[shown], atol=1e-9, rtol=1e-9)


def test_rows_up_to_the_trained_length_have_the_bits_of_the_stock_model():
    model = models.build("llama", dtype=torch.float32)
    ids = models.prompt(20)
    with torch.no_grad():
        stock = model(ids).logits
        trainless.patch(model, "attn_temperature", schedule="logn", trained=12)
        found = model(ids).logits
    assert torch.equal(found[:, :12], stock[:, :12])
    assert not torch.equal(found[:, 12:], stock[:, 12:])


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.grid)])
def test_every_implementation_is_scaled_alike(implementation: str):
    model = models.build("llama", dtype=torch.float32)
    ids, mask = models.left_padded([18, 11])
    trainless.patch(model, "attn_temperature", **LOGN)
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(implementation)
        found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], want[mask.bool()], atol=2e-5, rtol=2e-5)


def test_soft_capped_logits_take_no_factor_by_rows_and_one_number_they_do():
    model = models.build("gemma2", dtype=torch.float32)
    ids = models.prompt(9)
    with pytest.raises(trainless.NoMatch, match="soft-capped"):
        trainless.patch(model, "attn_temperature", **LOGN)
    with trainless.patched(model, "attn_temperature", schedule="yarn", trained=4, length=64), torch.no_grad():
        model(ids)


def test_a_denoiser_is_refused_by_name():
    method, site = get("attn_temperature"), Site("attn", torch.nn.Identity(), "diffusers")
    assert "entropy" in str(method(**LOGN).refuses(site)) and method(temperature=2.0).refuses(site) is None


def test_schedules_of_texts_are_refused_on_images_and_the_factor_of_yarn_where_it_is_already():
    with pytest.raises(trainless.NoMatch, match="patches of an image"):
        trainless.patch(models.build("vit"), "attn_temperature", **LOGN)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model = models.build("llama", rope_parameters=yarn)
    with pytest.raises(trainless.NoMatch, match="rotation already"):
        trainless.patch(model, "attn_temperature", schedule="yarn", trained=64, length=256)
