"""Tiny transformers of diffusers whose pipelines pack latents into tokens, with references, caches and padding."""

from __future__ import annotations

import diffusers
import torch

from .cases import WORDS, Case, case, halves, ids, noise, times


def _all(name):
    return True


def _after_text(name, lq, lk, calls):
    return (WORDS, WORDS)


def _image(name, size):
    return halves(size)


def _tokens(h, w):
    return h * w // 4


def _joint(model, call, first=_after_text, **more):
    return Case(model, call, _image, _all, first=first, **more)


# ---------------------------------------------------------------- FLUX and its kin: text, image, references


def _flux(kind, references=0, batch=1, padded=False, **config):
    base = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": [4, 6, 6], **config,
    }  # fmt: skip
    model = getattr(diffusers, kind)(**base)
    names = set(__import__("inspect").signature(model.forward).parameters)

    def call(h, w):
        tables = [ids(h // 2, w // 2), *(ids(5, 6, n + 1) for n in range(references))]
        place = torch.cat(tables)
        given = {
            "hidden_states": noise(batch, len(place), 16), "encoder_hidden_states": noise(batch, WORDS, 24),
            "timestep": times(0.9, batch), "img_ids": place, "txt_ids": torch.zeros(WORDS, 3),
        }  # fmt: skip
        if "pooled_projections" in names and "pooled_projection_dim" in config:
            given["pooled_projections"] = noise(batch, 16)
        if "text_encoder_layers" in names:
            given["text_encoder_layers"] = [noise(batch, WORDS, 12)] * 4
        if padded:
            given["attention_mask"] = torch.ones(batch, WORDS + len(place)).bool()
            given["attention_mask"][0, 3:WORDS] = False
        return given

    return _joint(model, call)


@case
def flux():
    return _flux("FluxTransformer2DModel", batch=2, pooled_projection_dim=16)


@case
def kontext():
    return _flux("FluxTransformer2DModel", references=1, pooled_projection_dim=16)


@case
def kontext_two_references():
    return _flux("FluxTransformer2DModel", references=2, pooled_projection_dim=16)


CHROMA = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}


@case
def chroma():
    return _flux("ChromaTransformer2DModel", **CHROMA)


@case
def chroma_padded():
    return _flux("ChromaTransformer2DModel", padded=True, batch=2, **CHROMA)


@case
def bria():
    return _flux("BriaTransformer2DModel")


@case
def fibo():
    return _flux("BriaFiboTransformer2DModel", text_encoder_dim=12)


@case
def fibo_edit():
    return _flux("BriaFiboTransformer2DModel", references=1, text_encoder_dim=12)


@case
def longcat():
    return _flux("LongCatImageTransformer2DModel", pooled_projection_dim=16)


@case
def longcat_edit():
    return _flux("LongCatImageTransformer2DModel", references=1, pooled_projection_dim=16)


@case
def ovis():
    return _flux("OvisImageTransformer2DModel", out_channels=16)


# ---------------------------------------------------------------- FLUX.2, with and without cached references

HELD = 30  # tokens of a reference


def _flux2_model():
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip


def _flux2_call(h, w, tables):
    text = torch.zeros(1, WORDS, 4)
    text[0, :, 3] = torch.arange(WORDS)
    place = torch.cat(tables)[None]
    return {
        "hidden_states": noise(1, place.shape[1], 16), "encoder_hidden_states": noise(1, WORDS, 24),
        "timestep": times(0.9), "img_ids": place, "txt_ids": text, "return_dict": False,
    }  # fmt: skip


@case
def flux2():
    return _joint(_flux2_model(), lambda h, w: _flux2_call(h, w, [ids(h // 2, w // 2, width=4)]))


@case
def flux2_references():
    def call(h, w):
        tables = [ids(h // 2, w // 2, width=4), ids(5, 6, 10, 4), ids(4, 4, 20, 4)]
        return _flux2_call(h, w, tables)

    return _joint(_flux2_model(), call)


def klein():
    """A model whose layers keep the keys of references."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor as Double
    from diffusers.models.transformers.transformer_flux2 import Flux2KVParallelSelfAttnProcessor as Single

    model = _flux2_model()
    for block in model.transformer_blocks:
        block.attn.set_processor(Double())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Single())
    return model


def klein_first_step(h, w):
    """References first. They attend to themselves alone, text and image to everything."""
    given = _flux2_call(h, w, [ids(5, 6, 10, 4), ids(h // 2, w // 2, width=4)])
    return {**given, "kv_cache_mode": "extract", "num_ref_tokens": HELD}


def klein_place(name, lq, lk, calls):
    """Keys: text, references, image. Rows: text, image."""
    return (WORDS + HELD, WORDS) if calls == 0 else None


@case
def klein_extract():
    return _joint(klein(), klein_first_step, klein_place)


@case
def klein_cached():
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    def call(h, w):
        cache = Flux2KVCache(2, 2)
        cache.num_ref_tokens = HELD
        for layer in (*cache.double_block_caches, *cache.single_block_caches):
            layer.store(noise(1, HELD, 2, 16), noise(1, 2, HELD, 16).transpose(1, 2))
        given = _flux2_call(h, w, [ids(h // 2, w // 2, width=4)])
        return {**given, "kv_cache_mode": "cached", "kv_cache": cache}

    return _joint(klein(), call, klein_place)


# ---------------------------------------------------------------- FLUX.3


def _flux3(references):
    """Text, image and references apart in the early layers; then text, image, references."""
    model = diffusers.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip

    def call(h, w):
        text = torch.zeros(WORDS, 4)
        text[:, 3] = torch.arange(WORDS)
        given = {
            "hidden_states": noise(1, _tokens(h, w), 16), "encoder_hidden_states": noise(1, WORDS, 24),
            "timestep": times(0.9), "img_ids": ids(h // 2, w // 2, width=4), "txt_ids": text,
        }  # fmt: skip
        if references:
            given |= {"image_cond_hidden_states": noise(1, 30, 16), "image_cond_ids": ids(5, 6, 1, 4)}
        return given

    def place(name, size):
        return halves(size) if name.startswith(("mode_blocks.image.", "single")) else None

    def first(name, lq, lk, calls):
        return (WORDS, WORDS) if name.startswith("single") else (0, 0)

    return Case(model, call, place, _all, first=first)


@case
def flux3():
    return _flux3(False)


@case
def flux3_references():
    return _flux3(True)


# ---------------------------------------------------------------- Qwen-Image


def _qwen(shapes, grids=1, words=(WORDS,), **config):
    """``shapes(h, w)``: those of one row. Text, padded behind, then the images."""
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6), **config,
    )  # fmt: skip
    batch = len(words)
    mask = (torch.arange(WORDS)[None] < torch.tensor(words)[:, None]).long()

    def call(h, w):
        row = shapes(h // 2, w // 2)
        tokens = sum(a * b * c for a, b, c in row)
        given = {
            "hidden_states": noise(batch, tokens, 16), "encoder_hidden_states": noise(batch, WORDS, 8),
            "timestep": times(0.9, batch), "encoder_hidden_states_mask": mask, "img_shapes": [row] * batch,
        }  # fmt: skip
        if config.get("use_additional_t_cond"):
            given["additional_t_cond"] = torch.zeros(batch).long()
        return given

    return _joint(model, call, grids=grids, dense=grids == 1)


@case
def qwen_padded():
    return _qwen(lambda h, w: [(1, h, w)], words=(3, WORDS))


@case
def qwen_edit():
    return _qwen(lambda h, w: [(1, h, w), (1, 5, 6), (1, 4, 4)])


@case
def qwen_layered():
    """Three layers of one size, then the picture that they are cut from."""
    layered = {"use_layer3d_rope": True, "use_additional_t_cond": True}
    return _qwen(lambda h, w: [(1, h, w)] * 3 + [(1, 5, 6)], grids=3, **layered)


def _qwen21(slots, blocks=(), lengths=None, cached=False):
    """The prompt, text in words and references of 4 tokens for each slot, then the image. ``slots``: True for images.

    Each stretch of the prompt calls attention on its own, without the image; the image comes last.
    """
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    causal = {"causal_condition": True} if cached else {}
    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=8,
        axes_dims_rope=(4, 6, 6), **causal,
    )  # fmt: skip
    prefix = sum(4 if slot else 1 for slot in slots)
    stretches = 2 * len(blocks) + 1 if slots else 0
    batch = len(lengths or (0,))

    def call(h, w):
        image = _tokens(h, w)
        mask = torch.tensor([*slots, *[True] * (image // 4)])[None].repeat(batch, 1)
        shapes = [*((1, *b) for b in blocks), (1, h // 2, w // 2)]
        given = {
            "hidden_states": noise(batch, image + sum(a * b for a, b in blocks), 16), "img_mask": mask,
            "encoder_hidden_states": noise(batch, len(slots), 8), "timestep": times(0.9, batch),
            "img_shapes": [shapes] * batch,
        }  # fmt: skip
        if lengths:
            keep = torch.arange(len(slots))[None] < torch.tensor(lengths)[:, None]
            given["encoder_hidden_states_mask"] = keep.long()
        if cached:
            cache = QwenImage21KVCache(2)
            for number in range(2):
                cache.get_layer(number).store(noise(1, prefix, 2, 16), noise(1, prefix, 2, 16) + 1)
            given |= {"kv_cache": cache, "kv_cache_mode": "cached"}
        return given

    def first(name, lq, lk, calls):
        return (prefix, 0) if cached or calls == stretches else None

    return _joint(model, call, first)


@case
def qwen21():
    return _qwen21([False] * WORDS)


@case
def qwen21_padded():
    return _qwen21([False] * WORDS, lengths=[3, WORDS])


@case
def qwen21_references():
    slots = [False] * 3 + [True] * 4 + [False] * 2 + [True] * 3 + [False]
    return _qwen21(slots, [(4, 4), (2, 6)])


@case
def qwen21_cached():
    return _qwen21([False] * WORDS, cached=True)


# ---------------------------------------------------------------- others


def _nucleus(words):
    """Image first; text has keys and no rows."""
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6), moe_enabled=False, capacity_factors=[8.0, 8.0],
    )  # fmt: skip
    batch = len(words)
    mask = (torch.arange(WORDS)[None] < torch.tensor(words)[:, None]).long()
    return _joint(
        model,
        lambda h, w: {
            "hidden_states": noise(batch, _tokens(h, w), 16), "img_shapes": [(1, h // 2, w // 2)] * batch,
            "encoder_hidden_states": noise(batch, WORDS, 8), "encoder_hidden_states_mask": mask,
            "timestep": times(0.9, batch),
        },
        lambda *at: (0, 0),
    )  # fmt: skip


@case
def nucleus():
    return _nucleus([WORDS])


@case
def nucleus_padded():
    return _nucleus([4, WORDS])


def _krea2(words):
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=8, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    batch = len(words)
    mask = torch.arange(WORDS)[None] < torch.tensor(words)[:, None]
    found = _joint(
        model,
        lambda h, w: {
            "hidden_states": noise(batch, _tokens(h, w), 16), "encoder_hidden_states": noise(batch, WORDS, 2, 8),
            "timestep": times(0.9, batch), "encoder_attention_mask": mask,
            "position_ids": torch.cat([torch.zeros(WORDS, 3), ids(h // 2, w // 2)]),
        },
    )  # fmt: skip
    found.place = lambda name, size: None if name.startswith("text_fusion") else halves(size)
    return found


@case
def krea2():
    return _krea2([WORDS])


@case
def krea2_padded():
    return _krea2([3, WORDS])


@case
def ideogram4():
    """One sequence for text and image, told apart by an indicator; padding stands before a shorter prompt."""
    from diffusers.models.transformers.transformer_ideogram4 import (
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
    )

    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, intermediate_size=32, adaln_dim=16,
        llm_features_dim=12, rope_theta=10000, mrope_section=(2, 1, 1),
    )  # fmt: skip

    def call(h, w):
        image = _tokens(h, w)
        total = WORDS + image
        hidden, text = torch.zeros(2, total, 16), torch.zeros(2, total, 12)
        hidden[:, WORDS:], text[:, :WORDS] = noise(2, image, 16), noise(2, WORDS, 12)
        marks, segments = torch.full((2, total), OUTPUT_IMAGE_INDICATOR), torch.ones(2, total).long()
        marks[:, :WORDS] = LLM_TOKEN_INDICATOR
        marks[0, :3], segments[0, :3] = 0, -1
        words = torch.arange(WORDS)[:, None].expand(WORDS, 3)
        place = torch.cat([words, ids(h // 2, w // 2).long() + 100])[None].repeat(2, 1, 1)
        return {
            "hidden_states": hidden, "timestep": times(0.9, 2), "encoder_hidden_states": text,
            "position_ids": place, "segment_ids": segments, "indicator": marks,
        }  # fmt: skip

    def real(out):
        return out[0][:, WORDS:]

    return _joint(model, call, output=real)
