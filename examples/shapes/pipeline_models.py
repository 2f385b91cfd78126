"""The parts of demo:shapes: sizes of its networks, a tokenizer of whole words, and the pipeline put together."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from scenes import SIDE, vocabulary
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NAME = "demo:shapes"
LONGEST = 24  # tokens of a prompt, its ends included; the longest caption has 17
SHIFT = 16
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. ``tiny`` is for tests: it learns nothing, quickly."""

    vae: tuple[int, ...] = (16, 32, 64)  # three levels: a latent pixel is 4 pixels wide
    unet: tuple[int, ...] = (48, 64, 96)  # levels at 16, 8 and 4 squared, all with self- and cross-attention
    heads: tuple[int, ...] = (3, 4, 6)  # of width 16
    layers: int = 1
    width: int = 128  # of the transformer, in heads of 16
    blocks: int = 6
    text: int = 128
    text_layers: int = 2


FULL = Sizes()
TINY = Sizes(vae=(8, 8, 8), unet=(8, 16), heads=(2, 2), width=16, blocks=1, text=16, text_layers=1)


def build_vae(sizes: Sizes) -> AutoencoderKL:
    """Pixels to 4 channels at a quarter of the size. No attention: it must read any size as it was trained."""
    levels = len(sizes.vae)
    return AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
        scaling_factor=1.0,  # `normalise` writes the measured one into the weights
    )


@torch.no_grad()
def normalise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Give latents of these means and deviations, (4,) each, mean 0 and deviation 1; pixels stay the same.

    Both lie between convolutions of single pixels, so this is exact, at the border of the picture too.
    """
    out, back = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    back.bias += (back.weight[:, :, 0, 0] @ mean).view_as(back.bias)
    back.weight *= std.view(1, -1, 1, 1)
    out.weight[:channels] /= std.view(-1, 1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()  # the other half holds logarithms of variances


def build_denoiser(sizes: Sizes) -> UNet2DConditionModel:
    levels = len(sizes.unet)
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=sizes.unet,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=sizes.layers,
        cross_attention_dim=sizes.text,
        attention_head_dim=sizes.heads,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def build_text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text,
            intermediate_size=4 * sizes.text,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that makes one token of every word of the captions.

    CLIP's tokenizer joins letters by a list of merges. The list here is learnt from the vocabulary until every
    word is one token; in that order the merges of one word do not get in the way of another's. Letters are
    tokens too, so a foreign word becomes letters, which the model has never seen.
    """
    parts = {word: [*word[:-1], f"{word[-1]}</w>"] for word in vocabulary()}
    merges: list[tuple[str, str]] = []
    while unfinished := [p for p in parts.values() if len(p) > 1]:
        pair = (unfinished[0][0], unfinished[0][1])
        merges.append(pair)
        parts = {word: _merged(p, pair) for word, p in parts.items()}
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*vocabulary_tokens(), *letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([START, END, *tokens]))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=LONGEST)


def vocabulary_tokens() -> list[str]:
    return [f"{word}</w>" for word in vocabulary()]


def _merged(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def tokens(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Ids (B, LONGEST), padded as the pipeline pads."""
    made: Tensor = tokenizer(
        list(captions), padding="max_length", max_length=LONGEST, return_tensors="pt"
    ).input_ids
    return made


def word_ids(tokenizer: Any, words: Iterable[str]) -> list[int]:
    """The token of each word, every one of which has its own."""
    found = tokenizer(list(words), add_special_tokens=False).input_ids
    return [number for (number,) in found]


def betas(times: int = 1000) -> list[float]:
    """Steps of noise after a squared cosine with SHIFT times the noise, as a ratio of variances; ends in noise alone.

    Things are dozens of latents large, so they shine through noise that would hide single ones: unshifted, where
    they are is hidden in the last two of a hundred times only.
    """

    def kept(part: float) -> float:  # the share of the variance that is picture
        cosine = math.cos((part + 0.008) / 1.008 * math.pi / 2) ** 2
        return cosine / (cosine + SHIFT * (1 - cosine))

    return [min(1 - kept((i + 1) / times) / kept(i / times), 0.999) for i in range(times)]


def build_scheduler() -> DDIMScheduler:
    """The velocity is what is predicted; see ``betas`` for the noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        trained_betas=betas(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # what diffusers expects; trailing spacing does not use it
    )


class Painter(nn.Module):
    """Denoiser and text encoder, which are trained together."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """(B, 4, h, w), (B,), (B, LONGEST) -> velocity (B, 4, h, w)."""
        return self.unet(
            noisy, steps, encoder_hidden_states=self.text(input_ids=ids).last_hidden_state
        ).sample


def assemble(
    vae: AutoencoderKL, painter: Painter, tokenizer: CLIPTokenizer, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """The pipeline of the trained parts."""
    parts: dict[str, Any] = {"vae": vae, "unet": painter.unet, "text_encoder": painter.text}
    pipeline = StableDiffusionPipeline(
        **{name: part.to("cpu", dtype).eval() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
