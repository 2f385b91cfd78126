"""What is declared about attention processors of diffusers: which never get to torch's operator, and the way out.

A processor is found by the module and name of the class that its call comes from. Of diffusers' other classes the source
is read; of anybody else's nothing is known before a call.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from .denoisers.words import qualified

# Backends of diffusers' dispatcher that end in torch's own operator.
BACKENDS = {"native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"}
# Processors whose attention never gets to torch's operator -> what to use instead.
ELSEWHERE = {
    "diffusers.models.transformers.transformer_qwenimage21.QwenImage21FlexAttnProcessor": (
        "runs flex attention, which no patch can reach; call set_attn_processor(QwenImage21AttnProcessor()) first"
    ),
    "diffusers.models.transformers.transformer_anyflow_far.AnyFlowCausalAttnProcessor": (
        "runs flex attention, which no patch can reach; this class has no other"
    ),
    "diffusers.models.transformers.transformer_kandinsky6_sr.Kandinsky6SRAttnProcessor": (
        "runs flex attention over blocks that each call chooses, which no patch can reach; this class has no other"
    ),
    "diffusers.models.transformers.transformer_wan_animate_2.WanAnimate2AttnProcessor": (
        "runs flex attention in the calls that paint, which no patch can reach; this class has no other"
    ),
}
_HERE = "diffusers.models.attention_processor"
LINEAR = frozenset(
    {f"{_HERE}.{name}" for name in (
        "PAGCFGSanaLinearAttnProcessor2_0", "PAGIdentitySanaLinearAttnProcessor2_0", "SanaLinearAttnProcessor2_0",
        "SanaMultiscaleAttnProcessor2_0",
    )} | {"diffusers.models.transformers.transformer_sana_video.SanaLinearAttnProcessor3_0"}
)  # fmt: skip
# Processors that compute the same as another one does through torch's operator.
STANDINS = {f"{_HERE}.{name}": other for name, other in {
    "AttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
}.items()}  # fmt: skip
# What takes processors out again that a call of this name has put in.
UNDONE = {
    "disable_attention_slicing()": ("SlicedAttnProcessor", "SlicedAttnAddedKVProcessor"),
    "disable_xformers_memory_efficient_attention()": (
        "CustomDiffusionXFormersAttnProcessor", "IPAdapterXFormersAttnProcessor", "XFormersAttnAddedKVProcessor",
        "XFormersAttnProcessor", "XFormersJointAttnProcessor",
    ),
}  # fmt: skip
# Those whose second attention is over an image prompt's keys, beside the layer's own.
IMAGE_PROMPTS = frozenset({
    f"{_HERE}.IPAdapterAttnProcessor2_0", f"{_HERE}.SD3IPAdapterJointAttnProcessor2_0",
    f"{_HERE}.FluxIPAdapterJointAttnProcessor2_0",
    "diffusers.models.transformers.transformer_flux.FluxIPAdapterAttnProcessor",
})  # fmt: skip


# What follows from classes and settings alone is no part of a compiled graph: the compiler keeps the answer.


@torch.compiler.assume_constant_result
def home_of(kind: type) -> str:
    """The module in which a processor class has its call from."""
    return next((c.__module__ for c in kind.__mro__ if "__call__" in vars(c)), "")


@torch.compiler.assume_constant_result
def image_prompts(kind: type) -> bool:
    """Whether a processor of this class attends to an image prompt's keys as well, in a call of their own."""
    return _called(kind) in IMAGE_PROMPTS


@torch.compiler.assume_constant_result
def _class_says(kind: type) -> str | None:
    name = _called(kind)
    if name in ELSEWHERE:
        return f"{kind.__name__} {ELSEWHERE[name]}"
    if name in LINEAR:
        return f"{kind.__name__} is linear attention already, without a softmax"
    return f"{kind.__name__} does not use scaled_dot_product_attention" if _source_says(kind) else None


@torch.compiler.assume_constant_result
def _active_backend() -> str:
    name = _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(name, "value", name))


def _called(kind: type) -> str:
    """The class that ``kind`` has its call from, by module and name."""
    return next((qualified(c) for c in kind.__mro__ if "__call__" in vars(c)), "")


@functools.cache
def _source_says(kind: type) -> bool:
    """Whether the source of a processor class of diffusers shows that it does not use torch's operator."""
    if not home_of(kind).startswith("diffusers."):
        return False
    try:
        source = inspect.getsource(kind.__call__)
    except (OSError, TypeError):
        return False
    return not ("scaled_dot_product_attention(" in source or "dispatch_attention_fn(" in source)


def refusal(module: nn.Module, model: Any = None) -> str | None:
    """Why this attention module cannot be patched as it is set up now, or None; ``model``: the one it is part of."""
    processor = getattr(module, "processor", None)
    if processor is None:
        return "it has no processor"
    said = _class_says(processor.__class__)
    if said is not None:
        return said + _way_out(module, model)
    if getattr(processor, "_parallel_config", None) is not None:
        return (
            "context parallelism gives each device a part of the sequence only, which no patch can see whole"
        )
    if hasattr(processor, "_attention_backend"):
        backend = processor._attention_backend
        name = str(getattr(backend, "value", backend)) if backend else _active_backend()
        if name not in BACKENDS:
            return f'attention backend {name!r} is set; call set_attention_backend("native") first'
    return None


def _way_out(module: nn.Module, model: Any) -> str:
    """What to do about a processor that does not use torch's operator, as far as something does the same."""
    name = _called(type(module.processor))
    if name in ELSEWHERE or name in LINEAR:
        return ""
    undone = next((call for call, kinds in UNDONE.items() if name.removeprefix(f"{_HERE}.") in kinds), None)
    other = STANDINS.get(name)
    if other is not None and not getattr(module, "scale_qk", True):
        # torch's operator scales, and the processors that call it do not say otherwise.
        return ", and none that does leaves logits unscaled as this layer has them"
    if other is not None:
        setter = "set_attn_processor" if hasattr(model, "set_attn_processor") else "set_processor"
        where = "" if setter == "set_attn_processor" else " of each such layer"
        other = f"{setter}({other}()){where}"
    ways = [way for way in (undone, other) if way is not None]
    return f"; call {', or '.join(ways)} first" if ways else "; use a processor that does"
