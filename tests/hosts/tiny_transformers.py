"""Tiny transformers of diffusers that are given the latent image whole, and where its tokens stand in their layers."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina

from .cases import WORDS, Case, case, halves, lively, noise, same, times


def _all(name):
    return True


def _attn1(name):
    return name.endswith("attn1")


def _image(size_to_grid, layers=_all):
    return lambda name, size: size_to_grid(size) if layers(name) else None


def _after_text(words=WORDS):
    return lambda name, lq, lk, calls: (words, words)


def _latent(h, w, channels=4, batch=1):
    return noise(batch, channels, h, w)


def _self_only(model, call, grid=halves, **more):
    """attn1 over the image alone, attn2 over the text."""
    return Case(model, call, _image(grid, _attn1), _attn1, **more)


@case
def dit():
    model = diffusers.DiTTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    labels = torch.tensor([1])
    return _self_only(
        model, lambda h, w: {"hidden_states": _latent(h, w), "timestep": torch.tensor([900]), "class_labels": labels},
        other=(24, 24),
    )  # fmt: skip


@case
def pixart():
    model = diffusers.PixArtTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, cross_attention_dim=32, caption_channels=24, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip
    mask = torch.ones(2, WORDS)
    mask[0, 3:] = 0
    return _self_only(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w, batch=2), "timestep": times(900.0, 2), "encoder_attention_mask": mask,
            "encoder_hidden_states": noise(2, WORDS, 24),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )  # fmt: skip


@case
def hunyuan_dit():
    model = diffusers.HunyuanDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16, text_len=4,
        text_len_t5=4,
    )  # fmt: skip

    def call(h, w):
        grid = (h // 2, w // 2)
        rotary = get_2d_rotary_pos_embed(8, ((0, 0), grid), grid, output_type="pt")
        return {
            "hidden_states": _latent(h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, 4, 8),
            "text_embedding_mask": torch.ones(1, 4), "encoder_hidden_states_t5": noise(1, 4, 8),
            "text_embedding_mask_t5": torch.ones(1, 4), "style": torch.zeros(1).long(), "image_rotary_emb": rotary,
            "image_meta_size": torch.tensor([[128.0, 128, 128, 128, 0, 0]]), "return_dict": False,
        }  # fmt: skip

    return _self_only(model, call)


@case
def lumina_next():
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3,
        num_kv_heads=1, multiple_of=16, norm_eps=1e-5, learn_sigma=False, qk_norm=True, cross_attention_dim=32,
    )  # fmt: skip
    rotary = get_2d_rotary_pos_embed_lumina(8, 64, 64)
    return _self_only(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w), "timestep": times(0.9), "encoder_hidden_states": noise(1, WORDS, 32),
            "encoder_mask": torch.ones(1, WORDS).bool(), "image_rotary_emb": rotary, "cross_attention_kwargs": {},
        },
    )  # fmt: skip


@case
def sd3():
    """Image first; the first block has another attention over the image alone."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=48, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return Case(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w), "timestep": times(900.0), "encoder_hidden_states": noise(1, WORDS, 24),
            "pooled_projections": noise(1, 16),
        },
        _image(halves), _all,
    )  # fmt: skip


@case
def aura():
    """Eight register tokens, the text, the image."""
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=8, pos_embed_max_size=256,
    )  # fmt: skip
    return Case(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w), "timestep": times(0.9), "encoder_hidden_states": noise(1, WORDS, 8),
        },
        _image(halves), _all, first=_after_text(8 + WORDS),
    )  # fmt: skip


def _cogview(kind, **more):
    model = kind(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, out_channels=4, text_embed_dim=8,
        time_embed_dim=8, sample_size=16, **more,
    )  # fmt: skip
    size = torch.tensor([[128.0, 128.0]])
    return Case(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w), "encoder_hidden_states": noise(1, WORDS, 8), "timestep": times(900.0),
            "original_size": size, "target_size": size, "crop_coords": size * 0,
        },
        _image(halves), _all, first=_after_text(),
    )  # fmt: skip


