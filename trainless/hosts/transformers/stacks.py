"""Whether an attention stands in an encoder or in a decoder, where its class alone says it and its mask does not.

Of transformers' classes: ALWAYS those that are the same wherever they stand, PLACES those that are a decoder's, or an
encoder's, under this name in the modules of their own model. Nothing is read from a name of any other class.
"""

from __future__ import annotations

from torch import nn

from .cross import published

ENCODER, DECODER = "encoder", "decoder"
ALWAYS = dict.fromkeys(
    ("LwDetrAttention", "MaskFormerDetrCrossAttention", "MaskFormerDetrSelfAttention", "MusicgenAttention",
     "RfDetrAttention", "XCLIPCrossAttention"), DECODER,
)  # fmt: skip
# Decoders of pictures and masks see everything at once; encoders of sound in codecs are causal and keep a cache.
PLACES = {
    **dict.fromkeys(
        ("CLIPSegAttention", "Emu3VQVAEAttentionBlock", "VideoMAESelfAttention", "ViTMAEAttention"),
        ("decoder", DECODER),
    ),
    **dict.fromkeys(("MimiAttention", "PocketTTSAudioTokenizerAttention"), ("encoder_transformer", ENCODER)),
}


def declared(name: str, module: nn.Module) -> str | None:
    """encoder or decoder; None where nothing is declared of the class of the module called ``name``."""
    kind = published(type(module)) or ""
    place, part = PLACES.get(kind, (None, None))
    return part if place in name.split(".") else ALWAYS.get(kind)
