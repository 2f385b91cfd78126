"""Entropy scaling for denoisers: sharper logits where there are more tokens than in training."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

VAE = 8  # pixels per latent, for every model here


def factor(tokens: int, trained: int) -> float:
    """sqrt(ln N / ln T); counts under 2 count as 2; exactly 1 when they are equal."""
    tokens, trained = max(2, tokens), max(2, trained)
    return 1.0 if tokens == trained else math.sqrt(math.log(tokens) / math.log(trained))


def halved(side: int, level: int) -> int:
    """A side after ``level`` halvings, each rounded up."""
    for _ in range(level):
        side = math.ceil(side / 2)
    return side


def unet_level(name: str, levels: int) -> int:
    """The resolution level of a module of a UNet with ``levels`` down blocks (0: full latent size)."""
    kind, index = name.split(".")[:2]
    if kind == "down_blocks":
        return int(index)
    return levels - 1 if kind == "mid_block" else levels - 1 - int(index)


class DenoiserOracle:
    """What one attention layer of a denoiser may be changed by; this one changes nothing."""

    def begin(self, model: nn.Module, given: dict[str, Any]) -> None:
        """Called before each denoiser call, with its arguments by name."""

    def apply(self, name: str, logits: Tensor, image: int, text: int) -> Tensor:
        """The logits of self- and joint attention, (B, H, L, Lk)."""
        return logits

    def keys(self, name: str, key: Tensor, value: Tensor, image: int, text: int) -> tuple[Tensor, Tensor]:
        """Keys and values of self- and joint attention, (B, H, Lk, D), after any rotation."""
        return key, value


class EntropyOracle(DenoiserOracle):
    """Logits of each self-attention layer times sqrt(ln N / ln T), N from the live call and T the count
    that the same layer has at the trained size (height, width) in pixels.

    - UNet: T is the trained latent grid, halved (rounding up) down to the layer's level.
    - Transformers: the trained latent grid over the patch size. FLUX packs 2 × 2 latents into a token.
    - Joint attention: the live text length is added to both N and T, so the trained size gives 1 for
      any prompt. Layers without text in them count image tokens only.
    - Cross-attention is left alone.

    ``trained=None`` takes ``sample_size`` of the model's config (latents); FLUX, which has none, 1024 pixels.
    ``scale=False`` leaves all logits alone. ``factors``: per layer name, the factor of every call.
    """

    def __init__(self, model: nn.Module, trained: tuple[int, int] | None = None, scale: bool = True) -> None:
        self.kind = type(model).__name__
        self.config, self.scale = model.config, scale
        if trained is None:
            side = getattr(model.config, "sample_size", None) or 1024 // VAE
            latent = (side, side) if isinstance(side, int) else tuple(side)
        else:
            latent = (trained[0] // VAE, trained[1] // VAE)
        self.latent = latent
        self.factors: dict[str, list[float]] = {}

    def trained(self, name: str) -> int:
        """Image tokens of the layer at the trained size."""
        h, w = self.latent
        if self.kind == "UNet2DConditionModel":
            level = unet_level(name, len(self.config.block_out_channels))
            return halved(h, level) * halved(w, level)
        patch = 2 if self.kind == "FluxTransformer2DModel" else self.config.patch_size
        return (h // patch) * (w // patch)

    def apply(self, name: str, logits: Tensor, image: int, text: int) -> Tensor:
        s = factor(image + text, self.trained(name) + text) if self.scale else 1.0
        self.factors.setdefault(name, []).append(s)
        return logits * s


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads · D) to (B, heads, L, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _merge(p: Tensor, value: Tensor) -> Tensor:
    return (p @ value).transpose(1, 2).flatten(2)


def _out(attn: nn.Module, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


class _Processor:
    """One layer's dense attention."""

    def __init__(self, oracle: DenoiserOracle, name: str) -> None:
        self.oracle, self.name = oracle, name


