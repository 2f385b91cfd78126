"""Whose keys an attention module reads: what transformers declares, and a table of the classes that declare nothing.

A module is cross-attention where it says so (``is_cross_attention``), where it cannot be called without others' states,
or where a model that it stands in records it as ``cross_attentions``. Of transformers' classes that say none of this
and read others' keys, ALWAYS names those that do so wherever they stand, PLACES those that do so under these names in
the layers of their own model. Every other class of transformers is self-attention; tests/hosts/test_roles.py runs the
models and compares. A class of nobody's that says nothing is taken for self-attention, and that is said.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

# Arguments of a forward by which it is given keys that are not its queries' own, where it cannot do without.
OTHERS = ("key_value_states", "cross_attention_states", "context")
RECORDED = "cross_attentions"

ALWAYS = frozenset(
    "BertCrossAttention BertGenerationCrossAttention BltCrossAttention BridgeTowerCrossAttention CamembertCrossAttention "
    "ConditionalDetrDecoderCrossAttention Data2VecTextCrossAttention DetrCrossAttention EdgeTamVideoRoPECrossAttention "
    "ElectraCrossAttention ErnieCrossAttention MllamaTextCrossAttention RoCBertCrossAttention RobertaCrossAttention "
    "RobertaPreLayerNormCrossAttention T5GemmaCrossAttention VJEPA2PoolerCrossAttention XCLIPCrossAttention "
    "XLMRobertaCrossAttention XLMRobertaXLCrossAttention XmodCrossAttention".split()
)
# Those whose softmax goes over their own keys and others' together.
MERGED = frozenset({"T5Gemma2MergedAttention"})
_T5 = ("EncDecAttention",)
_MASKS = ("cross_attn_token_to_image", "cross_attn_image_to_token", "final_attn_token_to_image")
_PROMPTS = ("cross_attn", "text_cross_attn", "vision_cross_attn", "prompt_cross_attn")
PLACES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("T5Attention", "MT5Attention", "UMT5Attention", "LongT5Attention", "SwitchTransformersAttention",
         "Pop2PianoAttention", "UdopAttention"), _T5,
    ),
    **dict.fromkeys(
        ("SamAttention", "SamHQAttention", "Sam2Attention", "Sam2VideoAttention", "Sam3TrackerAttention",
         "Sam3TrackerVideoAttention", "EdgeTamAttention", "EdgeTamVideoAttention"), _MASKS,
    ),
    **dict.fromkeys(("Sam3Attention", "Sam3LiteTextAttention"), _PROMPTS),
    **dict.fromkeys(("Sam2VideoRoPEAttention", "Sam3TrackerVideoRoPEAttention"), ("cross_attn_image",)),
    **dict.fromkeys(("KosmosTextAttention", "Kosmos2_5TextAttention"), ("encoder_attn", "x_attn")),
    **dict.fromkeys(("EfficientLoFTRAttention", "LightGlueAttention", "EdgeTamVideoPerceiverAttention"),
                    ("cross_attention",)),
    "Molmo2VisionAttention": ("image_pooling_2d",),
    "Pix2StructTextAttention": ("encoder_decoder_attention",),
}  # fmt: skip


def role(name: str, module: nn.Module, around: Iterable[tuple[str, nn.Module]] = ()) -> str:
    """self or cross, of the attention ``module``; ``around``: the pretrained models that it stands in, by name."""
    if getattr(module, "is_cross_attention", False):
        return "cross"
    if merged(module):
        return "self"
    parameters = inspect.signature(type(module).forward).parameters
    if any(n in parameters and parameters[n].default is inspect.Parameter.empty for n in OTHERS):
        return "cross"
    if any(_recorded(name.removeprefix(f"{n}."), module, model) for n, model in around):
        return "cross"
    cls = published(type(module))
    if cls is None:
        return "self"
    # The module stands under its place, or one level below it.
    return "cross" if cls in ALWAYS or set(PLACES.get(cls, ())) & set(name.split(".")[-2:]) else "self"


def merged(module: nn.Module) -> bool:
    """Whether the attention reads its own keys and an encoder's in one softmax."""
    return published(type(module)) in MERGED


def assumed(module: nn.Module) -> bool:
    """Whether nothing is declared of the module's class: it is then taken for self-attention."""
    return published(type(module)) is None and not hasattr(module, "is_cross_attention")


def published(cls: type) -> str | None:
    """The name of transformers' own class that ``cls`` is or derives from; None where there is none."""
    own = (c.__name__ for c in cls.__mro__ if c.__module__.startswith("transformers.models."))
    return next(own, None)


def _recorded(path: str, module: nn.Module, model: Any) -> bool:
    """Whether ``model`` records what the module at ``path`` inside it attends to as attention to others' states."""
    found = (getattr(model, "_can_record_outputs", None) or {}).get(RECORDED, ())
    for spec in found if isinstance(found, (list, tuple)) else (found,):
        place, cls = getattr(spec, "layer_name", None), getattr(spec, "target_class", spec)
        there = place is None or f".{place.strip('.')}." in f".{path}."
        if isinstance(cls, type) and isinstance(module, cls) and there:
            return True
    return False
