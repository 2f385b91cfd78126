"""What is relied on in transformers: tried on a version that is not tested, and refused where it no longer holds."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import models
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

import trainless
from trainless.hosts.transformers import contract as transformers_contract
from trainless.hosts.transformers import version as transformers_version
from trainless.hosts.transformers.contract import CACHE, GENERATE, REGISTRY, problem
from trainless.seams import Lease


@pytest.fixture(autouse=True)
def untested(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A version that nobody has tested; what was tried on it before is forgotten."""
    monkeypatch.setattr(transformers_version, "version", "99.0.0")
    monkeypatch.setattr(transformers_contract, "version", "99.0.0")
    for cached in (transformers_contract._failed, transformers_contract._warn):
        cached.cache_clear()
    yield
    for cached in (transformers_contract._failed, transformers_contract._warn):
        cached.cache_clear()


@pytest.fixture
def quiet() -> Iterator[None]:
    with pytest.warns(UserWarning, match="none of the versions"):
        yield


def test_it_warns_once_and_works() -> None:
    model = models.build("llama")
    with pytest.warns(UserWarning, match=r"99\.0\.0 is none of the versions") as found:
        trainless.patch(model, "h2o", heavy=4, recent=4).remove()
        trainless.patch(model, "attn_temperature", temperature=0.5).remove()
    assert sum("none of the versions" in str(w.message) for w in found) == 1


def test_a_tested_version_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_version, "version", f"{transformers_version.TESTED[-1]}.7")
    monkeypatch.setattr(transformers_contract, "TRIES", {})
    assert problem(REGISTRY) is problem(CACHE) is problem(GENERATE) is None


def test_attention_that_looks_nothing_up_is_refused(monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    forward = LlamaAttention.forward

    def deaf(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine = self.config
        self.config = getattr(mine, "_real", mine)
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config = mine

    monkeypatch.setattr(LlamaAttention, "forward", deaf)
    with pytest.raises(trainless.Unsupported, match=r"llama: transformers 99.*no longer calls the function"):
        trainless.patch(models.build("llama"), "attn_temperature", temperature=0.5)
    explained = trainless.explain(models.build("llama"), "attn_temperature", temperature=0.5)
    assert not explained.ok and "99.0.0" in str(explained.problems[0].message)


def test_a_cache_that_uses_other_layers_is_refused(monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    update = DynamicCache.update

    def elsewhere(self: Any, key: Any, value: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        held = self.__dict__.setdefault("elsewhere", {})
        stock = held.setdefault(layer, DynamicCache())
        return update(stock, key, value, 0, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", elsewhere)
    model = models.build("llama")
    for method, given in (("h2o", {"heavy": 4, "recent": 4}), ("act", {}), ("kvquant", {})):
        with pytest.raises(trainless.Unsupported, match=f"{method}: .*99.0.0"):
            trainless.patch(model, method, **given)
    trainless.patch(model, "attn_temperature", temperature=0.5).remove()  # needs no cache layer


def test_masks_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    sizes = DynamicCache.get_mask_sizes
    monkeypatch.setattr(DynamicCache, "get_mask_sizes", lambda self, *a: (sizes(self, *a)[0] - 1, 0))
    with pytest.raises(trainless.Unsupported, match=r"99\.0\.0"):
        trainless.patch(models.build("llama"), "h2o", heavy=4, recent=4)


def test_chunks_that_are_not_seen_as_one_prompt_are_refused(
    monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """As on the first version that called its caches otherwise, where each chunk was evicted by itself."""
    model = models.build("llama")
    ids = models.prompt(20)
    given = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 2,
        "do_sample": False,
        "pad_token_id": 0,
    }
    monkeypatch.setattr(Lease, "deferring", property(lambda self: False, lambda self, value: None))
    with trainless.patched(model, "h2o", heavy=4, recent=4):
        model.generate(ids, **given)
        with pytest.raises(trainless.Unsupported, match=r"prefill_chunk_size.*99\.0\.0.*in chunks"):
            model.generate(ids, prefill_chunk_size=6, **given)


def test_continuous_batching_is_refused_before_it_starts() -> None:
    model = models.build("llama").float()
    with pytest.warns(UserWarning):
        patch = trainless.patch(model, "attn_temperature", temperature=0.5)
    for start in (lambda: model.generate_batch([[3, 4, 5]]), model.init_continuous_batching):
        with pytest.raises(trainless.Unsupported, match="attn_temperature: continuous batching"):
            start()
    patch.remove()
    assert not {"generate_batch", "init_continuous_batching"} & set(vars(model))
