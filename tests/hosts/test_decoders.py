"""What the transformers host knows of a model before a call, and what it checks at one."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
import transformers
from oracle import decoder_zoo as zoo
from oracle import models
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

import trainless
from trainless.hosts import components, find_sites
from trainless.hosts.transformers.host import TransformersHost
from trainless.hosts.transformers.inputs import Noted
from trainless.hosts.transformers.rotary import rotation
from trainless.hosts.transformers.version import cache_in

# ---------------------------------------------------------------- parts and roles


def _parts(model: nn.Module) -> dict[str, set[tuple[str, ...]]]:
    """Role and parts of each attention class in a model."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for site in find_sites(components(model)):
        found.setdefault(type(site.module).__name__, set()).add((site.role, *sorted(site.parts)))
    return found


def _on_meta(name: str, config: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, name)(config)  # type: ignore[no-any-return]


def _idefics2() -> nn.Module:
    text = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 120}  # fmt: skip
    config = transformers.Idefics2Config(
        text_config=text,
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        perceiver_config={"model_type": "idefics2", "resampler_n_latents": 4, "resampler_depth": 2, "hidden_size": 32,
                          "resampler_n_heads": 4, "num_key_value_heads": 2, "resampler_head_dim": 8},
    )  # fmt: skip
    return _on_meta("Idefics2ForConditionalGeneration", config)


def test_a_resampler_is_a_connector_and_the_decoder_is_the_text() -> None:
    model = _idefics2()
    assert _parts(model) == {
        "Idefics2VisionAttention": {("self", "encoder", "vision")},
        "Idefics2PerceiverAttention": {("cross", "connector", "encoder")},
        "MistralAttention": {("self", "decoder", "text")},
    }
    # Its published text model has windows everywhere: nothing is left, and the resampler is no way out.
    with pytest.raises(trainless.NoMatch, match="sliding-window"):
        trainless.patch(model, "h2o")
    named = {"use": "attn_temperature", "with": {"temperature": 0.5}, "where": {"part": "text"}}
    assert trainless.explain(model, [named]).methods[0].sites == 2


def test_q_formers_are_connectors_and_audio_towers_are_audio() -> None:
    blip = transformers.Blip2Config()
    for part in (blip.vision_config, blip.qformer_config, blip.text_config):
        part.num_hidden_layers = 2
    found = _parts(_on_meta("Blip2ForConditionalGeneration", blip))
    assert found["Blip2QFormerMultiHeadAttention"] == {
        ("self", "connector", "encoder"), ("cross", "connector", "encoder")
    }  # fmt: skip
    assert found["OPTAttention"] == {("self", "decoder", "text")}
    omni = transformers.Qwen2_5OmniThinkerForConditionalGeneration.config_class()
    omni.text_config.num_hidden_layers, omni.vision_config.depth, omni.audio_config.encoder_layers = 2, 2, 2
    omni.text_config.layer_types = ["full_attention"] * 2
    found = _parts(_on_meta("Qwen2_5OmniThinkerForConditionalGeneration", omni))
    assert found["Qwen2_5OmniAudioAttention"] == {("self", "audio", "encoder")}
    assert found["Qwen2_5OmniAttention"] == {("self", "decoder", "text")}
    assert found["Qwen2_5OmniVisionAttention"] == {("self", "encoder", "vision")}


def test_encoders_and_decoders_of_text_stay_what_they_are() -> None:
    bart = transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=50)
    bart.encoder_attention_heads = bart.decoder_attention_heads = 2
    found = _parts(_on_meta("BartForConditionalGeneration", bart))
    assert found == {
        "BartAttention": {
            ("self", "encoder", "text"),
            ("self", "decoder", "text"),
            ("cross", "decoder", "text"),
        }
    }


def test_shared_blocks_are_counted_from_nought() -> None:
    layers = [site.layer for site in find_sites(components(zoo.build("zamba2")))]
    assert layers == [0, 1]


# ---------------------------------------------------------------- which classes are reached


