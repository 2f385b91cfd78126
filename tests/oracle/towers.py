"""What differs between vision-language families: configs, pixels, token types, the projector's last matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_ID, VIDEO_ID, START_ID, END_ID = 64, 65, 62, 63
VOCAB, HIDDEN = 67, 96
FAMILIES = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3",
    "smolvlm", "paligemma", "paligemma2", "gemma3",
)  # fmt: skip
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ANYRES = ("llava_next", "llava_onevision")
TILED = ("idefics3", "smolvlm")
SIDE, PATCH = 12, 4  # pixels: 9 patches
# Height and width of the images of a batch, in turn; families with one size only take squares.
ANYRES_SIZES = ((12, 24), (12, 12), (10, 12))
GRIDS = ((1, 4, 6), (1, 6, 4), (1, 4, 4))  # patches, merged 2 x 2

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _text(kind: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HIDDEN // 4}
    fields: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **heads,
    }
    if kind in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"):
        fields["rope_parameters"] = {**ROPE, "mrope_section": [4, 4, 4]}
        if kind == "qwen3_vl_text":
            fields["rope_parameters"]["mrope_interleaved"] = True
    if kind == "gemma":
        fields["num_key_value_heads"] = 1
    if kind == "gemma2":
        fields.update(query_pre_attn_scalar=24, sliding_window=64, attn_logit_softcapping=6.0)
    if kind == "gemma3_text":
        # A window that does not reach back over the whole prompt, in three layers of four.
        types = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)]
        fields.update(query_pre_attn_scalar=24, sliding_window=16, layer_types=types)
    return {**fields, **overrides}


def _clip(kind: str) -> dict[str, Any]:
    fields = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return {**fields, "vision_use_head": False} if kind == "siglip_vision_model" else fields


def _qwen_vision(family: str) -> dict[str, Any]:
    shared = {
        "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    if family == "qwen2_vl":
        return {**shared, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    width = {"hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 48}
    if family == "qwen2_5_vl":
        return {**shared, **width, "window_size": 2 * 2 * PATCH, "fullatt_block_indexes": [1]}
    return {**shared, **width, "num_position_embeddings": 36, "deepstack_visual_indexes": [0]}


def make(family: str, layers: int, text: dict[str, Any]) -> Any:
    """The model, stock and untouched, on sdpa (paligemma2: eager, for its soft cap)."""
    import transformers as t

    ids = {"image_token_id": IMAGE_ID, "tie_word_embeddings": False}
    if family == "llava":
        config: Any = t.LlavaConfig(
            vision_config=_clip("clip_vision_model"), text_config=_text("llama", layers, text),
            image_token_index=IMAGE_ID, image_seq_length=9, tie_word_embeddings=False,
        )  # fmt: skip
    elif family in ANYRES:
        kind, tower, decoder = (
            (t.LlavaNextConfig, "clip_vision_model", "mistral")
            if family == "llava_next"
            else (t.LlavaOnevisionConfig, "siglip_vision_model", "qwen2")
        )
        more = {"sliding_window": None, **text} if decoder == "mistral" else text
        config = kind(
            vision_config=_clip(tower), text_config=_text(decoder, layers, more),
            image_token_index=IMAGE_ID, image_grid_pinpoints=[[12, 12], [12, 24], [24, 12]],
            tie_word_embeddings=False,
        )  # fmt: skip
        if decoder == "qwen2":
            config.video_token_index = VIDEO_ID
    elif family in QWEN:
        kind = {"qwen2_vl": t.Qwen2VLConfig, "qwen2_5_vl": t.Qwen2_5_VLConfig, "qwen3_vl": t.Qwen3VLConfig}
        config = kind[family](
            vision_config=_qwen_vision(family), text_config=_text(f"{family}_text", layers, text),
            video_token_id=VIDEO_ID, vision_start_token_id=START_ID, vision_end_token_id=END_ID, **ids,
        )  # fmt: skip
    elif family == "internvl":
        tower = {**_clip("internvl_vision"), "image_size": [24, 24], "patch_size": [PATCH, PATCH]}
        config = t.InternVLConfig(
            vision_config=tower, text_config=_text("qwen2", layers, text), image_seq_length=9, **ids
        )
    elif family in TILED:
        tower = {**_clip(f"{family}_vision"), "image_size": 24}
        kind = t.Idefics3Config if family == "idefics3" else t.SmolVLMConfig
        config = kind(vision_config=tower, text_config=_text("llama", layers, text), scale_factor=2, **ids)
    elif family in ("paligemma", "paligemma2"):
        decoder = "gemma2" if family == "paligemma2" else "gemma"
        config = t.PaliGemmaConfig(
            vision_config=_clip("siglip_vision_model"), text_config=_text(decoder, layers, text),
            image_token_index=IMAGE_ID, projection_dim=HIDDEN, hidden_size=HIDDEN, vocab_size=VOCAB,
        )  # fmt: skip
    else:
        config = t.Gemma3Config(
            vision_config={**_clip("siglip_vision_model"), "image_size": 24},
            text_config=_text("gemma3_text", layers, text), mm_tokens_per_image=9, image_token_id=IMAGE_ID,
        )  # fmt: skip
    model = t.AutoModelForImageTextToText.from_config(config)
    model.set_attn_implementation("eager" if family == "paligemma2" else "sdpa")
    return model


def vision(model: nn.Module) -> list[nn.Module]:
    """The modules that turn pixels into features."""
    inner = model.model
    names = ("vision_tower", "visual", "vision_model", "multi_modal_projector", "connector")
    return [getattr(inner, name) for name in names if hasattr(inner, name)]


# ---------------------------------------------------------------- pixels


def images(
    model: nn.Module, family: str, counts: Sequence[int], generator: torch.Generator, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[int]]:
    """Random images, ``counts`` of them per row: what the model is given, and the tokens of each image."""
    total = sum(counts)
    if total == 0:
        return {}, []

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if family in QWEN:
        grid = torch.tensor([GRIDS[i % len(GRIDS)] for i in range(total)])
        pixels = normal(int(grid.prod(dim=1).sum()), 3 * 2 * PATCH * PATCH)
        return {"pixel_values": pixels, "image_grid_thw": grid}, (grid.prod(dim=1) // 4).tolist()
    if family in ANYRES:
        sizes = [ANYRES_SIZES[i % len(ANYRES_SIZES)] for i in range(total)]
        tiles = [1 + w // SIDE for _, w in sizes]
        pixels = torch.zeros(total, max(tiles), 3, SIDE, SIDE, dtype=dtype)
        for i, count in enumerate(tiles):
            pixels[i, :count] = normal(count, 3, SIDE, SIDE)
        given = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        return given, _lengths(model, given)
    side = 2 * SIDE if family in ("internvl", "gemma3", *TILED) else SIDE
    pixels = normal(total, 3, side, side)
    if family in TILED:
        padded = torch.zeros(len(counts), max(counts), 3, side, side, dtype=dtype)
        parts = pixels.split(list(counts))
        for i, part in enumerate(parts):
            padded[i, : len(part)] = part
        pixels = padded
    return {"pixel_values": pixels}, [9] * total


def _lengths(model: nn.Module, given: dict[str, Tensor]) -> list[int]:
    """Tokens per image where rows and newlines decide: as the model itself packs them."""
    with torch.no_grad():
        packed = model.model.get_image_features(**given, return_dict=True).pooler_output
    return [len(one) for one in packed]


def images_of(family: str, extra: dict[str, Tensor], chosen: Sequence[int], row: int) -> dict[str, Tensor]:
    """What one row is given: the images numbered ``chosen`` of the whole batch."""
    if not chosen:
        return {}
    pixels = extra["pixel_values"]
    if family in TILED:
        return {"pixel_values": pixels[row : row + 1, : len(chosen)]}
    if family in QWEN:
        grid = extra["image_grid_thw"]
        parts = pixels.split(grid.prod(dim=1).tolist())
        return {"pixel_values": torch.cat([parts[k] for k in chosen]), "image_grid_thw": grid[list(chosen)]}
    found = {"pixel_values": pixels[list(chosen)]}
    if family in ANYRES:
        found["image_sizes"] = extra["image_sizes"][list(chosen)]
    return found


def types(family: str, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Token types of the prompt, for the families that take them."""
    if family in QWEN and image.any():
        return {"mm_token_type_ids": (image > 0).long()}
    if family == "gemma3":
        return {"token_type_ids": (image > 0).long()}
    if family.startswith("paligemma"):
        return {"token_type_ids": torch.zeros_like(mask)}  # all of the prompt is the two-way prefix
    return {}