class _Plain(_Processor):
    """Self- and cross-attention of UNets and PixArt."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attn.spatial_norm is not None or attn.group_norm is not None or hidden_states.ndim != 3:
            raise NotImplementedError("the oracle knows transformer blocks only")
        if attn.norm_cross or attn.residual_connection or attn.rescale_output_factor != 1:
            raise NotImplementedError("the oracle knows plain attention only")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads))
        k = _normed(attn.norm_k, _heads(attn.to_k(context), attn.heads))
        v = _heads(attn.to_v(context), attn.heads)
        if encoder_hidden_states is None:
            k, v = self.oracle.keys(self.name, k, v, hidden_states.shape[1], 0)
        z = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        if encoder_hidden_states is None:
            z = self.oracle.apply(self.name, z, hidden_states.shape[1], 0)
        if attention_mask is not None:  # additive, (B, 1, Lk)
            z = z + attention_mask[:, None]
        return _out(attn, _merge(z.softmax(dim=-1), v))


class _Joint(_Processor):
    """SD3: the sequence is image then text; some layers see the image only."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        image = hidden_states.shape[1]
        q = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads))
        k = _normed(attn.norm_k, _heads(attn.to_k(hidden_states), attn.heads))
        v = _heads(attn.to_v(hidden_states), attn.heads)
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            q_text = _normed(attn.norm_added_q, _heads(attn.add_q_proj(encoder_hidden_states), attn.heads))
            k_text = _normed(attn.norm_added_k, _heads(attn.add_k_proj(encoder_hidden_states), attn.heads))
            v_text = _heads(attn.add_v_proj(encoder_hidden_states), attn.heads)
            q, k, v = (torch.cat(pair, dim=2) for pair in ((q, q_text), (k, k_text), (v, v_text)))
        k, v = self.oracle.keys(self.name, k, v, image, text)
        z = self.oracle.apply(self.name, q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), image, text)
        out = _merge(z.softmax(dim=-1), v)
        image_out = _out(attn, out[:, :image])
        if encoder_hidden_states is None:
            return image_out
        text_out = out[:, image:]
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


class _Flux(_Processor):
    """FLUX: text then image; single blocks get both as one stream, with the call's text length."""

    text = 0  # of the present forward, set by the pre-hook that install_denoiser puts on the model

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        if attention_mask is not None:
            raise NotImplementedError("the oracle knows FLUX without a mask")
        q = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn.heads))
        k = _normed(attn.norm_k, _heads(attn.to_k(hidden_states), attn.heads))
        v = _heads(attn.to_v(hidden_states), attn.heads)
        if encoder_hidden_states is not None:
            q_text = _normed(attn.norm_added_q, _heads(attn.add_q_proj(encoder_hidden_states), attn.heads))
            k_text = _normed(attn.norm_added_k, _heads(attn.add_k_proj(encoder_hidden_states), attn.heads))
            v_text = _heads(attn.add_v_proj(encoder_hidden_states), attn.heads)
            q, k, v = (torch.cat(pair, dim=2) for pair in ((q_text, q), (k_text, k), (v_text, v)))
        if image_rotary_emb is not None:
            q, k = _turn(q, *image_rotary_emb), _turn(k, *image_rotary_emb)
        text = self.text
        k, v = self.oracle.keys(self.name, k, v, q.shape[2] - text, text)
        z = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        z = self.oracle.apply(self.name, z, q.shape[2] - text, text)
        out = _merge(z.softmax(dim=-1), v)
        if encoder_hidden_states is None:
            return out
        return _out(attn, out[:, text:]), attn.to_add_out(out[:, :text])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of (B, H, L, D) by the tables (L, D)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos + turned * sin


_PROCESSORS = {
    "UNet2DConditionModel": _Plain,
    "PixArtTransformer2DModel": _Plain,
    "SD3Transformer2DModel": _Joint,
    "FluxTransformer2DModel": _Flux,
}


def knows(model: nn.Module) -> bool:
    """Whether the layers of ``model`` are written out here."""
    return type(model).__name__ in _PROCESSORS


@contextmanager
def install_denoiser(
    model: nn.Module, oracle: DenoiserOracle, processors: dict[str, Any] | None = None
) -> Iterator[Any]:
    """Run a stock float64 denoiser through dense attention as ``oracle`` changes it; restored on exit.

    ``processors``: by layer name, what is to be used instead of the dense ones."""
    if next(model.parameters()).dtype != torch.float64:
        raise TypeError("the oracle wants a float64 model")
    kind = _PROCESSORS[type(model).__name__]
    before = dict(model.attn_processors)
    mine = {name: kind(oracle, name.removesuffix(".processor")) for name in before}
    names = list(inspect.signature(model.forward).parameters)

    def begin(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        oracle.begin(model, given)
        for processor in mine.values():
            processor.text = given["encoder_hidden_states"].shape[1]

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    model.set_attn_processor({**mine, **(processors or {})})
    try:
        yield oracle
    finally:
        hook.remove()
        model.set_attn_processor(dict(before))


@contextmanager
def install_entropy(
    model: nn.Module, trained: tuple[int, int] | None = None, scale: bool = True
) -> Iterator[EntropyOracle]:
    """Run a stock float64 denoiser through dense attention with entropy scaling; restored on exit."""
    with install_denoiser(model, EntropyOracle(model, trained, scale)) as oracle:
        yield oracle
