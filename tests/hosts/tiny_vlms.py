"""Tiny random vision-language models, one for each family, and prompts with images for them.

``build(family)`` gives a float64 model; ``prompt(family, model, rows)`` the arguments of a call whose rows
have images and text, padded on the left, with the mask of their image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, IMAGE, VIDEO, START = 96, 90, 91, 92
FAMILIES = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3",
    "smolvlm", "paligemma", "gemma3",
)  # fmt: skip
_CLASSES = {
    "llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision", "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "internvl": "InternVL", "idefics3": "Idefics3",
    "smolvlm": "SmolVLM", "paligemma": "PaliGemma", "gemma3": "Gemma3",
}  # fmt: skip
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip
_CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _config(family: str, layers: int, text: dict[str, Any]) -> Any:
    text = {**_TEXT, "num_hidden_layers": layers, **text}
    own: dict[str, Any] = {"image_token_id": IMAGE}
    if family.startswith("llava"):
        vision: dict[str, Any] = {"model_type": "clip_vision_model", **_CLIP}
        own = {"image_token_index": IMAGE, "vision_feature_layer": -1}
        text["model_type"] = "qwen2" if family == "llava_onevision" else "llama"
        if family == "llava_next":
            own["image_grid_pinpoints"] = [[16, 32], [32, 16], [32, 32]]
        if family == "llava_onevision":
            vision["model_type"] = "siglip_vision_model"
            own |= {"video_token_index": VIDEO, "image_grid_pinpoints": [[16, 32], [32, 32]]}
            own["vision_feature_select_strategy"] = "full"
    elif family in ("qwen2_vl", "qwen2_5_vl"):
        own |= {"video_token_id": VIDEO, "vision_start_token_id": START}
        text |= {"rope_parameters": _ROPE}
        vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "in_channels": 3, "temporal_patch_size": 2}
        if family == "qwen2_vl":
            vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
                       "fullatt_block_indexes": [1]}  # fmt: skip
    elif family == "qwen3_vl":
        own |= {"video_token_id": VIDEO, "vision_start_token_id": START}
        text |= {"rope_parameters": _ROPE}
        vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "out_hidden_size": 32,
                  "intermediate_size": 24, "num_position_embeddings": 16,
                  "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    elif family == "internvl":
        text["model_type"] = "qwen2"
        vision = {**_CLIP, "image_size": [16, 16], "patch_size": [4, 4]}
    elif family in ("idefics3", "smolvlm"):
        text["model_type"] = "llama"
        own["scale_factor"] = 2
        vision = {**_CLIP, "patch_size": 4}
    else:
        vision = {"model_type": "siglip_vision_model", **_CLIP, "patch_size": 8}
        if family == "paligemma":
            own = {"image_token_index": IMAGE, "projection_dim": 32}
            vision["vision_use_head"] = False
            text |= {"model_type": "gemma2", "num_key_value_heads": 1, "query_pre_attn_scalar": 8,
                     "sliding_window": 64, "attn_logit_softcapping": 4.0}  # fmt: skip
        else:
            own = {"image_token_index": IMAGE, "mm_tokens_per_image": 4}
            text |= {"query_pre_attn_scalar": 8, "sliding_window": 8,
                     "layer_types": ["sliding_attention", "full_attention"] * layers}  # fmt: skip
            text["layer_types"] = text["layer_types"][:layers]
    if "model_type" not in vision and family.startswith("llava"):
        vision["model_type"] = "clip_vision_model"
    made = getattr(transformers, f"{_CLASSES[family]}Config")
    return made(text_config=text, vision_config=vision, tie_word_embeddings=False, **own)


def build(
    family: str, *, layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64, **text: Any
) -> Any:
    config = _config(family, layers, text)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{_CLASSES[family]}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.2 if "q_proj" in name or "k_proj" in name else 1.0
            if p.dim() >= 2:
                fan = 1.0 if "embed" in name and "patch" not in name else p[0].numel() ** 0.5
                p.copy_(torch.randn(p.shape, generator=generator) * scale * 1.4 / fan)
            else:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def tokens_per_image(family: str) -> int:
    """LLaVA-NeXT and OneVision: the whole image, and 2 x 4 tokens with a line end each for the two tiles."""
    return 14 if family in ("llava_next", "llava_onevision") else 4


def images(family: str, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What the processor of ``family`` makes of ``count`` images of its size, in the order of the prompt."""
    generator = torch.Generator().manual_seed(70 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if family in ("llava_next", "llava_onevision"):
        return {"pixel_values": draw(count, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]] * count)}
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]] * count)
        return {"pixel_values": draw(count * 16, 3 * 2 * 16), "image_grid_thw": grid}
    if family in ("idefics3", "smolvlm"):
        return {"pixel_values": draw(1, count, 3, 16, 16)}
    return {"pixel_values": draw(count, 3, 16, 16)}


def prompt(
    family: str, rows: Sequence[str], seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Arguments of a call. Each row is spelled: "." a text token, "#" an image, "+" half of one and "-" the
    other half (families whose images are spans with text in between); rows are padded on the left.
    """
    generator = torch.Generator().manual_seed(500 + seed)
    size = tokens_per_image(family)
    spelled = []
    for row in rows:
        ids: list[int] = []
        for letter in row:
            if letter == ".":
                ids += torch.randint(3, 80, (1,), generator=generator).tolist()
            else:
                start = [START] if family.startswith("qwen") and letter == "#" else []
                ids += start + [IMAGE] * (size if letter == "#" else size // 2)
        spelled.append(ids)
    width = max(map(len, spelled))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in spelled])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in spelled])
    count = sum(row.count("#") + row.count("+") for row in rows)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if count:
        given |= images(family, count, seed, dtype)
        kinds = (ids == IMAGE).int()
        if family.startswith("qwen"):
            given["mm_token_type_ids"] = kinds
        if family in ("gemma3", "paligemma"):
            given["token_type_ids"] = kinds
    return given
