"""Whose keys an attention module reads where its model declares nothing: what its own class says, wherever it stands.

Of diffusers' attention classes CLASSES names those that read the same keys in every model: their own tokens'
(self), others' (cross), or their own and text's in one softmax (joint). Some say it of each module: by
``is_cross_attention``, or by projections for others' keys beside their own (ADDED). What remains, a class that takes keys
from an argument that it may do without, is known by the model that it stands in and by nothing else.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from .words import qualified

CROSS_SAID = "is_cross_attention"
_OWN = (
    "models.autoencoders.autoencoder_kl_kvae_audio.KVAEAudioAttention",
    "models.autoencoders.autoencoder_kl_minimax_h3.MiniMaxH3VideoAttention",
    "models.autoencoders.autoencoder_kl_minimax_h3_audio.MiniMaxH3AudioCausalAttention",
    "models.autoencoders.autoencoder_mmaudio.MMAudioAttnBlock1D",
    "models.autoencoders.autoencoder_rfd4_proteina.RFD4ProteinaPairAttention",
    "models.autoencoders.autoencoder_same.SAMEAttention",
    "models.autoencoders.ltx2_diffusion_decoder.LTX2VideoVaeNeighborhoodAttention",
    "models.transformers.minimax_music3_rvq_depth_decoder.MiniMaxMusic3DepthAttention",
    "models.transformers.transformer_ernie_image.ErnieImageAttention",
    "models.transformers.transformer_flux2.Flux2ParallelSelfAttention",
    "models.transformers.transformer_flux3.Flux3Attention",
    "models.transformers.transformer_ideogram4.Ideogram4Attention",
    "models.transformers.transformer_kandinsky6_sr.Kandinsky6SRAttention",
    "models.transformers.transformer_krea2.Krea2Attention",
    "models.transformers.transformer_minimax_h3.MiniMaxH3Attention",
    "models.transformers.transformer_minimax_music3.MiniMaxMusic3Attention",
    "models.transformers.transformer_qwenimage21.QwenImage21Attention",
    "models.transformers.transformer_rfd4_proteina.RFD4ProteinaPairAttention",
    "models.transformers.transformer_stable_audio3.StableAudio3SelfAttention",
)
_OTHERS = (
    "models.transformers.transformer_motif_video.MotifVideoCrossAttention",
    "models.transformers.transformer_sana_wm.MultiHeadCrossAttention",
    "models.transformers.transformer_stable_audio3.StableAudio3CrossAttention",
    "models.transformers.transformer_wan_animate.WanAnimateFaceBlockCrossAttention",
    "pipelines.ltx2.duration_head.LTX2DurationAttentionPooler",  # its queries are learned
)
_TOGETHER = (
    "models.attention_processor.MochiAttention",
    "models.transformers.transformer_cosmos3.Cosmos3PackedMoTAttention",
    "models.transformers.transformer_joyimage.JoyImageAttention",
    "models.transformers.transformer_joyimage_edit_plus.JoyImageEditPlusAttention",
    "models.transformers.transformer_prx.PRXAttention",
)
CLASSES: dict[str, str] = {
    f"diffusers.{name}": role
    for role, names in (("self", _OWN), ("cross", _OTHERS), ("joint", _TOGETHER))
    for name in names
}
# Joint where the module has projections for text beside its own (``added_kv_proj_dim``), self where it has none.
ADDED = frozenset(
    f"diffusers.models.transformers.{name}"
    for name in (
        "transformer_bria.BriaAttention",
        "transformer_bria_fibo.BriaFiboAttention",
        "transformer_flux.FluxAttention",
        "transformer_flux2.Flux2Attention",
        "transformer_longcat_image.LongCatImageAttention",
        "transformer_motif_video.MotifVideoAttention",
        "transformer_ovis_image.OvisImageAttention",
    )
)


def role(module: nn.Module) -> str | None:
    """self, cross or joint (its own tokens and text in one sequence); None where the class does not say."""
    name = _forward_of(type(module))
    if name in CLASSES:
        return CLASSES[name]
    added = getattr(module, "added_kv_proj_dim", None) is not None
    if name in ADDED:
        return "joint" if added else "self"
    if isinstance(module, Attention) and added:
        return "cross" if module.only_cross_attention else "joint"
    said: Any = getattr(module, CROSS_SAID, None)
    return ("cross" if said else "self") if isinstance(said, bool) else None


def unknown(module: nn.Module, family: str) -> str:
    """Why a module whose class does not say whose keys it reads is refused, and the way out."""
    return (
        f"whose keys a {type(module).__name__} reads is not declared for a {family}; set "
        f"`{CROSS_SAID}` on it, or leave it out with `where: {{modules}}`"
    )


def _forward_of(kind: type) -> str:
    """The class that ``kind`` has its ``forward`` from, by module and name."""
    return next((qualified(c) for c in kind.__mro__ if "forward" in vars(c)), "")
