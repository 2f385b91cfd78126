"""verify follows what cache layers keep: kept sets against their rules, codes against what was fed, the layer itself."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from oracle import decoder_zoo, models
from torch import Tensor

import trainless
from trainless.cache import CompressingLayer, FixedPackedLayer, store
from trainless.cache.slots import Slots
from trainless.hosts.transformers import host as transformers
from trainless.kernels.quant_kv import format as packed_format

from .toys import detail, failures, llama, status

EVICTORS: list[tuple[str, dict[str, Any]]] = [
    ("h2o", {"heavy": 6, "recent": 6}),
    ("h2o", {"heavy": 6, "recent": 6, "gqa": "max", "normalise": True}),
    ("streaming", {"sinks": 2, "recent": 10}),
    ("tova", {"capacity": 12}),
    ("tova", {"capacity": 12, "shared": False}),
    ("snapkv", {"capacity": 16, "window": 4}),
    ("snapkv", {"capacity": 16, "window": 4, "pooling": "max", "pool": 3}),
    ("keydiff", {"capacity": 16, "sinks": 2, "recent": 4}),
    ("knorm", {"capacity": 0.5, "recent": 4}),
    ("zipvl", {"min_tokens": 8, "probes": (4, 4), "interval": 2, "mode": "discard"}),
]
PACKERS: list[tuple[str, dict[str, Any]]] = [
    ("kvquant", {"group": 8, "residual": 8}),
    ("kvquant", {"group": 8, "residual": 8, "k_bits": 2, "v_bits": 8}),
    ("zipcache", {"interval": 3}),
    ("zipvl", {"min_tokens": 8, "probes": (4, 4), "interval": 2}),
]


@pytest.mark.parametrize(("method", "given"), EVICTORS, ids=lambda v: v if isinstance(v, str) else "")
def test_kept_sets_are_those_of_the_rule(method: str, given: dict[str, Any]) -> None:
    found = trainless.patch(llama(), method, **given).verify()
    assert found and status(found)[method, "kept"] == status(found)[method, "result"] == "ok", str(found)
    assert status(found)["whole patch", "cache"] == status(found)["whole patch", "padding"] == "ok"
    assert "after 0 calls" not in detail(found, "kept")


@pytest.mark.parametrize(("method", "given"), PACKERS, ids=lambda v: v if isinstance(v, str) else "")
def test_codes_are_as_near_as_their_steps_allow(method: str, given: dict[str, Any]) -> None:
    found = trainless.patch(llama(), method, **given).verify()
    assert found and status(found)[method, "precision"] == status(found)[method, "result"] == "ok", str(found)


@pytest.mark.parametrize(
    "beside", [("h2o", {"heavy": 6, "recent": 6}), ("kvquant", {"group": 8, "residual": 8})]
)
def test_heads_are_read_in_the_order_in_which_methods_are_told_of_them(beside: Any) -> None:
    """JetMoE repeats its heads as a whole; its cache has each once, and query heads stand beside theirs then."""
    model = decoder_zoo.build("jetmoe")
    uses = [
        {"use": "act", "with": {"alpha": 1.5, "skip_layers": 0}},
        {"use": beside[0], "with": beside[1]},
    ]
    found = trainless.patch(model, uses).verify()
    assert found and status(found)["act", "result"] == "ok", str(found)


def test_a_mask_that_is_the_same_for_every_key() -> None:
    """MiniMax has one entry for all keys in single steps of a padded batch."""
    found = trainless.patch(decoder_zoo.build("minimax"), "act", alpha=1.5, skip_layers=0).verify()
    assert found and status(found)["act", "result"] == "ok", str(found)


def test_rules_that_meet_on_one_layer_are_followed_together() -> None:
    what = [
        {"use": "h2o", "with": {"heavy": 8, "recent": 24}},
        {"use": "kvquant", "with": {"group": 8, "residual": 8}},
        {"use": "act", "with": {"alpha": 1.5, "skip_layers": 0}},
    ]
    found = trainless.patch(llama(), what).verify()
    said = {name: how for (_, name), how in status(found).items()}
    # A method that looks at each call is never on a settled cache.
    assert said.pop("settled steps") == "not checked" and set(said.values()) == {"ok"}, str(found)
    assert "act: its mass depends on each call" in detail(found, "settled steps")
    assert "kv/mass" in detail(found, "result")


# ---------------------------------------------------------------- faults


def _lowest_worth(own: Any) -> Any:
    return lambda self: -own(self)


def _no_protection(own: Any) -> Any:
    return lambda self: own(self) & (self.positions < 0)


def _one_more(own: Any) -> Any:
    def freeze(self: Any) -> None:
        own(self)
        self.budgets = [b + 1 for b in self.budgets]

    return freeze


KEPT_WRONGLY = [
    ("_worth", _lowest_worth, "dropped a token of worth"),
    ("_protected", _no_protection, "first or recent token"),
    ("_freeze", _one_more, "where its budget leaves"),
]


@pytest.mark.parametrize(("name", "wrong", "says"), KEPT_WRONGLY, ids=[k[0] for k in KEPT_WRONGLY])
def test_a_wrong_kept_set_is_found(name: str, wrong: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(llama(), "h2o", heavy=6, recent=6)
    monkeypatch.setattr(CompressingLayer, name, wrong(getattr(CompressingLayer, name)))
    found = made.verify()
    assert "kept" in failures(found) and says in detail(found, "kept"), str(found)


def test_scores_of_the_wrong_heads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(llama(), "h2o", heavy=6, recent=6)
    own = CompressingLayer._grouped
    monkeypatch.setattr(CompressingLayer, "_grouped", lambda self, mass: own(self, mass.flip(1)))
    assert "kept" in failures(made.verify())


def test_keys_of_other_tokens_than_those_kept_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(llama(), "streaming", sinks=2, recent=10)
    own = Slots._take

    def wrong(self: Any, index: Tensor) -> None:
        own(self, index)
        self.keys = self.keys.roll(1, 2)

    monkeypatch.setattr(Slots, "_take", wrong)
    assert "result" in failures(made.verify())


def test_attention_to_padding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter row of a padded batch may not see the slots that it leaves empty."""
    made = trainless.patch(llama(), "h2o", heavy=0.3, recent=0.3)
    assert made.verify()
    monkeypatch.setattr(CompressingLayer, "valid", lambda self: None)
    monkeypatch.setattr(CompressingLayer, "mask", lambda self, mask, rows, causal: (None, causal or rows > 1))
    assert "result" in failures(made.verify())


