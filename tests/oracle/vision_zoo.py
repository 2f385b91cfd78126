"""Tiny random vision-language models of the classes that transformers lists for text from images, for prompts of text.

Their configs are made small field by field; what some need on top stands in MORE. A class that cannot be made small that
way is told by ``build``'s ValueError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from . import decoder_zoo
from .decoder_zoo import VOCAB, _randomise
from .vision_whole import PAGES, acting, denoising, missing, page, whole

LARGEST = 20_000_000  # parameters; towers of fixed widths count
LAYERS = 4
BEGUN = 24  # tokens that a decoder beside an encoder is given, so that its cache has something to choose from
TOWERS = ("vision", "vq", "qformer", "perceiver", "audio", "visual", "image", "projector", "sam")
COUNTS = (
    "num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "num_layers", "depth", "encoder_num_layers",
    "num_blocks",
)  # fmt: skip
PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type")
WIDE = (
    "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "out_hidden_size", "output_hidden_size",
    "text_hidden_size", "projection_dim", "projector_hidden_size",
)  # fmt: skip
MOST: dict[str, int] = {
    **dict.fromkeys(WIDE, 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48
    ),
    **dict.fromkeys(
        ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "attention_heads", "num_heads"), 4
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim",
         "linear_value_head_dim", "hidden_size_per_layer_input"), 8,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads", "first_k_dense_replace"), 2
    ),
    "linear_num_value_heads": 4, "latent_query_num": 4, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = ("_token_id", "_token_index", "_start_id", "_end_id", "_newline_id")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PARTIAL = {**ROPE, "partial_rotary_factor": 1.0}
# Fields of the text config.
MORE: dict[str, dict[str, Any]] = {
    **{
        kind: {"rope_parameters": ROPE}
        for kind in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm_ocr", "hunyuan_vl")
    },
    **{kind: {"rope_parameters": PARTIAL} for kind in ("glm46v", "glm4v", "glm4v_moe", "glmga")},
    **{kind: {"num_key_value_heads": 4} for kind in ("kimi_k25", "glm5_next", "hy_v4_vl", "mistral_large4")},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16], "rope_parameters": ROPE},
    "step3p7": {"sliding_window": 8, "num_sliding_attention_heads": 4},
}  # fmt: skip


# Those whose ``generate`` wants an image with every prompt.
SEEING = ("blip", "blip-2", "idefics", "instructblip", "instructblipvideo")


def kinds() -> list[str]:
    return sorted(CLASSES)


TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 4, "patch_size": 8, "pooling_kernel_size": 2, "position_embedding_size": 64,
}  # fmt: skip
INKLING = {"vision_config": {"text_hidden_size": 32, "projection_hidden_dim": 32}}
GEMMA = {"vision_config": TOWER, "audio_config": None}
# Those whose layers differ in shape, or whose fields are derived: made around the text config of
# tests/oracle/decoder_zoo.py, with these other fields.
AROUND: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus1p5": (
        "apertus1p5_text",
        {
            "vision_config": {
                "codebook_size": 8, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1,
            },
            "audio_config": {
                "num_filters": 4, "hidden_size": 32, "codebook_size": 8, "codebook_dim": 32, "decoder_hidden_size": 32,
                "decoder_intermediate_size": 48, "decoder_num_layers": 1, "decoder_attention_num_groups": 4,
            },
            "image_token_offset": VOCAB - 16, "audio_token_offset": VOCAB - 8,
        },
    ),
    "cohere_compass": ("cohere_compass_text", {}),
    "dots3_note": (
        "dots3_note_text",
        {
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 32, "adapter_out_dim": 32,
            },
            "audio_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 32,
            },
        },
    ),
    "gemma4": ("gemma4_text", GEMMA),
    "gemma4_unified": ("gemma4_unified_text", GEMMA),
    "inkling2": ("inkling2_text", INKLING),
    "inkling2_loop": ("inkling2_loop_text", INKLING),
    "inkling_mm_model": (
        "inkling_text",
        {
            "vision_config": {"text_hidden_size": 32, "n_layers": 2},
            "audio_config": {"text_hidden_size": 32, "mel_vocab_size": 8},
        },
    ),
    "qwen4_exp": ("qwen4_exp_text", {}),
}  # fmt: skip
PLAIN = "mistral4"  # listed among those that see, by a class that does not
# Fields without which a config does not make a model.
GIVEN: dict[str, dict[str, Any]] = {
    **{kind: {"image_token_index": VOCAB} for kind in ("blip-2", "instructblip")},
    "instructblipvideo": {"video_token_index": VOCAB},
    "udop": {"num_layers": LAYERS, "num_decoder_layers": LAYERS},
    "chameleon": {
        "vocabulary_map": {"<image>": VOCAB, "IMGIMGBZ": VOCAB + 1},
        "vq_config": {"base_channels": 32, "latent_channels": 32, "embed_dim": 8, "num_embeddings": 8},
    },
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse"] * 16, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        },
    },
    "emu3": {
        "vocabulary_map": {"<image>": VOCAB, "<|extra_200|>": VOCAB + 1, "<|visual token 000000|>": VOCAB + 2},
        "vq_config": {"base_channels": 32, "hidden_size": 32, "codebook_size": 8},
    },
    "florence2": {
        "vision_config": {
            "depths": [1] * 4, "embed_dim": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "num_groups": [1, 1, 2, 2],
        },
    },
    "granite4_vision": {
        "downsample_rate": "1/2", "deepstack_layer_map": [[-1, 1]], "spatial_target_layers": [0, 1, 2, 3],
    },
    "janus": {"vq_config": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 16}},
    **{kind: {"vision_start_token_id": 0} for kind in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
}  # fmt: skip


def config_of(kind: str) -> Any:
    if (given := whole(kind)) is not None:
        return given
    if kind == PLAIN:
        return decoder_zoo.config_of(kind)
    if kind in AROUND:
        text, more = AROUND[kind]
        config = CONFIG_MAPPING[kind](text_config=decoder_zoo.config_of(text).to_dict(), **more)
        for name, part in _nested(config):
            if name != "text_config":
                _shrink(part, tower=True)
    else:
        config = CONFIG_MAPPING[kind](**GIVEN.get(kind, {}))
        _shrink(config, tower=False)
    _number(config)
    for _, part in _nested(config):
        if kind in SEEING and hasattr(part, "encoder_hidden_size"):
            part.encoder_hidden_size = MOST["hidden_size"]
    text = config.get_text_config(decoder=True)
    for name, value in MORE.get(kind, {}).items():
        setattr(text, name, value)
    return config


def _nested(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield name, value


def _shrink(config: Any, tower: bool) -> None:
    for name, part in _nested(config):
        _shrink(part, tower or any(word in name for word in TOWERS))
    layers = 2 if tower else LAYERS
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and name in PATTERNS and len(value) > layers:
            different = list(dict.fromkeys(value))
            setattr(config, name, [different[i % len(different)] for i in range(layers)])
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            most = layers if name in COUNTS else MOST.get(name, value)
            if value > most:
                setattr(config, name, most)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        rope["mrope_section"] = [2, 1, 1]
    if not tower and getattr(config, "head_dim", 0) is None and hasattr(config, "num_attention_heads"):
        config.head_dim = MOST["head_dim"]


def _number(config: Any) -> None:
    """Tokens with a meaning of their own, at the end of the small vocabulary; none of them is in a prompt."""
    numbers: dict[str, int] = {}
    for part in (config, *(part for _, part in _nested(config))):
        for name, value in list(vars(part).items()):
            if name in IDS:
                own: int | None = IDS[name]
            elif name.endswith(TOKENS) and isinstance(value, int):
                own = numbers.setdefault(name, VOCAB + len(numbers))
            else:
                continue
            with contextlib.suppress(Exception):  # a name for a field of another part
                setattr(part, name, own)
    for part in (config, *(part for _, part in _nested(config))):
        if getattr(part, "vocab_size", None) == VOCAB:
            part.vocab_size = VOCAB + 24


def build(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A tiny model of this model type. Raises ValueError where its config cannot be made small this way."""
    torch.manual_seed(seed)
    if package := missing(kind):
        raise ValueError(f"{kind}: {package} is not installed, or what it needs is not")
    try:
        config = config_of(kind)
        cls = getattr(transformers, CLASSES[kind])
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
        if count > LARGEST:
            raise ValueError(f"{count / 1e6:.0f} million parameters")
        model = cls._from_config(config, experts_implementation="eager")
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{kind}: {type(error).__name__}: {text}") from error
    _randomise(model, seed)
    model = nn.Module.to(model, dtype).eval().requires_grad_(False)
    for part in model.modules():
        generation = getattr(part, "generation_config", None)
        if isinstance(generation, GenerationConfig):
            generation.eos_token_id, generation.pad_token_id, generation.cache_implementation = None, 0, None
            if config.is_encoder_decoder and generation.decoder_start_token_id is None:
                generation.decoder_start_token_id = IDS["bos_token_id"]
    return model


