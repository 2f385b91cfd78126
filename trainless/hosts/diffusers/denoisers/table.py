"""The table: every denoiser class of diffusers whose tokens are known, and those that are known to hold no image.

A class is found by its module and name, never by a part of it; one that is not here is refused by every method
that has to know image tokens. A subclass is read like the class that it takes its ``forward`` from.
"""

from __future__ import annotations

from typing import Any

from . import latents, packed, sequences, unets
from .latents import four, framed, one, patched, side, text_of
from .roles_only import ROLES_ONLY
from .words import CROSS, DOUBLE_AND_SINGLE, IMAGE, JOINT, REFERENCE, SELF_AND_CROSS, TEXT, Layout, qualified

ENCODED = text_of("encoder_hidden_states")


def _in(module: str, name: str, *args: Any, **more: Any) -> Layout:
    return Layout(f"diffusers.models.{module}.{name}", *args, **more)


def _flux(module: str, name: str, read: Any = packed.with_ids, **more: Any) -> Layout:
    return _in(f"transformers.{module}", name, read, DOUBLE_AND_SINGLE, four, streams=True, **more)


def _unet(module: str, name: str, **more: Any) -> Layout:
    fields = {
        "read": unets.unet, "sites": unets.kind_of, "levels": unets.Levels, "examples": unets.BLOCKS, **more,
    }  # fmt: skip
    return _in(f"unets.{module}", name, **fields)