@pytest.mark.parametrize(
    ("method", "given"),
    [("tova", {"capacity": 6}), ("h2o", {"heavy": 3, "recent": 3}), ("random", {"capacity": 6})],
)
def test_padding_that_counts_for_tokens_is_found(
    method: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = CompressingLayer.note
    monkeypatch.setattr(CompressingLayer, "note", lambda self, real: own(self, None))
    found = trainless.patch(llama(), method, **given).verify()
    assert "kept" in failures(found), str(found)


def test_wrong_codes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(llama(), "kvquant", group=8, residual=8, k_bits=8, v_bits=8)
    own = packed_format._codes
    monkeypatch.setattr(
        packed_format, "_codes", lambda x, step, least, bits, seen: own(x, step, least, bits, seen) // 2
    )
    found = made.verify()
    assert "precision" in failures(found) and "times as far" in detail(found, "precision")


def test_codes_of_other_widths_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(llama(), "kvquant", group=8, residual=8, k_bits=8, v_bits=8)
    own = store.quantise
    # Buffers of fixed size would refuse such codes before anybody looks at them.
    monkeypatch.setattr(FixedPackedLayer, "freeze", lambda self: None)
    monkeypatch.setattr(
        store, "quantise", lambda k, v, kb, vb, valid=None, root=None: own(k, v, 2, 2, valid, root)
    )
    found = made.verify()
    assert "precision" in failures(found) and "2 and 2 bits" in detail(found, "precision")


def test_codes_that_are_read_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainless.engine import packed

    made = trainless.patch(llama(), "kvquant", group=8, residual=8)
    own = packed.packed_rows

    def wrong(query: Tensor, segments: Any, **more: Any) -> Any:
        return own(query, segments, **{**more, "scale": more["scale"] * 1.1})

    monkeypatch.setattr(packed, "packed_rows", wrong)
    found = made.verify()
    assert "result" in failures(found) and status(found)["kvquant", "precision"] == "ok"


def test_the_wrong_layer_of_the_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods keep what they remember on a layer that stands beside the one that the call has updated."""
    made = trainless.patch(llama(), "act", alpha=1.5, skip_layers=0)
    own, beside = transformers.call_of, {}

    def wrong(*args: Any) -> Any:
        call = own(*args)
        layer = beside.setdefault(id(call.layer), (call.layer, copy.copy(call.layer)))[1]
        return dataclasses.replace(call, layer=layer)

    monkeypatch.setattr(transformers, "call_of", wrong)
    found = made.verify()
    assert "cache" in failures(found) and "another layer of the cache" in detail(found, "cache"), str(found)


def test_a_cache_that_is_reordered_is_not_followed() -> None:
    model, ids = llama(), models.prompt(30)
    made = trainless.patch(model, "h2o", heavy=4, recent=4)
    found = made.verify(lambda m: m.generate(ids, num_beams=2, max_new_tokens=4, do_sample=False))
    assert found, str(found)
    assert "not followed" in detail(found, "result") or "reordered" in detail(found, "result")


def test_latents_in_the_cache_are_followed_through_their_expansion() -> None:
    """Multi-head latent attention caches one narrow head and expands it afterwards."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=2, max_position_embeddings=256, initializer_range=0.3, pad_token_id=0,
    )).eval()  # fmt: skip
    made = trainless.patch(model, "streaming", sinks=2, recent=10)
    found = made.verify()
    assert status(found)["streaming", "result"] == status(found)["streaming", "kept"] == "ok", str(found)
    made.remove()
    # What is made of codes stands in the order of the slots beside an evictor, and not in that of the tokens.
    packing = {"use": "kvquant", "with": {"group": 8, "residual": 8}}
    found = trainless.patch(model, [{"use": "h2o", "with": {"heavy": 16, "recent": 16}}, packing]).verify()
    assert status(found)["h2o", "result"] == status(found)["kvquant", "precision"] == "ok", str(found)
    assert found, str(found)


@pytest.mark.parametrize("method", ["act", "kvquant"])
def test_several_attentions_over_one_update_are_no_fault(method: str) -> None:
    """DiffLlama attends twice over the keys that it puts into its cache once."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    torch.manual_seed(0)
    model = DiffLlamaForCausalLM(DiffLlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, initializer_range=0.3,
    )).eval()  # fmt: skip
    given = {"skip_layers": 0, "alpha": 1.5} if method == "act" else {"group": 8, "residual": 8}
    found = trainless.patch(model, method, **given).verify()
    assert found and status(found)["whole patch", "cache"] == status(found)[method, "result"] == "ok", str(
        found
    )