@case
def cogview3():
    return _cogview(
        diffusers.CogView3PlusTransformer2DModel,
        num_attention_heads=2,
        condition_dim=2,
        pos_embed_max_size=32,
    )


@case
def cogview4():
    return _cogview(diffusers.CogView4Transformer2DModel, num_attention_heads=4, condition_dim=4)


def _glm(before=0):
    """``before``: keys of a reference image that an earlier call has cached; they come first and have no rows."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    model = diffusers.GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=64,
    )  # fmt: skip

    def call(h, w):
        cache = GlmImageKVCache(2)
        for layer in cache.caches:
            layer.store(noise(1, before, 2, 8), noise(1, 2, before, 8).transpose(1, 2)) if before else None
        cache.set_mode("read")
        return {
            "hidden_states": _latent(h, w), "encoder_hidden_states": noise(1, WORDS, 32), "timestep": times(900.0),
            "prior_token_id": torch.zeros(1, h * w // 4).long(), "crop_coords": torch.zeros(1, 2),
            "prior_token_drop": torch.zeros(1, h * w // 4).bool(), "target_size": torch.tensor([[128.0, 128.0]]),
            "kv_caches": cache if before else None,
        }  # fmt: skip

    return Case(model, call, _image(halves), _all, first=lambda *at: (before + WORDS, WORDS))


@case
def glm_image():
    return _glm()


@case
def glm_image_with_cached_reference():
    return _glm(12)


def _hunyuan(words, batch=1, second=None):
    """Image first, then the text, padded behind; a second text encoder's words count as well."""
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=(1, 1), text_embed_dim=12,
        rope_axes_dim=(8, 8), text_embed_2_dim=10 if second else None,
    )  # fmt: skip
    mask = torch.ones(batch, WORDS)
    mask[0, words:] = 0

    def call(h, w):
        more = {
            "encoder_hidden_states_2": noise(batch, 5, 10),
            "encoder_attention_mask_2": torch.ones(batch, 5),
        }
        return {
            "hidden_states": _latent(h, w, batch=batch), "timestep": times(900.0, batch),
            "encoder_hidden_states": noise(batch, WORDS, 12), "encoder_attention_mask": mask,
            **(more if second else {}),
        }  # fmt: skip

    layers = lambda name: "context_embedder" not in name  # noqa: E731
    return Case(model, call, _image(same, layers), _all, trained=(8, 8), other=(12, 8))


@case
def hunyuan_image():
    return _hunyuan(WORDS)


@case
def hunyuan_image_padded():
    return _hunyuan(3, batch=2, second=True)


@case
def hidream():
    """Image first; sizes that are not square are padded to 256 tokens, whose keys are zero and take part."""
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=2,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1, 0),
        force_inference_output=True,
    )  # fmt: skip
    return Case(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w), "timesteps": times(900.0), "pooled_embeds": noise(1, 8),
            "encoder_hidden_states_t5": noise(1, WORDS, 8), "encoder_hidden_states_llama3": noise(2, 1, WORDS, 4),
        },
        _image(halves), _all,
    )  # fmt: skip


def _ernie(lengths):
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=8, out_channels=8,
        patch_size=1, text_in_dim=16, rope_axes_dim=(8, 4, 4),
    )  # fmt: skip
    batch = len(lengths)
    return Case(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w, 8, batch), "timestep": times(900.0, batch),
            "text_bth": noise(batch, WORDS, 16), "text_lens": torch.tensor(lengths),
        },
        _image(same), _all, trained=(8, 8), other=(12, 8),
    )  # fmt: skip


@case
def ernie_image():
    return _ernie([WORDS])


@case
def ernie_image_padded():
    return _ernie([3, WORDS])