class Calling(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * 1.0, weights


class StandaloneAttention(nn.Module):
    """Looks like attention, and computes its own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.hidden = [inner]  # not a child: nothing inside can be reached either

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.hidden[0](*args, **kwargs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_class_that_calls_its_parent_is_reached(attention: str) -> None:
    model, ids = models.build("llama"), models.prompt(20)
    model.set_attn_implementation(attention)
    with trainless.patched(model, "attn_temperature", temperature=0.5):
        want = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.__class__ = Calling
    with trainless.patched(model, "attn_temperature", temperature=0.5) as patch:
        assert torch.equal(model(ids).logits, want) and len(patch.bindings[0].contributions) == 3


def test_sources_need_not_be_readable() -> None:
    scope: dict[str, Any] = {"__name__": "transformers.models.llama.modeling_llama"}
    scope |= {n: v for n, v in vars(modeling_llama).items() if not n.startswith("__")}
    source = inspect.getsource(LlamaAttention).split("\n", 1)[1]  # without its decorator
    exec(compile(source, "<no file>", "exec"), scope)
    model = models.build("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = scope["LlamaAttention"]
    assert trainless.explain(model, "h2o").methods[0].sites == 3


def test_what_is_not_reached_is_said() -> None:
    model = models.build("llama")
    model.model.layers[1].self_attn = StandaloneAttention(model.model.layers[1].self_attn)
    said = trainless.explain(model, "attn_temperature", temperature=0.5)
    assert said.ok and said.unmatched == {"StandaloneAttention": 1}
    assert "not matched: 1 module of class StandaloneAttention" in str(said)
    with trainless.patched(model, "attn_temperature", temperature=0.5) as patch:
        assert patch.report().unmatched == {"StandaloneAttention": 1} and "not matched" in str(patch.report())
    assert not trainless.explain(models.build("llama"), "h2o").unmatched


# ---------------------------------------------------------------- what a call is checked for


class Changing(LlamaAttention):
    """Attends to other keys than those of the cache."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if (cache := cache_in(kwargs)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        interface = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        out, weights = interface(
            self, query, key * 2, value, attention_mask, dropout=0.0, scaling=self.scaling
        )
        return self.o_proj(out.reshape(*shape[:-2], -1)), weights


@pytest.mark.parametrize(
    ("method", "given"), [("h2o", {"heavy": 2, "recent": 2}), ("kvquant", {"group": 4, "residual": 4})]
)
def test_keys_that_are_not_those_of_the_cache_are_refused(method: str, given: dict[str, int]) -> None:
    model, ids = models.build("llama"), models.prompt(20)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Changing
    with trainless.patched(model, method, **given):
        with pytest.raises(trainless.Unsupported, match=rf"{method}.*Changing.*does not attend to the keys"):
            model(ids, use_cache=True)
    with trainless.patched(model, "attn_temperature", temperature=0.5):
        model(ids, use_cache=True)  # which asks nothing of the keys


def test_latents_cannot_be_rolled_and_it_is_said_before_the_call() -> None:
    model = zoo.build("deepseek_v3")
    said = trainless.explain(model, "streaming", recent=8, positions="rolled")
    assert [p.kind for p in said.problems] == ["Unsupported"] and "latents" in said.problems[0].message
    with pytest.raises(trainless.Unsupported, match="latents"):
        trainless.patch(model, "streaming", recent=8, positions="rolled")


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "phi", "glm"])
def test_a_key_turned_further_is_the_key_of_a_later_position(kind: str) -> None:
    """Whether tables have a number for each channel, one for each pair of them, or turn a part of the channels."""
    model = zoo.build(kind)
    module = model.model.layers[-1].self_attn
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    width = module.head_dim
    key = torch.randn(1, 1, 6, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def at(positions: torch.Tensor) -> torch.Tensor:
        cos, sin = model.model.rotary_emb(key, positions[None])
        if kind == "phi":
            turning = cos.shape[-1]
            return torch.cat(
                [apply(key[..., :turning], key[..., :turning], cos, sin)[1], key[..., turning:]], -1
            )
        return apply(key, key, cos, sin)[1]

    site = next(s for s in TransformersHost().sites(model) if s.module is module)
    here, further = torch.arange(6), torch.tensor([3, 0, -2, 7, 1, 5])
    turned = rotation(site, model)(at(here), further[None, None])
    torch.testing.assert_close(turned, at(here + further), rtol=0, atol=1e-6)


def test_steps_of_gpt_oss_are_rolled() -> None:
    """Eviction far behind the newest tokens moves what is kept: not the logits of real positions, and no error."""
    ids, found = zoo.prompt(40), {}
    for positions in ("real", "rolled"):
        model = zoo.build("gpt_oss")
        with trainless.patched(model, "streaming", recent=8, positions=positions):
            cache = model(ids[:, :30], use_cache=True).past_key_values
            found[positions] = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
    assert all(torch.isfinite(t).all() for t in found["rolled"])
    assert (found["rolled"][-1] - found["real"][-1]).abs().max() > 1e-3


def test_packed_latents_are_what_is_held() -> None:
    """A layer holds one head of the latent and of the rotary part, at four bits, and not the heads made of it."""
    model, ids = zoo.build("deepseek_v3", dtype=torch.float32), zoo.prompt(72)
    stock = model(ids, use_cache=True).past_key_values.layers[0]
    with trainless.patched(model, "kvquant", group=16, residual=8) as patch:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        layer, report = cache.layers[0], patch.report().methods[0]
    assert layer.store.segments[0].key.shape[1] == 1
    assert layer.nbytes < 0.5 * (stock.keys.nbytes + stock.values.nbytes)
    assert any("works on what its cache returns" in why for why in report.reasons.values())


BORROWING = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
}


