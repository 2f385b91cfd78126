"""Tiny classes of diffusers whose tokens are sound, embeddings or residues, never an image's; see ``OTHERS``."""

from __future__ import annotations

import diffusers
import torch

from .cases import WORDS, Case, noise, other, times


def _case(model, call, own, **more):
    """Sizes are tokens here: the height says how many."""
    return Case(model, lambda h, w: call(2 * h), lambda name, size: None, own, **more)


def _attn1(name):
    return name.endswith("attn1")


@other
def stable_audio():
    """The first token is what is known of the whole piece."""
    model = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=8, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=8,
    )  # fmt: skip

    def call(tokens):
        from diffusers.models.embeddings import get_1d_rotary_pos_embed as rotary

        return {
            "hidden_states": noise(1, 4, tokens), "timestep": times(0.9), "encoder_hidden_states": noise(1, WORDS, 8),
            "global_hidden_states": noise(1, 1, 8), "attention_mask": torch.ones(1, tokens).bool(),
            "rotary_embedding": rotary(4, tokens + 1, use_real=True, repeat_interleave_real=False),
            "encoder_attention_mask": torch.ones(1, WORDS).bool(),
        }  # fmt: skip

    return _case(model, call, _attn1)


@other
def stable_audio3():
    """Differential attention: each layer calls attention twice over the same keys."""
    model = diffusers.StableAudio3DiTModel(
        io_channels=4, embed_dim=16, depth=2, num_heads=2, cond_token_dim=8, global_cond_dim=8, local_add_cond_dim=5,
        timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=3,
    )  # fmt: skip
    return _case(model, lambda n: _sa3(n), lambda name: name.endswith("self_attn"))


@other
def stable_audio3_without_differences():
    model = diffusers.StableAudio3DiTModel(
        io_channels=4, embed_dim=16, depth=2, num_heads=2, cond_token_dim=8, global_cond_dim=8, local_add_cond_dim=5,
        timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=3, use_differential_attention=False,
    )  # fmt: skip
    return _case(model, lambda n: _sa3(n), lambda name: name.endswith("self_attn"))


def _sa3(tokens):
    return {
        "hidden_states": noise(1, 4, tokens), "timestep": times(0.9), "encoder_hidden_states": noise(1, WORDS, 8),
        "global_hidden_states": noise(1, 8), "local_add_cond": noise(1, 5, tokens),
    }  # fmt: skip


@other
def ace_step():
    """Every other layer sees a band of the tokens alone."""
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=6, encoder_hidden_size=8,
    )  # fmt: skip

    def call(tokens):
        return {
            "hidden_states": noise(1, tokens, 4), "timestep": times(0.9), "timestep_r": times(0.8),
            "encoder_hidden_states": noise(1, WORDS, 8), "context_latents": noise(1, tokens, 8),
        }  # fmt: skip

    return _case(model, call, lambda name: name.endswith("self_attn"))


@other
def longcat_audio():
    model = diffusers.LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=8, latent_dim=4, ff_mult=2.0,
    )  # fmt: skip

    def call(tokens):
        return {
            "hidden_states": noise(1, tokens, 4), "encoder_hidden_states": noise(1, WORDS, 8), "timestep": times(0.9),
            "encoder_attention_mask": torch.ones(1, WORDS).bool(), "latent_cond": noise(1, tokens, 4),
            "attention_mask": torch.ones(1, tokens).bool(),
        }  # fmt: skip

    return _case(model, call, lambda name: name.endswith("self_attn"))


@other
def minimax_music():
    model = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=4, condition_dim=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, ff_inner_dim=16,
        rotary_dim=4, fourier_embedding_dim=8,
    )  # fmt: skip

    def call(tokens):
        return {
            "hidden_states": noise(1, 4, tokens), "timestep": times(0.9), "encoder_hidden_states": noise(1, tokens, 8),
        }  # fmt: skip

    return _case(model, call, lambda name: True)


@other
def minimax_depth_decoder():
    """A causal decoder over the codebooks of one moment."""
    model = diffusers.MiniMaxMusic3RVQDepthDecoder(
        hidden_size=16, num_layers=2, num_attention_heads=2, intermediate_size=32, audio_vocab_size=20, num_codebooks=8,
    )  # fmt: skip
    return _case(model, lambda tokens: {"inputs_embeds": noise(2, 8, 16)}, lambda name: True)


@other
def prior():
    """Text, what is known of the step, and one embedding that is denoised; each sees those before it."""
    model = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=WORDS,
        additional_embeddings=4,
    )  # fmt: skip

    def call(tokens):
        return {
            "hidden_states": noise(1, 8), "timestep": 2, "proj_embedding": noise(1, 8),
            "encoder_hidden_states": noise(1, WORDS, 8), "attention_mask": torch.ones(1, WORDS).bool(),
        }  # fmt: skip

    return _case(model, call, _attn1)


@other
def t5_film():
    """Spectrograms after notes: attention to itself and to what was encoded."""
    model = diffusers.T5FilmDecoder(
        input_dims=6, targets_length=32, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=16, dropout_rate=0.0,
    )  # fmt: skip

    def call(tokens):
        return {
            "encodings_and_masks": [(noise(1, WORDS, 16), torch.ones(1, WORDS))],
            "decoder_input_tokens": noise(1, 32, 6), "decoder_noise_time": times(0.9),
        }  # fmt: skip

    return _case(model, call, lambda name: ".layer.0." in name)