@case
def omnigen():
    """The prompt, padded in front, a token for the time, the image; text sees what comes before it."""
    model = diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=2,
        pad_token_id=0, vocab_size=100, in_channels=4, time_step_dim=4,
        rope_scaling={"long_factor": [1, 1], "short_factor": [1, 1]},
    )  # fmt: skip

    def call(h, w):
        image = h * w // 4
        total = WORDS + 1 + image
        seen = torch.ones(total, total).tril()
        seen[WORDS + 1 :] = 1
        mask = seen.repeat(2, 1, 1)
        mask[0, :, :3] = 0
        mask[0, :3, 0] = 1
        return {
            "hidden_states": _latent(h, w, batch=2), "timestep": times(0.9, 2), "attention_mask": mask,
            "input_ids": torch.arange(WORDS)[None].repeat(2, 1) + 1, "input_img_latents": [],
            "input_image_sizes": {}, "position_ids": torch.arange(total)[None].repeat(2, 1),
        }  # fmt: skip

    return Case(model, call, _image(halves), _all, first=_after_text(WORDS + 1))


def _prx(words, batch=1):
    """Text keys, image keys; the image alone has rows."""
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip
    mask = torch.ones(batch, WORDS).bool()
    mask[0, words:] = False
    return Case(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w, batch=batch), "timestep": times(0.9, batch), "attention_mask": mask,
            "encoder_hidden_states": noise(batch, WORDS, 12),
        },
        _image(halves), _all, first=lambda *at: (WORDS, 0),
    )  # fmt: skip


@case
def prx():
    return _prx(WORDS)


@case
def prx_padded():
    return _prx(4, batch=2)


def _lumina2(lengths):
    """Each row is its own words, the image, and padding that is hidden."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=8, in_channels=4,
    )  # fmt: skip
    batch = len(lengths)
    mask = torch.arange(WORDS)[None] < torch.tensor(lengths)[:, None]

    def first(name, lq, lk, calls):
        return (lengths, lengths) if name.startswith("layers") else (0, 0)

    return Case(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w, batch=batch), "timestep": times(0.9, batch),
            "encoder_hidden_states": noise(batch, WORDS, 8), "encoder_attention_mask": mask,
        },
        _image(halves, lambda name: not name.startswith("context")), _all, first=first,
    )  # fmt: skip


@case
def lumina2():
    return _lumina2([WORDS])


@case
def lumina2_two_lengths():
    return _lumina2([3, WORDS])


@case
def lumina2_short_prompt_in_a_long_mask():
    return _lumina2([4])


def _z_image(lengths):
    """Image and text padded to multiples of 32 each, all of which take part; shorter rows end in hidden padding."""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    batch = len(lengths)
    return Case(
        model,
        lambda h, w: {
            "x": [noise(4, 1, h, w) + n for n in range(batch)], "t": times(0.9, batch),
            "cap_feats": [noise(n, 16) for n in lengths],
        },
        _image(halves, lambda name: not name.startswith("context")), _all,
        output=lambda out: torch.stack(list(out[0])), other=(20, 12),
    )  # fmt: skip


@case
def z_image():
    return _z_image([WORDS])


@case
def z_image_two_lengths():
    return _z_image([WORDS, 40])


@case
def fibo2():
    return _fibo2([WORDS, WORDS])


@case
def fibo2_padded_gist():
    return _fibo2([4, 60])


@case
def fibo2_context_image():
    return _fibo2([WORDS], 1)


def _fibo2(lengths, context=0):
    """Gist tokens, image, context images; the gist comes last where one prompt of a batch has fewer."""
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=8, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=12,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4,
        gist_min_text_len=4, gist_max_text_len=64, axes_dims=(4, 6, 6), axes_lens=(64, 64, 64),
    )  # fmt: skip
    batch, longest = len(lengths), max(lengths)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    gist = 0 if len(set(lengths)) > 1 else 8  # 7 words: 4 + 3/60 of 4, rounded up to a multiple of 4

    def first(name, lq, lk, calls):
        return (gist, gist) if name.startswith("layers") else (0, 0)

    def layers(name):
        return name.startswith(("noise_refiner", "layers")) and name.endswith(".attention")

    return Case(
        model,
        lambda h, w: {
            "hidden_states": _latent(h, w, 8, batch), "timestep": times(0.9, batch), "encoder_attention_mask": mask,
            "encoder_hidden_states": noise(batch, 2, longest, 12),
            "context_latents": [noise(batch, 8, 8, 12)] * context or None,
        },
        _image(halves, layers), lambda name: layers(name) or name.endswith("self_attention"), first=first,
    )  # fmt: skip


__all__ = ["lively"]
