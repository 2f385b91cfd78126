"""The parts of demo:shapes-dit: PixArt's transformer and a T5 encoder, over the autoencoder of demo:shapes.

Under the names that ``pipeline_models`` has for its own.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel
from pipeline_models import LONGEST, Sizes, build_scheduler
from scenes import SIDE, vocabulary
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

NAME = "demo:shapes-dit"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SPACE = "▁"  # what T5's tokenizers put before a word


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that makes one token of every word of the captions; others are spelled by letters.

    Of all ways to cut a word its model takes the one whose pieces cost least: a whole word costs 1, a letter 10.
    """
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = dict.fromkeys([*(SPACE + word for word in vocabulary()), SPACE, *letters])
    costs = [(piece, -1.0 if len(piece) > 2 or piece == f"{SPACE}a" else -10.0) for piece in pieces]
    return T5Tokenizer(
        vocab=[(PAD, 0.0), (END, 0.0), (UNKNOWN, -100.0), *costs],
        extra_ids=0,
        model_max_length=LONGEST,
    )


def build_denoiser(sizes: Sizes) -> PixArtTransformer2DModel:
    """Tokens are single latents: 16 x 16 of them in a picture of 64 x 64, and four times as many at 128 x 128.

    Its places are sines of coordinates that are stretched to the trained range in pictures of other sizes.
    """
    return PixArtTransformer2DModel(
        sample_size=SIDE // 4,
        patch_size=1,
        in_channels=4,
        out_channels=4,  # PixArt's own double them for a variance that nothing reads
        num_layers=sizes.blocks,
        num_attention_heads=sizes.width // 16,
        attention_head_dim=16,
        cross_attention_dim=sizes.width,
        caption_channels=sizes.text,
        use_additional_conditions=False,
    )


def build_text_encoder(sizes: Sizes, tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=sizes.text,
            d_kv=sizes.text // 4,
            num_heads=4,
            d_ff=4 * sizes.text,
            num_layers=sizes.text_layers,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


class Painter(nn.Module):
    """Denoiser and text encoder, which are trained together; padding is hidden from both, as the pipeline hides it."""

    def __init__(self, transformer: PixArtTransformer2DModel, text: T5EncoderModel):
        super().__init__()
        self.transformer, self.text = transformer, text

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """(B, 4, h, w), (B,), (B, LONGEST) -> velocity (B, 4, h, w)."""
        words = (ids != self.text.config.pad_token_id).long()
        said = self.text(input_ids=ids, attention_mask=words).last_hidden_state
        made: Tensor = self.transformer(
            noisy, encoder_hidden_states=said, encoder_attention_mask=words, timestep=steps, return_dict=False
        )[0]
        return made


def assemble(
    vae: AutoencoderKL, painter: Painter, tokenizer: T5Tokenizer, dtype: torch.dtype = torch.float32
) -> PixArtSigmaPipeline:
    """The pipeline of the trained parts."""
    parts: dict[str, nn.Module] = {
        "vae": vae,
        "transformer": painter.transformer,
        "text_encoder": painter.text,
    }
    pipeline = PixArtSigmaPipeline(
        **{name: part.to("cpu", dtype).eval() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