IMAGES = [
    _unet("unet_2d_condition", "UNet2DConditionModel"),
    _unet("unet_2d", "UNet2DModel", examples={"down_blocks.0.attentions.0": IMAGE}),
    _unet("unet_dreamlite", "DreamLiteUNetModel"),
    _unet("unet_3d_condition", "UNet3DConditionModel", examples=unets.WITH_FRAMES),
    _unet("unet_motion_model", "UNetMotionModel", examples=unets.WITH_FRAMES),
    _unet("unet_i2vgen_xl", "I2VGenXLUNet", examples=unets.WITH_FRAMES),
    _unet(
        "unet_spatio_temporal_condition", "UNetSpatioTemporalConditionModel", examples=unets.WITH_FRAMES,
    ),
    _unet(
        "unet_kandinsky3", "Kandinsky3UNet", sites=unets.kandinsky3_kind, levels=unets.kandinsky3_levels,
        examples={"down_blocks.1.attentions.0.attention": IMAGE, "down_blocks.1.attentions.1.attention": CROSS},
    ),
    _unet(
        "unet_stable_cascade", "StableCascadeUNet", read=unets.stable_cascade, sites=unets.cascade_kind,
        levels=unets.cascade_levels, examples={"down_blocks.0.2.attention": JOINT},
    ),
    _in(
        "controlnets.controlnet", "ControlNetModel", unets.unet, unets.kind_of, levels=unets.Levels,
        examples=unets.BLOCKS,
    ),
    _in(
        "unets.uvit_2d", "UVit2DModel", latents.uvit,
        {"transformer_layers.*.attn1": IMAGE, "transformer_layers.*.attn2": CROSS, "*.attention_blocks.*": CROSS},
        latents.codes,
    ),
    _in("transformers.dit_transformer_2d", "DiTTransformer2DModel", patched("image"), SELF_AND_CROSS, side),
    _in("transformers.pixart_transformer_2d", "PixArtTransformer2DModel", patched("image"), SELF_AND_CROSS, side),
    _in("transformers.hunyuan_transformer_2d", "HunyuanDiT2DModel", patched("image"), SELF_AND_CROSS, side),
    _in("transformers.lumina_nextdit2d", "LuminaNextDiT2DModel", latents.lumina_next, SELF_AND_CROSS, side),
    _in("transformers.sana_transformer", "SanaTransformer2DModel", patched("image"), SELF_AND_CROSS, side, linear=True),
    _in(
        "transformers.transformer_sd3", "SD3Transformer2DModel", patched("image text", ENCODED),
        {"transformer_blocks.*.attn2": IMAGE, "transformer_blocks.*": JOINT}, side, streams=True,
    ),
    _in(
        "transformers.auraflow_transformer_2d", "AuraFlowTransformer2DModel",
        patched("text image", latents.registers_too), {"*.attn": JOINT}, side, streams=True,
    ),
    _in(
        "transformers.transformer_cogview3plus", "CogView3PlusTransformer2DModel", patched("text image", ENCODED),
        {"*.attn1": JOINT}, side, streams=True,
    ),
    _in(
        "transformers.transformer_cogview4", "CogView4Transformer2DModel", patched("text image", ENCODED),
        {"*.attn1": JOINT}, side, streams=True,
    ),
    _in(
        "transformers.transformer_glm_image", "GlmImageTransformer2DModel", latents.glm, {"*.attn1": JOINT}, side,
        streams=True,
    ),
    _in(
        "transformers.transformer_hunyuanimage", "HunyuanImageTransformer2DModel",
        patched("image text", latents.hunyuan_text), {"context_embedder.*": TEXT, **DOUBLE_AND_SINGLE}, side,
        streams=True,
    ),
    _in(
        "transformers.transformer_hidream_image", "HiDreamImageTransformer2DModel", sequences.hidream,
        {"double_stream_blocks.*": JOINT, "single_stream_blocks.*": JOINT}, side, streams=True,
    ),
    _in(
        "transformers.transformer_ernie_image", "ErnieImageTransformer2DModel", sequences.ernie,
        {"layers.*": JOINT}, side,
    ),
    _in(
        "transformers.transformer_omnigen", "OmniGenTransformer2DModel", sequences.omnigen, {"layers.*": JOINT}, side
    ),
    _in(
        "transformers.transformer_prx", "PRXTransformer2DModel", latents.prx, {"blocks.*": JOINT}, side,
        streams=True,
    ),
    _in(
        "transformers.transformer_lumina2", "Lumina2Transformer2DModel", sequences.lumina2,
        {"context_refiner.*": TEXT, "noise_refiner.*": IMAGE, "layers.*": JOINT}, side,
    ),
    _in(
        "transformers.transformer_z_image", "ZImageTransformer2DModel", sequences.z_image,
        {
            "context_refiner.*": TEXT, "siglip_refiner.*": REFERENCE, "noise_refiner.*": IMAGE, "layers.*": JOINT,
        },
        sequences.z_image_patch,
    ),
    _in(
        "transformers.transformer_bria_fibo2", "BriaFibo2Transformer2DModel", sequences.fibo2,
        {
            "perceiver.*.cross_attention": CROSS, "perceiver.*": TEXT, "noise_refiner.*": IMAGE,
            "layers.*.cross_attention": CROSS, "layers.*": JOINT,
        },
        side,
    ),
    _in(
        "transformers.transformer_ideogram4", "Ideogram4Transformer2DModel", sequences.ideogram4,
        {"layers.*": JOINT}, four,
    ),
    _in(
        "transformers.transformer_krea2", "Krea2Transformer2DModel", packed.krea2,
        {"text_fusion.*": TEXT, "transformer_blocks.*": JOINT}, four,
    ),
    _flux("transformer_flux", "FluxTransformer2DModel"),
    _flux("transformer_chroma", "ChromaTransformer2DModel"),
    _flux("transformer_bria", "BriaTransformer2DModel"),
    _flux("transformer_bria_fibo", "BriaFiboTransformer2DModel"),
    _flux("transformer_longcat_image", "LongCatImageTransformer2DModel"),
    _flux("transformer_ovis_image", "OvisImageTransformer2DModel"),
    _flux("transformer_flux2", "Flux2Transformer2DModel", packed.flux2, several=True),
    _in(
        "transformers.transformer_flux3", "Flux3Transformer2DModel", packed.flux3,
        {
            "mode_blocks.image.*": IMAGE, "mode_blocks.*": REFERENCE, "txt_mode_blocks.*": TEXT,
            "single_transformer_blocks.*": JOINT,
        },
        four,
    ),
    _in(
        "transformers.transformer_qwenimage", "QwenImageTransformer2DModel", packed.with_shapes("text image"),
        {"transformer_blocks.*": JOINT}, four, streams=True,
    ),
    _in(
        "transformers.transformer_qwenimage21", "QwenImage21Transformer2DModel", sequences.qwen21,
        {"transformer_blocks.*": JOINT}, four, several=True,
    ),
    _in(
        "transformers.transformer_nucleusmoe_image", "NucleusMoEImageTransformer2DModel",
        packed.with_shapes("image text"), {"transformer_blocks.*": JOINT}, four, streams=True,
    ),
]  # fmt: skip

