"""Configs of vision-language classes that are written down whole, since making them small field by field does not do.

``whole(kind)`` is such a config, or None. NEEDS names the package without which a class cannot be built, and
``missing(kind)`` the one of it that is not installed; ``PAGES`` are those that read an image and are prompted through
their decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.utils import is_timm_available

from . import decoder_zoo
from .decoder_zoo import PART, VOCAB

SIDE, PATCH = 16, 8  # pixels of an image, and of a patch
IMAGE, VIDEO, BEGIN, END = VOCAB - 1, VOCAB - 2, VOCAB - 3, VOCAB - 4
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**PART, **IDS, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8}
PLAIN = {name: value for name, value in TEXT.items() if name != "head_dim"}
TOWER = {**PART, "image_size": SIDE, "patch_size": PATCH}
CHUNK, ACTION, CANVAS = 6, 4, 8  # actions and their width of pi0, tokens of DiffusionGemma's canvas


def _timm(architecture: str, **given: Any) -> dict[str, Any]:
    return {"model_type": "timm_wrapper", "architecture": architecture, **given}


def _gemma3n() -> dict[str, Any]:
    conformer = {
        "hidden_size": 32, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 1, "vocab_size": 4,
        "vocab_offset": VOCAB + 4, "sscp_conv_channel_size": [4, 4],
    }  # fmt: skip
    return {
        "text_config": decoder_zoo.config_of("gemma3n_text", vocab_size=VOCAB + 8).to_dict(),
        "image_token_id": VOCAB, "audio_token_id": VOCAB + 4,
        "vision_config": {"architecture": "test_convnext", "hidden_size": 64, "vocab_size": 4, "vocab_offset": VOCAB},
        "audio_config": conformer, "vision_soft_tokens_per_image": 4,  # of 64 x 64 pixels
    }  # fmt: skip


def _llama4() -> dict[str, Any]:
    vision = {
        **TOWER, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    return {
        "text_config": decoder_zoo.config_of("llama4_text").to_dict(), "vision_config": vision,
        "image_token_index": IMAGE,
    }  # fmt: skip


def _pi0() -> dict[str, Any]:
    text = {**TEXT, "model_type": "gemma", "num_key_value_heads": 1}
    vlm = {
        "model_type": "paligemma", "text_config": text, "projection_dim": 32, "image_token_id": IMAGE,
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
    }  # fmt: skip
    return {
        "vlm_config": vlm, "dit_config": text, "chunk_size": CHUNK, "max_state_dim": ACTION,
        "max_action_dim": ACTION, "num_inference_steps": 3,
    }  # fmt: skip


def _diffusion_gemma() -> dict[str, Any]:
    text = {
        **TEXT, "global_head_dim": 16, "sliding_window": 8, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    vision = {
        **PART, "model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 4, "patch_size": PATCH,
        "pooling_kernel_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    return {
        "text_config": text, "vision_config": vision, "canvas_length": CANVAS, "image_token_id": IMAGE,
        "boi_token_id": BEGIN, "eoi_token_id": END,
    }  # fmt: skip


def _pp_formulanet() -> dict[str, Any]:
    text = {
        **IDS, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "decoder_layers": 4,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
    }  # fmt: skip
    vision = {
        **PART, "image_size": 32, "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48,
        "output_channels": 16, "post_conv_in_channels": 16, "post_conv_mid_channels": 16,
        "post_conv_out_channels": 32, "decoder_hidden_size": 32,
    }  # fmt: skip
    return {"text_config": text, "vision_config": vision}


def _pix2struct() -> dict[str, Any]:
    blocks = {"hidden_size": 32, "d_kv": 8, "d_ff": 48}
    text = {**IDS, **blocks, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 1}
    vision = {
        **blocks,
        "patch_embed_hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "seq_len": 16,
    }
    return {"text_config": text, "vision_config": vision}


def _vision_encoder_decoder() -> dict[str, Any]:
    decoder = {
        **IDS, "model_type": "mbart", "d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "max_position_embeddings": 128, "is_decoder": True, "add_cross_attention": True,
    }  # fmt: skip
    return {"encoder": {**TOWER, "model_type": "vit"}, "decoder": decoder}


WHOLE = {
    "diffusion_gemma": _diffusion_gemma,
    "fast_vlm": lambda: {
        "text_config": {**PLAIN, "model_type": "qwen2"}, "image_token_index": IMAGE,
        "vision_config": _timm(
            "fastvit_t8", hidden_size=64, model_args={"layers": [1] * 4, "embed_dims": [8, 8, 16, 32]}
        ),
    },
    "gemma3n": _gemma3n,
    "llama4": _llama4,
    "perception_lm": lambda: {
        "text_config": {**TEXT, "model_type": "llama"}, "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_config": _timm(
            "vit_pe_core_tiny_patch16_384", model_args={"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": [32, 32]}
        ),
    },
    "pi0": _pi0,
    "pix2struct": _pix2struct,
    "pp_formulanet": _pp_formulanet,
    "vision-encoder-decoder": _vision_encoder_decoder,
}  # fmt: skip
NEEDS = dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "timm")
PAGES = ("pix2struct", "pp_formulanet", "vision-encoder-decoder")


def missing(kind: str) -> str | None:
    """The package that ``kind`` needs and that is not there, with what it needs itself."""
    needed = NEEDS.get(kind)
    return None if needed is None or is_timm_available() else needed


def whole(kind: str) -> Any:
    return CONFIG_MAPPING[kind](**WHOLE[kind]()) if kind in WHOLE else None


def page(kind: str, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompts of ``batch`` for a decoder beside an image, which is the same for each row."""
    rows = batch["input_ids"].shape[0]
    more = {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    if kind == "pix2struct":  # row and column of a patch, and its numbers
        places = torch.tensor([[1 + i // 2, 1 + i % 2] for i in range(6)], dtype=torch.float64)
        width = model.config.vision_config.patch_embed_hidden_size
        patches = torch.cat([places[None], drawn(model, 1, 6, width).double()], -1).expand(rows, -1, -1)
        seen = torch.ones(rows, 6, dtype=torch.long)
        return {**more, "flattened_patches": patches.to(model.dtype), "attention_mask": seen}
    side = 32 if kind == "pp_formulanet" else SIDE
    return {**more, "pixel_values": drawn(model, 1, 3, side, side).expand(rows, -1, -1, -1)}


def acting(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of pi0: the prompts, with the image behind them, and where the robot and its actions begin."""
    rows = batch["input_ids"].shape[0]
    seen = torch.full((rows, 4), IMAGE)
    return {
        "input_ids": torch.cat([batch["input_ids"], seen], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(seen)], 1),
        "pixel_values": drawn(model, 1, 1, 3, SIDE, SIDE).expand(rows, -1, -1, -1, -1),
        "pixel_attention_mask": torch.ones(rows, 1, dtype=torch.bool),
        "state": drawn(model, 1, ACTION).expand(rows, -1),
        "noise": drawn(model, 1, CHUNK, ACTION).expand(rows, -1, -1),
    }


def denoising(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of DiffusionGemma: the prompts and a canvas, the same for each row."""
    canvas = decoder_zoo.prompt(CANVAS, 4).expand(batch["input_ids"].shape[0], -1)
    return {**batch, "decoder_input_ids": canvas, "decoder_attention_mask": batch["attention_mask"]}


def drawn(model: Any, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
