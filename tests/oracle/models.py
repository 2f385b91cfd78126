"""Tiny random models, seeded, in eval mode, with peaked attention, so that selections have margins.

``build(family)`` returns a float64 model whose norms and rotary tables stay in float64 too
(``exact=False`` leaves the stock classes; then comparisons are good to 1e-6 only). Deeper imports
happen inside the builders, so that a test without diffusers can use the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .float64 import exact as keep_float64

VOCAB = 67
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "gpt_neox")
ENCODERS = ("bert", "vit", "t5")
DENOISERS = ("unet", "sd3", "flux", "pixart")
# What a window hides or what has no rotary positions is excluded where a test rotates or evicts.
FULL_ATTENTION = ("llama", "qwen2", "qwen3", "phi", "gpt_neox")


def build(
    family: str,
    *,
    seed: int = 0,
    layers: int = 3,
    peak: float | None = None,
    dtype: torch.dtype = torch.float64,
    exact: bool = True,
    **overrides: Any,
) -> Any:
    """A tiny model. ``peak``: standard deviation of query and key projections (None: a value that gives
    logits of standard deviation about 3). ``overrides``: fields of the config."""
    torch.manual_seed(seed)
    model = _BUILDERS[family](layers, overrides)
    _randomise(model, seed, _PEAK.get(family, 0.4) if peak is None else peak, family in DENOISERS)
    # nn.Module's own `to`: diffusers' warns about nothing.
    model = nn.Module.to(model, dtype).eval().requires_grad_(False)
    return keep_float64(model) if exact and dtype == torch.float64 else model


# T5 does not divide by sqrt(D).
_PEAK = {"t5": 0.22, "unet": 0.4, "sd3": 0.4, "flux": 0.4, "pixart": 0.4}
_QK = (
    "q_proj",
    "k_proj",
    ".query",
    ".key",
    ".q.",
    ".k.",
    "to_q",
    "to_k",
    "query_key_value",
    "add_q",
    "add_k",
)

_QK_NORM = ("q_norm", "k_norm", "norm_q", "norm_k", "norm_added_q", "norm_added_k")


def _randomise(model: nn.Module, seed: int, peak: float, keep_rest: bool) -> None:
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(p: Tensor, std: float) -> Tensor:
        return torch.randn(p.shape, generator=generator) * std

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and any(word in name for word in _QK):
                p.copy_(normal(p, peak * math.sqrt(32 / p.shape[-1])))
            elif any(word in name for word in _QK_NORM):
                p.add_(0.3)  # queries and keys have unit size after these: this alone sharpens
            elif keep_rest:
                continue
            elif p.dim() >= 2 and ("embed" in name or "shared" in name or "wte" in name):
                p.copy_(normal(p, 1.0))
            elif p.dim() >= 2:
                p.copy_(normal(p, 1.5 / math.sqrt(p[0].numel())))
            else:
                p.add_(normal(p, 0.1))


def _text(overrides: dict[str, Any], layers: int, **extra: Any) -> dict[str, Any]:
    """Config fields that decoders share: 4 query heads on 2 key/value heads of width 8."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    return {**shared, **extra, **overrides}


def _llama(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_text(overrides, layers, head_dim=8)))


def _mistral(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_text(overrides, layers, head_dim=8, sliding_window=8)))


def _qwen2(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_text(overrides, layers)))


def _qwen3(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_text(overrides, layers, head_dim=8)))


def _gemma2(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    extra = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "attn_logit_softcapping": 4.0,  # low, so that it matters
        "attn_implementation": "eager",
    }
    return Gemma2ForCausalLM(Gemma2Config(**_text(overrides, layers, **extra)))


def _phi(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import PhiConfig, PhiForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return PhiForCausalLM(PhiConfig(**_text(overrides, layers, rope_parameters=rope)))


def _gpt_neox(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    fields = _text(overrides, layers, rope_parameters=rope)
    fields.pop("num_key_value_heads")
    return GPTNeoXForCausalLM(GPTNeoXConfig(**fields))


def _bert(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import BertConfig, BertModel

    fields = _text(overrides, layers)
    fields.pop("num_key_value_heads")
    return BertModel(BertConfig(**fields))


def _vit(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "attn_implementation": "sdpa",
        **overrides,
    }
    return ViTModel(ViTConfig(**fields))


def _t5(layers: int, overrides: dict[str, Any]) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    fields = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": layers,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
        **overrides,
    }
    return T5ForConditionalGeneration(T5Config(**fields))


def _denoiser(family: str) -> Callable[[int, dict[str, Any]], nn.Module]:
    def make(layers: int, overrides: dict[str, Any]) -> nn.Module:
        from . import denoisers

        return getattr(denoisers, family)(layers, overrides)

    return make


_BUILDERS: dict[str, Callable[[int, dict[str, Any]], nn.Module]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "phi": _phi,
    "gpt_neox": _gpt_neox,
    "bert": _bert,
    "vit": _vit,
    "t5": _t5,
    **{family: _denoiser(family) for family in DENOISERS},
}


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """Random token ids (1, length), never a special token."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, vocab, (1, length), generator=generator)


def left_padded(lengths: Sequence[int], seed: int = 0, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, padded on the left: ids and attention mask (B, max)."""
    return pad_left([prompt(n, seed + 17 * i) for i, n in enumerate(lengths)], pad)


def pad_left(prompts: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """(1, length) prompts as one batch padded on the left: ids and attention mask (B, max)."""
    width = max(p.shape[1] for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, p in enumerate(prompts):
        ids[row, width - p.shape[1] :], mask[row, width - p.shape[1] :] = p[0], 1
    return ids, mask


def inputs(family: str, batch: int = 2, seed: int = 0, **size: int) -> dict[str, Tensor]:
    """Keyword arguments for ``model(**inputs)``, float64. Text: ``length`` (padded except in row 0);
    ViT: ``image``; denoisers: latent ``height``, ``width`` and ``text`` length."""
    generator = torch.Generator().manual_seed(2000 + seed)
    if family in DENOISERS:
        from . import denoisers

        return denoisers.inputs(family, batch, generator, **size)
    if family == "vit":
        side = size.get("image", 32)
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)}
    length = size.get("length", 14)
    ids, mask = left_padded([max(2, length - 3 * i) for i in range(batch)], seed)
    if family == "t5":
        # Encoders are padded on the right.
        ids, mask = ids.flip(1), mask.flip(1)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": left_padded([9] * batch, seed + 5)[0],
        }
    if family == "bert":
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}