def test_what_is_remembered_grows_with_borrowed_keys() -> None:
    """Gemma 3n's last layers read others' keys: single steps give there what one turn of as many tokens gives."""
    model = zoo.build("gemma3n_text", **BORROWING)
    ids, more = zoo.prompt(24), zoo.prompt(4, 7)
    with trainless.patched(model, "act", alpha=1.5, skip_layers=0, min_rows=2) as patch:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        assert any(layer.states["act"].get("sinks") is not None for layer in cache.layers[4:])
        steps = [model(more[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        turn = model(more, past_key_values=cache).logits
        assert patch.report().methods[0].sites == 6
    assert (torch.cat(steps, 1) - turn).abs().max() < 1e-5 * turn.abs().max()
    stock = DynamicCache(config=model.config)
    model(ids, past_key_values=stock)
    with trainless.patched(model, "act", alpha=1.5, skip_layers=4, min_rows=2):
        with pytest.raises(trainless.InputError, match="start with an empty cache"):
            model(more, past_key_values=stock)


def test_layers_that_are_given_the_last_rows_only_are_passed_over() -> None:
    """Gemma 4 gives its last layers the rows whose logits are asked for: nothing can be said over all of them."""
    model = zoo.build("gemma4_text", **BORROWING)
    said = trainless.explain(model, "act", skip_layers=0)
    assert said.ok and said.methods[0].layers == (0, 1, 2, 3)
    assert any("last rows of a prompt only" in reason for reason in said.methods[0].skipped)
    assert trainless.explain(model, "head_gain", gain=0.5).methods[0].sites == 6
    with trainless.patched(model, "act", skip_layers=0, alpha=1.5, min_rows=2) as patch:
        model.generate(**zoo.padded(zoo.prompt(20), zoo.prompt(11)), max_new_tokens=4)
        assert patch.report().methods[0].acted


# ---------------------------------------------------------------- which rows are one sequence


def _blocks(*lengths: int) -> Tensor:
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]


def test_several_sequences_in_a_row_are_right_or_refused() -> None:
    model = models.build("llama")
    one, two = models.prompt(20, 1), models.prompt(13, 2)
    ids = torch.cat([one, two], 1)
    positions = torch.cat([torch.arange(20), torch.arange(13)])[None]
    ways: list[dict[str, Any]] = [
        {"position_ids": positions},
        {"position_ids": positions, "attention_mask": _blocks(20, 13)},
    ]
    for way in ways:
        with trainless.patched(model, "act", skip_layers=0):
            with pytest.raises(trainless.Unsupported, match="several sequences"):
                model(ids, use_cache=False, **way)
        with trainless.patched(model, "attn_temperature", temperature=0.5):
            got = model(ids, use_cache=False, **way).logits
            want = torch.cat([model(one, use_cache=False).logits, model(two, use_cache=False).logits], 1)
        assert (got - want).abs().max() < 1e-10
    with trainless.patched(model, "h2o", heavy=2, recent=2):
        with pytest.raises(trainless.Unsupported, match="several sequences"):
            model(ids, use_cache=True, **ways[1])


def test_a_causal_mask_of_the_users_own_is_one_sequence() -> None:
    model, ids = models.build("llama"), models.prompt(20)
    mask = _blocks(20)
    with trainless.patched(model, "act", skip_layers=0):
        assert (model(ids, attention_mask=mask).logits - model(ids).logits).abs().max() < 1e-10
        left = mask.clone()
        left[..., :4] = False  # four tokens of padding
        want = model(ids[:, 4:]).logits
        places = torch.cat([torch.zeros(4, dtype=torch.long), torch.arange(16)])[None]
        got = model(ids, attention_mask=left, position_ids=places).logits[:, 4:]
    assert (got - want).abs().max() < 1e-10


def test_padding_is_what_the_model_was_told_and_no_matter_of_the_diagonal() -> None:
    """An indexer may hide a token from itself: it is a token all the same."""
    model, ids = models.build("llama"), models.prompt(20)
    given = {"attention_mask": torch.ones_like(ids)}

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = torch.ones(20, 20, dtype=torch.bool).tril()
        mask[7, 7] = False
        return args, {**kwargs, "attention_mask": mask[None, None]}

    handles = [
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.model.layers
    ]
    with trainless.patched(model, "streaming", sinks=0, recent=15):
        cache = model(ids, use_cache=True, **given).past_key_values
    for handle in handles:
        handle.remove()
    assert cache.layers[0].lengths == [20] and cache.layers[0].kept() == [[list(range(5, 20))] * 2]
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2, 2] = False
    assert Noted(handmade=mask[None, None]).real(4, 1) is None
    mask[3, 2] = False  # now nobody sees it
    assert Noted(handmade=mask[None, None]).real(4, 1).tolist() == [[True, True, False, True]]  # type: ignore[union-attr]


# ---------------------------------------------------------------- attention probabilities


def _eager(seed: int = 0) -> Any:
    model = models.build("llama", seed=seed)
    model.set_attn_implementation("eager")
    return model


def test_probabilities_are_given_as_they_are_after_the_edit() -> None:
    model, ids = _eager(), models.prompt(30)
    stock = model(ids, output_attentions=True).attentions
    with trainless.patched(model, "attn_temperature", temperature=0.5):
        got = model(ids, output_attentions=True).attentions[0]
    want = stock[0].pow(2) / stock[0].pow(2).sum(-1, keepdim=True)
    assert (got - want).abs().max() < 1e-6  # transformers' own softmax is one of float32
    seen: list[Tensor] = []
    values: list[Tensor] = []
    attention = model.model.layers[0].self_attn
    hooks = [
        attention.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0])),
        attention.v_proj.register_forward_hook(lambda m, args, out: values.append(out)),
    ]
    with trainless.patched(model, "act", skip_layers=0, alpha=1.5, beta=0.0, min_rows=2):
        found = model(ids, output_attentions=True, use_cache=True)
        step = model(ids[:, :1], past_key_values=found.past_key_values, output_attentions=True).attentions[0]
    for hook in hooks:
        hook.remove()
    edited = found.attentions[0]
    assert (edited - stock[0]).abs().max() > 1e-2 and (edited.sum(-1) - 1).abs().max() < 1e-6
    assert step.shape == (1, 4, 1, 31) and (step.sum(-1) - 1).abs().max() < 1e-6
    value = values[0].view(1, 30, 2, -1).transpose(1, 2).repeat_interleave(2, 1)
    assert ((edited @ value).transpose(1, 2).reshape(1, 30, -1) - seen[0]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("h2o", {"heavy": 5, "recent": 5}),
        ("streaming", {"sinks": 2, "recent": 6}),
        ("kvquant", {"group": 4, "residual": 4}),
    ],
)
def test_probabilities_that_have_no_columns_are_refused(method: str, given: dict[str, int]) -> None:
    model, ids = _eager(), models.prompt(30)
    stock = model(ids, output_attentions=True).attentions
    with trainless.patched(model, method, **given):
        found = model(ids, output_attentions=True, use_cache=True)
        # The prompt is attended to as ever; what is dropped or packed is so afterwards.
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(found.attentions, stock, strict=True))
        with pytest.raises(trainless.Unsupported, match=rf"{method}: output_attentions"):
            model(ids[:, :1], past_key_values=found.past_key_values, output_attentions=True)


# ---------------------------------------------------------------- advice


def test_another_part_is_advised_only_where_it_is_a_way_out() -> None:
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = _on_meta("ViTModel", vit)
    with pytest.raises(trainless.NoMatch, match="none of them can be patched: not causal") as caught:
        trainless.patch(model, "h2o")
    assert "where" not in str(caught.value)
    assert trainless.explain(model, "attn_temperature", temperature=0.5).ok
