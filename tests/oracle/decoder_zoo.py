"""Tiny random decoders of every model type that transformers knows, made from the config classes themselves.

``kinds()`` are the model types with a causal language model; ``build(kind)`` one of them, with a few small layers.
A new family needs nothing here as long as its config has the usual names; what some need on top stands in MORE.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

VOCAB = 67
LARGEST = 3_000_000  # parameters of what still counts as tiny

# Model types in the mapping that are encoders, halves of encoder-decoders, or no language model of tokens.
OTHERS = frozenset(
    "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra "
    "ernie git marian mbart megatron-bert moshi musicgen musicgen_melody mvp pegasus plbart prophetnet reformer rembert "
    "roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod".split()
)
SIZES: dict[str, dict[str, Any]] = {
    "tokens": {
        "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        "max_position_embeddings": 512, "n_positions": 512, "vocab_size_per_layer_input": VOCAB,
        "unpadded_vocab_size": VOCAB,
    },
    "widths": {
        "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "embedding_size": 32, "lru_width": 32,
        "conv_dim": 32, "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "block_ff_dim": 48,
        "mlp_hidden_size": 48, "intermediate_size_mlp": 48, "shared_intermediate_size": 48, "dense_intermediate_size": 48,
        "hidden_size_per_layer_input": 8, "laurel_rank": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "layers": {"num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "num_kv_shared_layers": 0},
    "heads": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "n_heads": 4, "num_heads": 8, "head_dim": 8,
        "kv_channels": 8, "rotary_dim": 4, "query_pre_attn_scalar": 8, "sliding_window": 8, "attention_chunk_size": 8,
        "block_size": 8,
    },
    "latents": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "qk_head_dim": 16,
    },
    "experts": {
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
        "moe_k": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
        "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    },
    "recurrence": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4,
        "mamba_chunk_size": 8, "mamba_d_ssm": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
        "state_size": 8, "n_groups": 1, "chunk_size": 8, "conv_kernel": 4, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "time_step_rank": 4,
        "use_mamba_kernels": False, "use_cuda_kernels": False,
    },
}  # fmt: skip
SMALL = {name: value for group in SIZES.values() for name, value in group.items()}
# Fields that hold None by default and are to be set all the same.
SET = {"num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id"}
MIXED = ["linear_attention", "full_attention"] * 2
WINDOWS = ["sliding_attention", "full_attention"] * 2
EACH = {"num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2}
PART = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BYTES = {**PART, "vocab_size": VOCAB, "hidden_size_global": 32}
LATENT = (
    "axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3",
    "sarvam_mla", "youtu",
)  # fmt: skip
ALTERNATING = (
    "granitemoehybrid", "minimax", "olmo_hybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
)  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LATENT, EACH),
    **{kind: {"layer_types": MIXED} for kind in ALTERNATING},
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe")},
    "bailing_hybrid": {**EACH, "layer_types": MIXED, "num_expert_group": 1, "num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "patcher_config": {**BYTES, "sliding_window": 8}, "global_config": PART,
        "encoder_config": BYTES, "decoder_config": BYTES, "local_attention_window_len": 8,
        "num_hidden_layers": 2,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cpmant": {"prompt_types": 4, "prompt_length": 4, "dim_head": 8, "dim_ff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {
        **EACH, "topk_method": "greedy", "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    },
    "dots1": {
        "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    },
    "dots3_note_text": {
        **EACH, **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")}, "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8, "head_dim": 16, "shared_experts_intermediate_size": 16, "index_topk": 8, "index_head_dim": 8,
        "index_n_heads": 2, "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    },
    "dory": {"layer_types": WINDOWS, "n_input_layers": 1, "n_output_layers": 1},
    **{kind: {"layer_types": WINDOWS} for kind in ("gemma3_text", "gemma3n_text", "kolibri1")},
    "gemma4_text": {"global_head_dim": 16, "layer_types": WINDOWS, "num_experts": None},
    "gemma4_unified_text": {"global_head_dim": 16, "layer_types": WINDOWS},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4},
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 3, "num_hidden_layers": 6, "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2, "loop_layer_index_end": 4, "loop_num_passes": 2, "loop_gate_rank": 4,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "d_rel": 4, "rel_extent": 16, "log_scaling_n_floor": 8,
    },
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {
        **EACH, "n_routed_experts": ..., "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": MIXED,
        "linear_attn_config": {"num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4},
    },
    "mistral4": {**EACH, "head_dim": 16},
    "mllama": {"cross_attention_layers": [1]},
    "moss_transcribe_diarize": {
        "text_config": {**PART, "model_type": "qwen3", "vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8},
        "audio_config": {**PART, "num_mel_bins": 8, "max_source_positions": 16},
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"]},
    "phi3": {"sliding_window": ...},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8,
    },
    "phi4_multimodal": {
        "vision_config": {**PART, "image_size": 28, "patch_size": 14},
        "audio_config": {
            **PART, "num_blocks": 2, "nemo_conv_channels": 16, "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        },
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"hidden_size": 128},
    "zamba": {**HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# What is no language model on its own.
APART = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "a drafter; it is given the states of the model that it drafts for",
)
# Parameters of a recurrence or a router, which are left as they are initialised.
LEFT = (
    "A_log",
    "a_log",
    "dt_",
    ".D",
    "conv1d",
    "time_",
    "rg_lru",
    "recurrent",
    "router",
    "gate.weight",
    "decay",
)
SHARP = ("q_proj", "k_proj", "qkv", "query", "c_attn", "q_a_proj", "q_b_proj", "kv_b_proj", "Wqkv")


def kinds() -> list[str]:
    """Model types of transformers with a causal language model, sorted.

    A model that sees images and writes with a class that stands here under the type of its text, or in the list of
    tests/oracle/vision_zoo.py, is not listed twice.
    """
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [
        kind
        for kind in sorted(classes)
        if kind not in OTHERS
        and not (kind in SEEING and classes[kind] in (SEEING[kind], classes.get(f"{kind}_text")))
    ]


def config_of(kind: str, **overrides: Any) -> Any:
    """A small config of this model type, or of its text where that is what the language model is made of."""
    cls = CONFIG_MAPPING[kind]
    if kind in SEEING and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        cls = _model(kind).config_class
    default = cls()
    names = {
        *inspect.signature(cls.__init__).parameters,
        *vars(default),
        *getattr(cls, "__annotations__", {}),
    }
    names -= set(getattr(cls, "attribute_map", None) or {})
    given = {name: value for name, value in SMALL.items() if name in names}
    for name in list(given):
        if name not in SET and _default(default, name) is None:
            del given[name]
    given |= MORE.get(kind, {}) | overrides
    return cls(**{name: value for name, value in given.items() if value is not ...})


def _model(kind: str) -> Any:
    found = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
    return found[0] if isinstance(found, tuple) else found


def _default(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, 0)
    except Exception:  # one for each layer
        return 0


def build(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> Any:
    """A tiny model of this type. Raises ValueError where nothing small can be made from its config."""
    torch.manual_seed(seed)
    if kind in APART:
        raise ValueError(f"{kind}: {APART[kind]}")
    try:
        config = config_of(kind, **overrides)
        cls = _model(kind)
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
        if count > LARGEST:
            raise ValueError(f"{count} parameters")
        model = cls._from_config(config, experts_implementation="eager")
    except Exception as error:
        raise ValueError(
            f"{kind}: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        ) from error
    _randomise(model, seed)
    model = nn.Module.to(model, dtype).eval().requires_grad_(False)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.cache_implementation = None, 0, None
    return model


def _randomise(model: nn.Module, seed: int) -> None:
    """Weights with which attention is peaked and layers matter."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point() or not p.numel() or any(word in name for word in LEFT):
                continue
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() < 2:
                p.add_(noise * 0.05)
            elif "embed" in name or "wte" in name:
                p.copy_(noise)
            else:
                peak = 2.2 if any(word in name for word in SHARP) else 1.0
                p.copy_(noise * peak / math.sqrt(p.shape[-1]))


def prompt(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def padded(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of different lengths as one batch, padded on the left."""
    length = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, length - row.shape[1] :], mask[at, length - row.shape[1] :] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask}
