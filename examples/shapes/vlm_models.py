"""The parts of demo:shapes-vlm: LLaVA's architecture at a small size, its tokenizer, template and processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from questions import words
from scenes import COLOURS, SHAPES, SIDE, Array
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PAD, END, UNKNOWN, IMAGE, USER, ASSISTANT = "<pad>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"
SPECIAL = (PAD, END, UNKNOWN, IMAGE, USER, ASSISTANT)
POSITIONS = 1024  # many turns and several images are allowed, though one turn on one image is what was learnt

# Every conversation begins with USER:, so there is no other first token.
TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' if loop.first else ' USER: ' }}
{%- else -%}{{ raise_exception('this model knows the roles user and assistant, not ' + message['role']) }}
{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image> ' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{ ' </s>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"""


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. ``tiny`` is for tests: it learns nothing, quickly."""

    patch: int = 8  # 64 image tokens
    vision: int = 128
    vision_layers: int = 5  # LLaVA reads the last but one, as CLIP's last layer says more about the whole
    vision_heads: int = 4
    text: int = 192
    text_layers: int = 6
    text_heads: int = 6
    text_groups: int = 2  # key/value heads
    text_inner: int = 512


FULL = Sizes()
TINY = Sizes(16, 16, 2, 2, 16, 2, 2, 1, 24)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word of questions and answers."""
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words()]))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()  # special tokens are cut out before
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # "square?" is two tokens
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # words joined by spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT], model_max_length=POSITIONS, padding_side="left",
        chat_template=TEMPLATE,
    )  # fmt: skip


def build_processor(sizes: Sizes) -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        images, build_tokenizer(), patch_size=sizes.patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def build_model(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision, intermediate_size=3 * sizes.vision, projection_dim=sizes.vision,
        num_hidden_layers=sizes.vision_layers, num_attention_heads=sizes.vision_heads,
        image_size=SIDE, patch_size=sizes.patch, hidden_act="gelu",
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=sizes.text, intermediate_size=sizes.text_inner,
        num_hidden_layers=sizes.text_layers, num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_groups, max_position_embeddings=POSITIONS, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=(SIDE // sizes.patch) ** 2, vision_feature_layer=-2,
            vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


class PatchReader(nn.Module):
    """What each patch shows, read from the tower's output: a training aid that is not exported.

    colours and shapes: one logit each and one for the background.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm = nn.LayerNorm(sizes.vision)
        self.colour = nn.Linear(sizes.vision, len(COLOURS) + 1)
        self.shape = nn.Linear(sizes.vision, len(SHAPES) + 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # (B, N, D)
        features = self.norm(features)
        return self.colour(features), self.shape(features)


def pixels(images: Array, device: torch.device) -> Tensor:
    """Pictures (B, H, W, 3) in 0..1 as the processor makes them: (B, 3, H, W) in -1..1, 8 bits each."""
    eight = (torch.from_numpy(images) * 255).round() / 255
    return (eight * 2 - 1).permute(0, 3, 1, 2).contiguous().to(device)


@dataclass(frozen=True)
class Packed:
    """Many turns on one picture each, as one batch. Every turn sees the picture and itself, and nothing else.

    ids, positions, labels: (B, L), labels -100 where nothing is learnt. mask: (B, 1, L, L), True where a row sees.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor


def pack(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Sequence[tuple[str, str]]], image_tokens: int
) -> Packed:
    """Rows of (question, answer) turns. Turns of a row share the tokens of its picture but not each other's, so
    the model learns to answer from the picture, and what it computes is what it computes for a turn alone."""
    user, image, assistant = tokenizer.convert_tokens_to_ids([USER, IMAGE, ASSISTANT])
    vocab = tokenizer.get_vocab()
    rows = []
    for row in turns:
        ids, places, labels, owners = [user, *[image] * image_tokens], [*range(image_tokens + 1)], [], []
        labels, owners = [-100] * len(ids), [0] * len(ids)
        for number, (question, answer) in enumerate(row, 1):
            asked = [*(vocab[word] for word in question.split()), assistant]
            said = [*(vocab[word] for word in answer.split()), tokenizer.eos_token_id]
            ids += asked + said
            places += range(image_tokens + 1, image_tokens + 1 + len(asked) + len(said))
            labels += [-100] * len(asked) + said
            owners += [number] * (len(asked) + len(said))
        rows.append((ids, places, labels, owners))
    width = max(len(row[0]) for row in rows)
    fill = (tokenizer.pad_token_id, 0, -100, -1)
    ids, places, labels, owners = (
        torch.tensor([row[i] + [fill[i]] * (width - len(row[i])) for row in rows]) for i in range(4)
    )
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == 0)
    return Packed(ids, places, labels, (same & causal)[:, None])