# ---------------------------------------------------------------- the projector's last matrix


def features(model: nn.Module, extra: dict[str, Tensor]) -> Tensor:
    """The image features in the order of their placeholders, (n, hidden)."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    given = {name: extra[name] for name in names if name in extra}
    found = model.model.get_image_features(**given, return_dict=True).pooler_output
    return torch.cat(list(found)) if isinstance(found, list | tuple) else found.flatten(0, -2)


def last_matrix(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The last matrix on the way from pixels to features, as a view (in, hidden), and its bias."""
    inner = model.model
    if hasattr(inner, "visual"):
        merger = inner.visual.merger
        linear = merger.linear_fc2 if hasattr(merger, "linear_fc2") else merger.mlp[2]
    elif hasattr(inner, "connector"):
        linear = inner.connector.modality_projection.proj
    else:
        projector = inner.multi_modal_projector
        if hasattr(projector, "mm_input_projection_weight"):
            return projector.mm_input_projection_weight, None
        linear = projector.linear_2 if hasattr(projector, "linear_2") else projector.linear
    return linear.weight.t(), linear.bias


def side_outputs(model: nn.Module) -> list[Tensor]:
    """Other tensors that write into the residual stream at image tokens, hidden size first."""
    found = [model.model.image_newline] if hasattr(model.model, "image_newline") else []
    for merger in getattr(getattr(model.model, "visual", None), "deepstack_merger_list", []):
        found += [merger.linear_fc2.weight, merger.linear_fc2.bias]
    return found


def inputs_of_last_matrix(model: nn.Module, extra: dict[str, Tensor]) -> Tensor:
    """What meets the last matrix at every placeholder, (n, in); zero where a placeholder is no feature.

    Found by putting the identity in its place, as many rows at a time as there are outputs.
    """
    matrix, bias = last_matrix(model)
    newline = getattr(model.model, "image_newline", None)
    held = [t for t in (matrix, bias, newline) if t is not None]
    before = [t.clone() for t in held]
    parts = []
    for start in range(0, matrix.shape[0], matrix.shape[1]):
        stop = min(start + matrix.shape[1], matrix.shape[0])
        for tensor in held:
            tensor.zero_()
        matrix[start:stop, : stop - start] = torch.eye(stop - start, dtype=matrix.dtype)
        parts.append(features(model, extra)[:, : stop - start])
    for tensor, old in zip(held, before, strict=True):
        tensor.copy_(old)
    return torch.cat(parts, dim=1)