def _side(model: Any) -> int:
    size = model.config.vision_config.image_size
    return size if isinstance(size, int) else size[0]


def _pixels(model: Any, *shape: int) -> Tensor:
    side, generator = _side(model), torch.Generator().manual_seed(7)
    pixels = torch.randn(*shape, 3, side, side, generator=generator, dtype=torch.float64)
    return pixels.to(next(model.parameters()).dtype)


def given(kind: str, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt with what its ``generate`` takes beside it: those that cannot do without an image get the same in each
    row, and none of its tokens in the prompt."""
    rows, length = batch["input_ids"].shape
    if kind in PAGES:
        return page(kind, model, batch)
    if kind == "pi0":
        return acting(model, batch)
    if kind == "diffusion_gemma":
        return denoising(batch)
    if model.config.is_encoder_decoder:
        begun = decoder_zoo.prompt(BEGUN, 5).expand(rows, -1)
        batch = {**batch, "decoder_input_ids": begun}
    if kind == "udop":  # where each word stands on the page
        places = torch.linspace(0, 0.9, 4 * length).reshape(1, length, 4).expand(rows, -1, -1)
        return {**batch, "bbox": places}
    if kind not in SEEING:
        return batch
    if kind == "idefics":
        seen = torch.ones(rows, length, 1, dtype=torch.long)
        return {
            **batch,
            "pixel_values": _pixels(model, 1, 1).expand(rows, -1, -1, -1, -1),
            "image_attention_mask": seen,
        }
    frames = (2,) if kind == "instructblipvideo" else ()
    more = {"pixel_values": _pixels(model, 1, *frames).expand(rows, *[-1] * (3 + len(frames)))}
    if kind.startswith("instructblip"):
        more["qformer_input_ids"] = torch.arange(3, 7).expand(rows, -1)
    return {**batch, **more}
