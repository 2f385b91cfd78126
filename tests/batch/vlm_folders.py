"""Tiny random vision-language models on disk: LLaVA-like (an image is 5 tokens) and Qwen2-VL-like (it depends)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_models import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}"
    "{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = {
    "vocab_size": 270, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 160,
    "pad_token_id": 259, "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.4,
}  # fmt: skip


def save_llava(folder: Path) -> Path:
    """CLIP and a llama; its processor wants <image> (token 260) in the prompt."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer(chat=False)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16,
        "initializer_range": 0.4,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_id=260,
        vision_feature_select_strategy="full", vision_feature_layer=-1, image_seq_length=5,
    )  # fmt: skip
    torch.manual_seed(0)
    # The projector's own initial weights are so small that all images would look alike.
    model = LlavaForConditionalGeneration(config).eval()
    for weight in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer, patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("MARK", "<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_qwen2_vl(folder: Path) -> Path:
    """Images of any size, positions on three axes. Qwen's own processor reads videos too and for that needs
    torchvision; another family's, which treats images alike, stands in for it."""
    from transformers import PaddleOCRVLProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = byte_tokenizer(chat=False)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = {"image_token": marks[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rotary}, image_token_id=260, video_token_id=261,
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        vision_start_token_id=262, vision_end_token_id=263, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).eval().save_pretrained(folder)
    from transformers import AutoTokenizer

    PaddleOCRVLProcessor(
        Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=64 * 16, patch_size=4, merge_size=2),
        AutoTokenizer.from_pretrained(folder),
        chat_template=TEMPLATE.replace("MARK", f"{marks[2]}{marks[0]}{marks[3]}"),
    ).save_pretrained(folder)
    return folder


def save_picture(file: Path, seed: int, size: tuple[int, int] = (24, 16)) -> Path:
    """Noise of ``size`` (width, height)."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def save_paligemma(folder: Path) -> Path:
    """An image is 4 tokens at the start, which the processor writes when the prompt does not."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    tokenizer = byte_tokenizer(chat=False)
    processor = PaliGemmaProcessor(images, tokenizer)
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8, "projection_dim": 16,
    }  # fmt: skip
    text = {**TEXT, "model_type": "gemma", "vocab_size": len(tokenizer), "head_dim": 8}
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=processor.image_token_id, projection_dim=16
    )
    torch.manual_seed(0)
    PaliGemmaForConditionalGeneration(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