# Classes that diffusers files under video; with one frame they paint an image.
ONE_FRAME = [
    _in(
        "transformers.transformer_joyimage", "JoyImageEditTransformer3DModel", latents.joy,
        {"double_blocks.*": JOINT}, side, streams=True, frames=True,
    ),
    _in(
        "transformers.transformer_joyimage_edit_plus", "JoyImageEditPlusTransformer3DModel", packed.joy_plus,
        {"double_blocks.*": JOINT}, side, streams=True, frames=True,
    ),
    _in(
        "transformers.transformer_kandinsky", "Kandinsky5Transformer3DModel", latents.kandinsky5,
        {"text_transformer_blocks.*": TEXT, "*.self_attention": IMAGE, "*.cross_attention": CROSS}, side,
        frames=True,
    ),
    _in(
        "transformers.transformer_wan", "WanTransformer3DModel", framed("image"), SELF_AND_CROSS, side, frames=True
    ),
    _in(
        "transformers.transformer_cosmos", "CosmosTransformer3DModel", framed("image"), SELF_AND_CROSS, side,
        frames=True,
    ),
    _in(
        "transformers.transformer_allegro", "AllegroTransformer3DModel", framed("image"), SELF_AND_CROSS, side,
        frames=True,
    ),
    _in(
        "transformers.latte_transformer_3d", "LatteTransformer3DModel", latents.frames_apart,
        {"temporal_transformer_blocks.*": "frames", "*.attn1": IMAGE, "*.attn2": CROSS}, side,
    ),
    _in(
        "transformers.transformer_sana_video", "SanaVideoTransformer3DModel", framed("image"), SELF_AND_CROSS, side,
        frames=True, linear=True,
    ),
    _in(
        "transformers.transformer_ltx", "LTXVideoTransformer3DModel", packed.ltx, SELF_AND_CROSS, one, frames=True
    ),
    _in(
        "transformers.cogvideox_transformer_3d", "CogVideoXTransformer3DModel",
        framed("text image", ENCODED, axis=1), {"*.attn1": JOINT}, side, streams=True, frames=True,
    ),
    _in(
        "transformers.transformer_easyanimate", "EasyAnimateTransformer3DModel",
        framed("text image", text_of("encoder_hidden_states", "encoder_hidden_states_t5")), {"*.attn1": JOINT}, side,
        streams=True, frames=True,
    ),
    _in(
        "transformers.transformer_mochi", "MochiTransformer3DModel", sequences.mochi, {"*.attn1": JOINT}, side,
        streams=True, several=True, frames=True,
    ),
    _in(
        "transformers.transformer_hunyuan_video", "HunyuanVideoTransformer3DModel", framed("image text", ENCODED),
        {"context_embedder.*": TEXT, **DOUBLE_AND_SINGLE}, side, streams=True, frames=True,
    ),
    _in(
        "transformers.transformer_hunyuan_video15", "HunyuanVideo15Transformer3DModel", sequences.hunyuan_video15,
        {"context_embedder.*": TEXT, "transformer_blocks.*": JOINT}, side, streams=True, frames=True,
    ),
]  # fmt: skip

TABLE = {layout.name: layout for layout in (*IMAGES, *ONE_FRAME, *ROLES_ONLY)}


def layout_of(model: Any) -> Layout | None:
    """What is declared about the class of ``model``, or about the one whose ``forward`` it has; None: nothing."""
    for kind in type(model).__mro__:
        found = TABLE.get(qualified(kind))
        if found is not None:
            return found if type(model).forward is kind.forward else None  # type: ignore[attr-defined]
    return None
