"""Families with something of their own in attention: honoured exactly, or refused by name."""

import importlib

import pytest
import torch
from oracle import float64_math, install, models, replay
from transformers import DynamicCache

import trainless

from .cases import LANGUAGE, Case, named
from .reference import attention_of
from .tools import CALLS, EXACT, Snapshot, build, differs, outputs, same

# Families whose attention is not dispatched through the interface, each with the smallest config it takes.
CLOSED = {
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67}),
    "falcon": (
        "FalconForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 67},
    ),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 67}),
    "deberta": (
        "DebertaModel",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 67},
    ),
    "deberta_v2": (
        "DebertaV2Model",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 67},
    ),
    "longformer": (
        "LongformerModel",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "vocab_size": 67,
            "attention_window": [4, 4],
        },
    ),
    "swinv2": (
        "Swinv2Model",
        {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", CLOSED)
@pytest.mark.parametrize("method", ["attn_temperature", "head_gain", "h2o", "act"])
def test_families_that_do_not_dispatch_are_refused_by_name(family: str, method: str):
    name, fields = CLOSED[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(module, name)
    model = cls(cls.config_class(**fields)).eval()
    before = Snapshot(model)
    with pytest.raises(trainless.Unsupported, match=family.replace("_", ".")):
        trainless.patch(model, method, **({"temperature": 0.5} if method == "attn_temperature" else {}))
    before.check(model)


# ---------------------------------------------------------------- soft cap, windows, position bias


@pytest.mark.parametrize(**named([c for c in LANGUAGE if "gemma2" in c.families]))
def test_the_soft_cap_matters_and_is_honoured(case: Case):
    """The oracle caps; without the cap the result would be another one."""
    capped, free = build("gemma2"), build("gemma2", attn_logit_softcapping=None)
    for model in (capped, free):
        trainless.patch(model, case.method, **case.parameters)
    assert differs(outputs(capped, "gemma2"), outputs(free, "gemma2"), 1e-3)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("method", ["h2o", "streaming"])
def test_evictors_leave_sliding_layers_alone(family: str, method: str):
    model = build(family)
    given = {"recent": 4}
    if family == "mistral":
        with pytest.raises(trainless.NoMatch, match=r"sliding-window layer keeps its own window"):
            trainless.patch(model, method, **given)
        return
    patch = trainless.patch(model, method, **given)
    report = patch.report().methods[0]
    assert report.sites == 1 and len(report.skipped) == 2
    assert "sliding-window" in str(patch.report())


@pytest.mark.parametrize("method", ["h2o", "streaming", "act"])
def test_methods_of_causal_text_refuse_encoders(method: str):
    for family in ("bert", "vit"):
        model = build(family)
        before = Snapshot(model)
        with pytest.raises(trainless.NoMatch, match=method):
            trainless.patch(model, method)
        before.check(model)


@pytest.mark.parametrize("method", ["h2o", "streaming"])
def test_evictors_refuse_a_position_bias(method: str):
    with pytest.raises(trainless.NoMatch, match="position bias"):
        trainless.patch(build("t5"), method, recent=4)


def test_t5_generates_under_a_patch_as_the_oracle_does():
    from oracle import AttnTemperature, HeadGain

    model = build("t5")
    given = models.inputs("t5")
    given.pop("decoder_input_ids")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    heads = [[0, 1], [2, 3]]
    with install(model, [AttnTemperature(0.6), HeadGain(heads, 0.3)]):
        want = model.generate(**given, **options)
    trainless.patch(model, "attn_temperature", temperature=0.6)
    trainless.patch(model, "head_gain", heads=heads, gain=0.3)
    found = model.generate(**given, **options)
    assert torch.equal(found.sequences, want.sequences)
    same(found.logits, want.logits, 2e-6)


def _biased(family: str):
    """A vision transformer that adds its position bias to the attention mask."""
    from transformers import BeitConfig, BeitModel, SwinConfig, SwinModel

    torch.manual_seed(0)
    if family == "swin":
        more = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
        model = SwinModel(SwinConfig(image_size=32, patch_size=2, **more))
    else:
        more = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
        model = BeitModel(BeitConfig(image_size=32, patch_size=8, use_relative_position_bias=True, **more))
    model = model.double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "bias" in name and "position" in name:
            p.normal_(0, 2)
    return model


@pytest.mark.parametrize("family", ["swin", "beit"])
def test_a_position_bias_inside_the_mask_is_divided_too(family: str):
    model = _biased(family)
    given = {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()}
    twin = _biased(family)
    for name, module in twin.named_modules():
        if hasattr(module, "scaling"):
            module.scaling = module.scaling / 0.5
        for key, p in module.named_parameters(name, recurse=False):
            if "position" in key and "bias" in key:
                p.div_(0.5)
    want = twin(**given).last_hidden_state
    free = model(**given).last_hidden_state
    with trainless.patched(model, "attn_temperature", temperature=0.5):
        found = model(**given).last_hidden_state
    same([found], [want], EXACT)
    assert differs([found], [free], 1e-6)
    # Beside an edit of the output, on the long way.
    gain = {"use": "head_gain", "with": {"gain": 0.5}}
    trainless.patch(twin, [gain])
    trainless.patch(model, [{"use": "attn_temperature", "with": {"temperature": 0.5}}, gain])
    same([model(**given).last_hidden_state], [twin(**given).last_hidden_state], EXACT)


def test_modules_that_ask_which_implementation_they_run_under_are_refused():
    """Under our name they would compute something else, at an identity as well."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67, "n_positions": 64}
    trainless.patch(GPT2LMHeadModel(GPT2Config(**sizes)), "attn_temperature", temperature=0.5)
    upcasting = GPT2LMHeadModel(GPT2Config(**sizes, reorder_and_upcast_attn=True))
    more = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    more |= {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    more |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    more |= {"first_k_dense_replace": 2, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}
    sparse = DeepseekV32ForCausalLM(DeepseekV32Config(vocab_size=67, num_key_value_heads=4, **more))
    for model in (upcasting, sparse):
        with pytest.raises(trainless.NoMatch, match="computes something else for each name"):
            trainless.patch(model, "attn_temperature", temperature=1.0)


def test_where_part_narrows_to_the_encoder():
    from oracle import AttnTemperature

    model = build("t5")
    with install(model, AttnTemperature(0.6, part="encoder")):
        want = outputs(model, "t5")
    use = {"use": "attn_temperature", "with": {"temperature": 0.6}, "where": {"part": "encoder"}}
    patch = trainless.patch(model, [use])
    same(outputs(model, "t5"), want, EXACT)
    assert patch.report().methods[0].sites == 3


# ---------------------------------------------------------------- learned sinks


def _gpt_oss(dtype: torch.dtype = torch.float64):
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=67, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "full_attention"], max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager", experts_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GptOssForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            p.normal_(0, 0.4)
        elif name.endswith("sinks"):
            p.normal_(0.5, 1.0)
        elif p.dim() >= 2:
            p.normal_(0, 0.15 if "embed" not in name else 1.0)
    return model


def _sink_reference(model, ids, edit):
    """Every layer's dense attention with the learned sink as one more key without a value; ``edit`` per call."""

    def dense(module, query, key, value, seen, scaling, kwargs):
        z = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
        sink = kwargs["s_aux"].to(z)[None, :, None, None].expand(*z.shape[:3], 1)
        return edit(module, torch.cat([z, sink], -1)) @ value

    with attention_of(model, dense), float64_math():
        return replay(model, None, ids, None, CALLS)


def _softmax_without_last(z: torch.Tensor) -> torch.Tensor:
    return z.softmax(-1)[..., :-1]


LEARNED = {
    "none": (None, {}, lambda module, z: _softmax_without_last(z)),
    "attn_temperature": (
        "attn_temperature",
        {"temperature": 0.7},
        lambda module, z: _softmax_without_last(z / 0.7),
    ),
    "head_gain": (
        "head_gain",
        {"gain": 0.5},
        lambda module, z: 0.5 * _softmax_without_last(z),
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_learned_sinks(name: str):
    method, given, edit = LEARNED[name]
    model = _gpt_oss()
    ids = models.prompt(22)
    want = _sink_reference(model, ids, edit)
    if method:
        trainless.patch(model, method, **given)
    with float64_math():
        found = replay(model, None, ids, None, CALLS)
    same(found, want, EXACT)


def test_learned_sinks_of_evicting_layers():
    """Streaming keeps what it keeps; the sink stays in every row's denominator."""
    model = _gpt_oss()
    ids = models.prompt(22)
    seen: dict[int, list[int]] = {}

    def edit(module, z):
        p = _softmax_without_last(z)
        if module.layer_idx == 1:
            return p
        lq, lk = z.shape[2], z.shape[3] - 1
        kept = seen.setdefault(module.layer_idx, []) if lk > lq else []
        now = [*kept, *range(lk - lq, lk)]
        gone = [j for j in range(lk) if j not in now]
        z = z.clone()
        z[..., gone] = -torch.inf
        seen[module.layer_idx] = sorted(set(now[:2]) | set(now[-5:]))
        return _softmax_without_last(z)

    want = _sink_reference(model, ids, edit)
    patch = trainless.patch(model, "streaming", sinks=2, recent=5)
    assert patch.report().methods[0].sites == 2
    with float64_math():
        found = replay(model, None, ids, None, CALLS, DynamicCache())
    same(found, want, EXACT)


def test_unknown_arguments_that_could_change_logits_are_refused():
    model = build("llama")
    trainless.patch(model, "head_gain", gain=0.5)
    layer = model.model.layers[0].self_attn
    states = torch.randn(1, 4, 32, dtype=torch.float64)
    tables = model.model.rotary_emb(states, torch.arange(4)[None])
    with pytest.raises(trainless.Unsupported, match="mystery_bias"):
        layer(states, position_embeddings=tables, attention_mask=None, mystery_bias=torch.ones(1))
    layer(states, position_embeddings=tables, attention_mask=None, mystery_bias=None)
