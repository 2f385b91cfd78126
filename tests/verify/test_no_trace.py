"""verify leaves no trace: neither on the model, nor in counters, caches, random states or what others have put there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from contract.tools import Snapshot, outputs, same
from hosts import tiny_vlms
from oracle import models
from torch import Tensor, nn

import trainless
from trainless.patchers import Method
from trainless.seams import Contribution, Site, Weights

from .toys import Toy, llama, patch, status

# ---------------------------------------------------------------- no trace


@contextlib.contextmanager
def unchanged(model: nn.Module, family: str = "llama") -> Iterator[None]:
    """The outputs keep their bits, and after unpatching nothing at all is left."""
    before = outputs(model, family)
    yield
    same(outputs(model, family), before)


def test_the_model_is_as_it_was_between_two_neighbours() -> None:
    model = llama(torch.float64, layers=3)
    snapshot, stock = Snapshot(model), outputs(model, "llama")
    first = trainless.patch(model, "attn_temperature", temperature=0.7)
    middle = trainless.patch(model, "h2o", heavy=4, recent=4)
    last = trainless.patch(model, "head_gain", heads=[[1, 2]], gain=0.3)
    with unchanged(model):
        for made in (middle, first, last):
            reports = [p.report().to_dict() for p in (first, middle, last)]
            assert set(status(made.verify()).values()) == {"ok"}
            assert [p.report().to_dict() for p in (first, middle, last)] == reports
    for made in (middle, last, first):
        made.remove()
    snapshot.check(model)
    same(outputs(model, "llama"), stock)


def test_entries_and_hooks_keep_their_order() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    calls: list[str] = []

    def hook(name: str) -> Any:
        return lambda *args, **kwargs: calls.append(name)

    attention.register_forward_pre_hook(hook("before"))
    first = patch(model, Toy())
    attention.register_forward_pre_hook(hook("after"))
    second = trainless.patch(model, "head_gain", heads=[[0, 0]], gain=0.5)
    runtime = vars(attention)["_trainless"]
    order, hooks = [e.method for e in runtime.entries], list(attention._forward_pre_hooks.values())
    assert first.verify() and second.verify()
    assert [e.method for e in vars(attention)["_trainless"].entries] == order
    second.remove()
    assert first.verify()  # alone now: its hooks come off and go on again
    after = list(attention._forward_pre_hooks.values())
    assert [h in after for h in (hooks[0], hooks[2])] == [True, True]
    assert after.index(hooks[0]) == 0 and after.index(hooks[2]) == 2 and len(after) == 3


@pytest.mark.parametrize("stop", range(1, 6))
def test_interrupted_anywhere_the_patch_is_on_and_counters_are_back(stop: int) -> None:
    model, runs = llama(), 0
    made = patch(model, Toy())
    expected, report = outputs(model, "llama"), made.report().to_dict()

    def probe(model: nn.Module) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == stop:
            raise KeyboardInterrupt
        return model(input_ids=models.prompt(20)).logits

    with pytest.raises(KeyboardInterrupt):
        made.verify(probe)
    assert made.report().to_dict() == report
    same(outputs(model, "llama"), expected)
    made.remove()
    same(outputs(model, "llama"), outputs(llama(), "llama"))


def test_training_mode_comes_back_module_by_module() -> None:
    model = llama(layers=3)
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    assert patch(model, Toy()).verify()
    assert [m.training for m in model.modules()] == modes


def test_a_cache_in_use_survives_a_verify_in_between() -> None:
    model = llama(torch.float64)
    ids = models.prompt(30)

    def text(check: bool) -> Tensor:
        found = trainless.patch(model, "h2o", heavy=4, recent=4)
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            if check:
                assert found.verify()
            step = model(input_ids=ids[:, :1], past_key_values=out.past_key_values).logits
        found.remove()
        return step

    assert torch.equal(text(True), text(False))


def test_replaced_weights_come_and_go() -> None:
    @dataclass(frozen=True)
    class Replaces(Method):
        name: ClassVar[str] = "replaces"

        def contribute(self, site: Site) -> Sequence[Contribution]:
            weight = site.module.q_proj.weight
            return [Weights(tensors={"q_proj.weight": weight.detach() * 2})]

    model = llama()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    made = patch(model, Replaces())
    patched = {k: v.clone() for k, v in model.state_dict().items()}
    found = made.verify()
    assert status(found)["whole patch", "removal"] == "ok" and status(found)["replaces", "acted"] == "ok"
    assert all(torch.equal(v, patched[k]) for k, v in model.state_dict().items())
    made.remove()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- what models keep of a sequence, and others' states


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_offsets_of_the_last_batch_are_set_aside(family: str) -> None:
    """Multi-axis rotary models keep one offset for each row of the last batch; a probe has another number of rows."""
    model = _glm4v() if family == "glm4v" else tiny_vlms.build(family).float()
    made = trainless.patch(model, "attn_temperature", temperature=0.8)
    fresh = status(made.verify())
    assert fresh["attn_temperature", "result"] == "ok" and "failed" not in fresh.values()
    ids = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(1))
    if family == "glm4v":
        model.model.rope_deltas = torch.tensor([[3], [-2]])
    else:
        given = tiny_vlms.prompt(family, [".#..", ".#.."], dtype=torch.float32)
        model.generate(**given, max_new_tokens=2, do_sample=False)
    held = model.model.rope_deltas
    assert isinstance(held, Tensor) and held.shape[0] == 2
    before = held.clone()
    assert status(made.verify()) == fresh
    assert model.model.rope_deltas is held and torch.equal(held, before)
    assert status(made.verify({"input_ids": ids})) is not None
    assert model.model.rope_deltas is held


def _glm4v() -> nn.Module:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    torch.manual_seed(0)
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
    text = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "image_size": 16, "patch_size": 4,
        "intermediate_size": 24,
    }  # fmt: skip
    config = Glm4vConfig(text_config=text, vision_config=vision, image_token_id=90, video_token_id=91)
    return Glm4vForConditionalGeneration(config).eval()


def test_rotary_tables_that_grow_with_the_length_are_as_before() -> None:
    """Dynamic frequencies are buffers and numbers on a module that every longer sequence replaces."""
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 16,
    }
    model = models.build(
        "llama", dtype=torch.float32, exact=False, rope_parameters=rope, max_position_embeddings=16
    )
    rotary = model.model.rotary_emb
    made = trainless.patch(model, "attn_temperature", temperature=0.8)
    plain = {k: v for k, v in vars(rotary).items() if isinstance(v, int | float)}
    table, numbers = rotary.inv_freq, rotary.inv_freq.clone()
    ran = made.verify(lambda m: m(input_ids=models.prompt(40)).logits)
    assert ran and "identity" not in {c.name for c in ran.failed}
    assert rotary.inv_freq is table and torch.equal(rotary.inv_freq, numbers)
    assert {k: v for k, v in vars(rotary).items() if isinstance(v, int | float)} == plain


def test_random_states_of_numpy_and_python_survive_and_repeat() -> None:
    import random

    import numpy

    made = trainless.patch(llama(), "head_gain", gain=0.5)
    numpy.random.seed(3)
    random.seed(3)
    want = numpy.random.get_state()[1].copy(), random.getstate()

    def probe(model: nn.Module) -> Tensor:
        shift = float(numpy.random.rand() + random.random())
        return model(input_ids=models.prompt(20)).logits + shift

    found = made.verify(probe)
    assert status(found)["head_gain", "identity"] == "ok"
    assert (numpy.random.get_state()[1] == want[0]).all() and random.getstate() == want[1]


def test_nothing_watches_afterwards_not_even_when_interrupted() -> None:
    model = llama()
    made = trainless.patch(model, "h2o", heavy=4, recent=4)
    attention = model.model.layers[0].self_attn
    runtime = vars(attention)["_trainless"]
    entries, hooks = list(runtime.entries), (len(attention._forward_pre_hooks), len(attention._forward_hooks))
    runs = 0

    def probe(model: nn.Module) -> Tensor:
        nonlocal runs
        runs += 1
        if runtime.watch is not None:
            raise KeyboardInterrupt
        return model(input_ids=models.prompt(20)).logits

    with pytest.raises(KeyboardInterrupt):
        made.verify(probe)
    assert runs == 3  # paused, patched, watched
    assert runtime.watch is None and runtime.entries == entries
    assert made.verify()
    runtime = vars(attention)["_trainless"]
    assert runtime.watch is None and [e.method for e in runtime.entries] == [e.method for e in entries]
    assert hooks == (len(attention._forward_pre_hooks), len(attention._forward_hooks))


def test_caches_of_the_user_keep_no_wrapper() -> None:
    from transformers import DynamicCache

    model, caches = llama(), []

    def probe(model: nn.Module) -> Tensor:
        caches.append(DynamicCache(config=model.config))
        return model(input_ids=models.prompt(20), past_key_values=caches[-1]).logits

    assert trainless.patch(model, "h2o", heavy=4, recent=4).verify(probe)
    assert caches and all("update" not in vars(cache) for cache in caches)


# ---------------------------------------------------------------- offloaded models


@pytest.mark.parametrize("kind", ["cpu_offload", "cpu_offload_with_hook"])
@pytest.mark.parametrize("family", ["llama", "sd3"])
def test_offloaded_models_are_verified(kind: str, family: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = models.build(family, dtype=torch.float32)
    getattr(accelerate, kind)(model, execution_device=torch.device("cpu"))
    found = trainless.patch(model, "attn_temperature", temperature=0.8).verify()
    assert status(found)["attn_temperature", "result"] == "ok" and found, str(found)


def test_a_pipeline_is_verified_bare_and_offloaded() -> None:
    diffusers = pytest.importorskip("diffusers")
    accelerate = pytest.importorskip("accelerate")
    for offload in (False, True):
        pipe = diffusers.DiTPipeline(
            diffusers.DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
                sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
            ),
            diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4),
            diffusers.DDIMScheduler(),
        )  # fmt: skip
        if offload:
            accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        found = trainless.patch(pipe, "attn_temperature", temperature=0.8).verify()
        assert status(found)["attn_temperature", "result"] == "ok" and found, str(found)
