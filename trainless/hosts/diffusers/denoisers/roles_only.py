"""Classes of which only this is declared: which layers attend to their own tokens, and which to something else.

Methods that have to know image tokens are refused on all of them; those that act on roles alone work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from . import unets
from .words import (
    CROSS,
    DOUBLE_AND_SINGLE,
    FRAMES,
    IMAGE,
    JOINT,
    OWN,
    SELF_AND_CROSS,
    TEXT,
    Layout,
    undeclared,
)

Sites = Mapping[str, str] | Callable[[Any, str, nn.Module], str | None]
NO_IMAGE = "its tokens are embeddings or sound, not an image"
VIDEO = "it is a video class whose tokens are not declared"


def _of(name: str, sites: Sites, why: str | None = None, **more: Any) -> Layout:
    kind = name.rpartition(".")[2]
    return Layout(f"diffusers.{name}", sites=sites, why=undeclared(kind) if why is None else why, **more)


def _sd3_control(model: Any, name: str, module: nn.Module) -> str:
    """Blocks without text, as in a ControlNet with ``joint_attention_dim=None``, have no projections for it."""
    return IMAGE if getattr(module, "added_kv_proj_dim", None) is None else JOINT


def _said(own: str) -> Callable[[Any, str, nn.Module], str]:
    """Blocks that can be made with either kind of attention in either place, and say of each which it is."""
    return lambda model, name, module: CROSS if module.is_cross_attention else own


OWN_AND_CROSS = {"*.attn1": OWN, "*.attn2": CROSS}
NAMED = {"*.self_attn": OWN, "*.cross_attn": CROSS}
NOTHING = [
    _of(f"models.transformers.{name}", sites, NO_IMAGE, **more)
    for name, sites, more in (
        ("prior_transformer.PriorTransformer", {"transformer_blocks.*": OWN}, {}),
        ("stable_audio_transformer.StableAudioDiTModel", OWN_AND_CROSS, {}),
        # Its attention is a difference of two, each of which is scaled.
        ("transformer_stable_audio3.StableAudio3DiTModel", NAMED, {"several": True}),
        ("ace_step_transformer.AceStepTransformer1DModel", NAMED, {}),
        ("transformer_longcat_audio_dit.LongCatAudioDiTTransformer", NAMED, {}),
        ("transformer_minimax_music3.MiniMaxMusic3Transformer1DModel", {"transformer_blocks.*": OWN}, {}),
        ("minimax_music3_rvq_depth_decoder.MiniMaxMusic3RVQDepthDecoder", {"layers.*": OWN}, {}),
        (
            "t5_film_transformer.T5FilmDecoder",
            {"*.layer.0.attention": OWN, "*.layer.1.attention": CROSS}, {},
        ),
        ("transformer_rfd4_proteina.RFD4ProteinaTransformer", {"transformer_layers.*": OWN}, {}),
    )
]  # fmt: skip
LTX2 = {"*_to_*_attn": CROSS, "*attn1": IMAGE, "*attn2": CROSS}
WAN = {"face_adapter.*": CROSS, **SELF_AND_CROSS}
VIDEOS = [
    _of(f"models.transformers.{name}", sites, VIDEO)
    for name, sites in (
        ("transformer_wan_vace.WanVACETransformer3DModel", SELF_AND_CROSS),
        ("transformer_wan_animate.WanAnimateTransformer3DModel", WAN),
        ("transformer_skyreels_v2.SkyReelsV2Transformer3DModel", SELF_AND_CROSS),
        ("transformer_chronoedit.ChronoEditTransformer3DModel", SELF_AND_CROSS),
        ("transformer_anyflow.AnyFlowTransformer3DModel", SELF_AND_CROSS),
        ("transformer_anyflow_far.AnyFlowFARTransformer3DModel", SELF_AND_CROSS),
        ("transformer_helios.HeliosTransformer3DModel", SELF_AND_CROSS),
        ("consisid_transformer_3d.ConsisIDTransformer3DModel", {"*.attn1": JOINT}),
        ("transformer_ltx2.LTX2VideoTransformer3DModel", LTX2),
        ("transformer_sana_wm_refiner.SanaWMLTX2RefinerTransformer3DModel", LTX2),
        (
            "transformer_hunyuan_video_framepack.HunyuanVideoFramepackTransformer3DModel",
            {"context_embedder.*": TEXT, **DOUBLE_AND_SINGLE},
        ),
    )
]  # fmt: skip
# Classes of several kinds of tokens, and video classes filed under no other.
MIXED = [
    # A layer's text attends to itself, then its frames to text and frames: two calls, each of which goes through a plan.
    _of("models.transformers.transformer_cosmos3.Cosmos3OmniTransformer", {"layers.*": JOINT}, several=True),
    _of(
        "models.transformers.transformer_kandinsky6.Kandinsky6Transformer3DModel",
        {"*_text_transformer_blocks.*": TEXT, "*.self_attention": OWN, "*cross_attention": CROSS},
    ),
    _of(
        "models.transformers.transformer_kandinsky6_sr.Kandinsky6SRTransformer3DModel",
        {"*.self_attention": IMAGE},
    ),
    # Text, pictures, sound and frames lie in one packed sequence.
    _of(
        "models.transformers.transformer_minimax_h3.MiniMaxH3Transformer3DModel",
        {"token_refiner.*": TEXT, "transformer_blocks.*": JOINT},
    ),
    _of(
        "models.transformers.transformer_motif_video.MotifVideoTransformer3DModel",
        {"*.cross_attn": CROSS, **DOUBLE_AND_SINGLE},
    ),
    _of("models.transformers.transformer_sana_wm.SanaWMTransformer3DModel", {"*.cross_attn": CROSS}),
    _of(
        "models.transformers.transformer_wan_animate_2.WanAnimate2Transformer3DModel",
        {"*.self_attn": IMAGE, "*.cross_attn": CROSS},
    ),
]
_FIRST = "down_blocks.0.base_attentions.0.transformer_blocks.0"
_FRAMES = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1"
_NESTED = {f"nets.0.{name}": holds for name, holds in unets.BLOCKS.items()}
CONTROLS = [
    _of(f"models.controlnets.{name}", sites, None, **more)
    for name, sites, more in (
        ("multicontrolnet.MultiControlNetModel", unets.nested_kind, {"examples": _NESTED}),
        ("controlnet_union.ControlNetUnionModel", unets.kind_of, {"examples": unets.BLOCKS}),
        ("multicontrolnet_union.MultiControlNetUnionModel", unets.nested_kind, {"examples": _NESTED}),
        (
            "controlnet_xs.UNetControlNetXSModel", unets.kind_of,
            {"examples": {f"{_FIRST}.attn1": IMAGE, f"{_FIRST}.attn2": CROSS}},
        ),
        ("controlnet_xs.ControlNetXSAdapter", unets.kind_of, {"examples": unets.BLOCKS}),
        ("controlnet_sparsectrl.SparseControlNetModel", unets.kind_of, {"examples": unets.WITH_FRAMES}),
        ("controlnet_flux.FluxControlNetModel", DOUBLE_AND_SINGLE, {}),
        ("controlnet_flux.FluxMultiControlNetModel", {"nets.*": JOINT}, {}),
        ("controlnet_qwenimage.QwenImageControlNetModel", DOUBLE_AND_SINGLE, {}),
        ("controlnet_qwenimage.QwenImageMultiControlNetModel", {"nets.*": JOINT}, {}),
        ("controlnet_sd3.SD3ControlNetModel", _sd3_control, {"examples": {"transformer_blocks.0.attn": JOINT}}),
        (
            "controlnet_sd3.SD3MultiControlNetModel", _sd3_control,
            {"examples": {"nets.0.transformer_blocks.0.attn": JOINT}},
        ),
        ("controlnet_hunyuan.HunyuanDiT2DControlNetModel", SELF_AND_CROSS, {}),
        ("controlnet_hunyuan.HunyuanDiT2DMultiControlNetModel", SELF_AND_CROSS, {}),
        ("controlnet_sana.SanaControlNetModel", SELF_AND_CROSS, {}),
        ("controlnet_cosmos.CosmosControlNetModel", SELF_AND_CROSS, {}),
        (
            "controlnet_z_image.ZImageControlNetModel",
            {"context_refiner.*": TEXT, "*noise_refiner.*": IMAGE, "control_layers.*": JOINT}, {},
        ),
    )
]  # fmt: skip
# What is put into other models, and models beside a denoiser.
PIECES = [
    _of(
        "models.transformers.transformer_2d.Transformer2DModel", _said(IMAGE),
        examples={"transformer_blocks.0.attn1": IMAGE, "transformer_blocks.0.attn2": CROSS},
    ),
    _of("models.transformers.transformer_2d_dreamlite.DreamLiteTransformer2DModel", SELF_AND_CROSS),
    _of(
        "models.transformers.transformer_temporal.TransformerTemporalModel", _said(FRAMES),
        examples={"transformer_blocks.0.attn1": FRAMES},
    ),
    _of("models.unets.unet_motion_model.MotionAdapter", unets.kind_of, examples={_FRAMES: FRAMES}),
    _of("models.condition_embedders.condition_embedder_anima.AnimaTextConditioner",
        {"*.self_attn": TEXT, "*.cross_attn": CROSS}),
    _of("pipelines.ltx2.connectors.LTX2TextConnectors", {"*.attn1": TEXT}),
    _of(
        "pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior.WuerstchenPrior", unets.cascade_kind, NO_IMAGE,
        examples={"blocks.2.attention": JOINT},
    ),
    _of(
        "pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext.WuerstchenDiffNeXt", unets.cascade_kind,
        examples={"down_blocks.0.2.attention": JOINT},
    ),
]  # fmt: skip
ROLES_ONLY = [*NOTHING, *VIDEOS, *MIXED, *CONTROLS, *PIECES]
