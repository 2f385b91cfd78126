"""How each pipeline and denoiser class of diffusers counts pixels: a table, declared class by class.

A row says what size a pipeline makes when it is not told one, and how many image tokens (of a transformer) or
latents (of a UNet) its denoiser then gets. Two pipelines with a ``vae_scale_factor`` of 16 need not mean the same
by it, so nothing here is found out from an attribute that happens to be there. A class that has no row is unknown.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import nn

from ...errors import Unsupported

Size = tuple[int, int]


@dataclass(frozen=True)
class SizeRow:
    """One way of counting.

    default: (height, width) in pixels that the pipeline makes when it is not told; None where the size is that of
    a picture it is given. count: (pipeline, denoiser, pixels) -> tokens or latents along one side. observe: whose
    own code makes the latents, so that the row can be compared with it; see ``diffusers_sizes``. axes: where the
    latents that it makes have their rows and columns, when they have such axes.
    """

    default: Callable[[Any, Any], Any] | None
    count: Callable[[Any, Any, int], int]
    observe: str = ""
    axes: Size = (-2, -1)

    @property
    def in_latents(self) -> bool:
        """Whether latents are counted, whose tokens differ from level to level, and not tokens."""
        return self.count in _IN_LATENTS


# ---------------------------------------------------------------- sizes that pipelines make when they are not told


def _sides(size: Any, pixels: int) -> Size | None:
    """A side or (rows, columns) of so many pixels each; None where a config says nothing."""
    if size is None:
        return None
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows * pixels, columns * pixels


def _own(pipeline: Any, denoiser: nn.Module) -> Size | None:
    return _sides(pipeline.default_sample_size, pipeline.vae_scale_factor)


def _configured(pipeline: Any, denoiser: Any) -> Size | None:
    return _sides(denoiser.config.sample_size, pipeline.vae_scale_factor)


def _configured_pixels(pipeline: Any, denoiser: Any) -> Size | None:
    return _sides(denoiser.config.sample_size, 1)


def _configured_autoencoder(pipeline: Any, denoiser: Any) -> Size | None:
    return _sides(denoiser.config.sample_size, _factor(pipeline))


def _signature(pipeline: Any, denoiser: nn.Module) -> Size:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return parameters["height"].default, parameters["width"].default


def _resolution(pipeline: Any, denoiser: nn.Module) -> Size | None:
    return _sides(inspect.signature(type(pipeline).__call__).parameters["output_resolution"].default, 1)


def _prx(pipeline: Any, denoiser: nn.Module) -> Size | None:
    return _sides(pipeline.config.default_sample_size or _PRX[type(pipeline).__name__], 1)


_PRX = {"PRXPipeline": 512, "PRXPixelPipeline": 1024}  # where a pipeline's config states no size


def _1024(pipeline: Any, denoiser: nn.Module) -> Size:
    return 1024, 1024


# ---------------------------------------------------------------- what the denoiser gets


def autoencoder_factor(pipeline: Any) -> int | None:
    """Pixels per latent of the pipeline's autoencoder, where its class is one whose config says it."""
    for name in ("vae", "movq", "vqvae"):
        vae: Any = getattr(pipeline, name, None)
        if type(vae) in (diffusers.AutoencoderKL, diffusers.VQModel):
            return int(2 ** (len(vae.config.block_out_channels) - 1))
    return None


def _factor(pipeline: Any) -> int:
    found = autoencoder_factor(pipeline)
    if found is None:
        raise Unsupported(
            f"{type(pipeline).__name__} has no autoencoder of a class whose config says how many pixels a latent "
            "is; load it, or give the pipeline the one that it was made with"
        )
    return found


def patch_side(denoiser: Any) -> int:
    """Latents along one side of a token, as the transformer's config states it."""
    config = denoiser.config
    if "all_patch_size" in config:  # Z-Image could have several, its pipelines use the first
        return int(config.all_patch_size[0])
    size = config.patch_size
    return int(size if isinstance(size, int) else size[-1])


def _latents(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return pixels // int(pipeline.vae_scale_factor)


def _patches(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return pixels // int(pipeline.vae_scale_factor) // patch_side(denoiser)


def _frame(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return pixels // int(pipeline.vae_scale_factor_spatial) // patch_side(denoiser)


def _pairs(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    """The pipeline lays 2 × 2 latents into a token, or the transformer does and the pipeline rounds to it."""
    return pixels // (int(pipeline.vae_scale_factor) * 2)


def _laid(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return pixels // (int(pipeline.vae_scale_factor) * int(pipeline.patch_size))


def _moe(pipeline: Any, denoiser: Any, pixels: int) -> int:
    return pixels // (int(pipeline.vae_scale_factor) * patch_side(denoiser))


def _counted_in(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    """The pipeline's factor is that of tokens already: packing is counted in."""
    return pixels // int(pipeline.vae_scale_factor)


def _even(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return 2 * (pixels // (int(pipeline.vae_scale_factor) * 2))


def _pixels(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return pixels


def _of_autoencoder(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return pixels // _factor(pipeline) // patch_side(denoiser)


def _movq(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    factor = _factor(pipeline)
    return -(-pixels // factor**2) * factor


def _movq3(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return -(-pixels // 64) * 8


def _cascade_prior(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    return math.ceil(pixels / pipeline.config.resolution_multiple)


def _cascade_decoder(pipeline: Any, denoiser: nn.Module, pixels: int) -> int:
    # The decoder is told no size, it gets the prior's latents: those of the prior's own default multiple.
    return int(math.ceil(pixels / 42.67) * pipeline.config.latent_dim_scale)


def _uvit(pipeline: Any, denoiser: Any, pixels: int) -> int:
    return pixels // int(pipeline.vae_scale_factor) // (2 if denoiser.config.downsample else 1)


_IN_LATENTS = frozenset({_latents, _pixels, _movq, _movq3, _cascade_prior, _cascade_decoder})

# ---------------------------------------------------------------- the rows


def _of(row: SizeRow, *names: str) -> dict[str, SizeRow]:
    return dict.fromkeys(names, row)


PIPELINES: Mapping[str, SizeRow] = {
    # UNets on the latents of an autoencoder
    **_of(
        SizeRow(_configured, _latents, "StableDiffusionPipeline"),
        "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline", "StableDiffusionAdapterPipeline",
        "StableDiffusionPAGPipeline", "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline", "StableDiffusionControlNetPAGInpaintPipeline",
        "StableDiffusionImageVariationPipeline", "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionDepth2ImgPipeline", "StableUnCLIPImg2ImgPipeline", "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline", "StableDiffusionSAGPipeline",
        "StableDiffusionAttendAndExcitePipeline", "StableDiffusionGLIGENPipeline",
        "StableDiffusionControlNetXSPipeline", "SemanticStableDiffusionPipeline",
    ),
    **_of(
        SizeRow(_own, _latents, "StableDiffusionXLPipeline"),
        "StableDiffusionXLPipeline", "StableDiffusionXLAdapterPipeline", "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLInstructPix2PixPipeline", "KolorsPipeline",
        "KolorsPAGPipeline",
    ),
    **_of(
        SizeRow(_configured, _latents, "StableDiffusionXLPipeline"),
        "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "KolorsImg2ImgPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline", "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline", "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline", "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline", "StableDiffusionXLControlNetXSPipeline",
        "StableDiffusionXLControlNetPipeline",
    ),
    **_of(SizeRow(_configured, _latents), "LDMTextToImagePipeline"),
    **_of(SizeRow(_own, _latents, "DreamLitePipeline"), "DreamLitePipeline", "DreamLiteMobilePipeline"),
    **_of(
        SizeRow(_signature, _movq, "downscale_height_and_width"),
        "KandinskyPipeline", "KandinskyImg2ImgPipeline", "KandinskyInpaintPipeline", "KandinskyV22Pipeline",
        "KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline", "KandinskyV22ControlnetPipeline",
        "KandinskyV22ControlnetImg2ImgPipeline",
    ),
    **_of(
        SizeRow(_signature, _movq), "KandinskyCombinedPipeline", "KandinskyImg2ImgCombinedPipeline",
        "KandinskyInpaintCombinedPipeline", "KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline",
        "KandinskyV22InpaintCombinedPipeline",
    ),
    **_of(SizeRow(_signature, _movq3, "downscale_height_and_width"), "Kandinsky3Pipeline"),
    **_of(SizeRow(_signature, _cascade_prior, "StableCascadePriorPipeline"), "StableCascadePriorPipeline"),
    **_of(SizeRow(None, _cascade_decoder), "StableCascadeDecoderPipeline"),
    # UNets on pixels
    **_of(SizeRow(_configured_pixels, _pixels, "IFPipeline"), "IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"),
    **_of(SizeRow(_configured_pixels, _pixels), "DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline"),
    # Transformers that are given latents
    **_of(
        SizeRow(_own, _patches, "StableDiffusion3Pipeline"),
        "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline",
    ),
    **_of(SizeRow(_configured, _patches, "PixArtAlphaPipeline"), "PixArtAlphaPipeline"),
    **_of(SizeRow(_configured, _patches, "PixArtSigmaPipeline"), "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"),
    **_of(
        SizeRow(_own, _patches, "HunyuanDiTPipeline"),
        "HunyuanDiTPipeline", "HunyuanDiTPAGPipeline", "HunyuanDiTControlNetPipeline",
    ),
    **_of(SizeRow(_own, _patches, "LuminaPipeline"), "LuminaPipeline"),
    **_of(SizeRow(_own, _pairs, "Lumina2Pipeline"), "Lumina2Pipeline"),
    **_of(SizeRow(_configured, _patches, "CogView3PlusPipeline"), "CogView3PlusPipeline"),
    **_of(SizeRow(_configured, _patches, "CogView4Pipeline"), "CogView4Pipeline", "CogView4ControlPipeline"),
    **_of(SizeRow(None, _patches, "GlmImagePipeline"), "GlmImagePipeline"),
    **_of(SizeRow(_signature, _patches, "AuraFlowPipeline"), "AuraFlowPipeline"),
    **_of(SizeRow(_own, _patches, "HunyuanImagePipeline"), "HunyuanImagePipeline"),
    **_of(SizeRow(_own, _pairs, "HiDreamImagePipeline"), "HiDreamImagePipeline"),
    **_of(SizeRow(_own, _patches, "OmniGenPipeline"), "OmniGenPipeline"),
    **_of(SizeRow(_own, _patches, "BriaFibo2Pipeline"), "BriaFibo2Pipeline"),
    **_of(SizeRow(_prx, _patches, "PRXPipeline"), "PRXPipeline"),
    **_of(SizeRow(_prx, _patches, "PRXPixelPipeline"), "PRXPixelPipeline"),
    **_of(SizeRow(_1024, _pairs, "ZImagePipeline"), "ZImagePipeline", "ZImageImg2ImgPipeline",
          "ZImageInpaintPipeline", "ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline",
          "ZImageOmniPipeline"),
    **_of(SizeRow(_configured_autoencoder, _of_autoencoder), "DiTPipeline"),
    **_of(SizeRow(_configured, _uvit), "AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline"),
    **_of(SizeRow(_signature, _frame, "Kandinsky5T2IPipeline", (2, 3)), "Kandinsky5T2IPipeline"),
    **_of(SizeRow(_signature, _frame, "Cosmos2TextToImagePipeline"), "Cosmos2TextToImagePipeline"),
    # Video pipelines: with one frame they paint an image, and none says at what size images were trained
    **_of(SizeRow(None, _frame, "WanPipeline"), "WanPipeline"),
    **_of(SizeRow(None, _frame, "HunyuanVideoPipeline"), "HunyuanVideoPipeline"),
    **_of(SizeRow(None, _frame, "HunyuanVideo15Pipeline"), "HunyuanVideo15Pipeline"),
    **_of(SizeRow(None, _frame, "CogVideoXPipeline"), "CogVideoXPipeline"),
    **_of(SizeRow(None, _frame, "AllegroPipeline"), "AllegroPipeline"),
    **_of(SizeRow(None, _frame, "JoyImageEditPipeline"), "JoyImageEditPipeline"),
    # Video pipelines whose layers take every frame for an image
    **_of(
        SizeRow(_configured, _latents, "AnimateDiffPipeline"),
        "AnimateDiffPipeline", "AnimateDiffPAGPipeline", "AnimateDiffControlNetPipeline",
        "AnimateDiffVideoToVideoPipeline",
    ),
    **_of(SizeRow(_configured, _latents, "AnimateDiffSDXLPipeline"), "AnimateDiffSparseControlNetPipeline"),
    **_of(SizeRow(_own, _latents, "AnimateDiffSDXLPipeline"), "AnimateDiffSDXLPipeline"),
    **_of(SizeRow(_signature, _latents, "StableVideoDiffusionPipeline"), "StableVideoDiffusionPipeline"),
    **_of(SizeRow(_configured, _latents, "TextToVideoSDPipeline"), "TextToVideoSDPipeline"),
    **_of(SizeRow(_signature, _patches, "LattePipeline"), "LattePipeline"),
    # Transformers that are given tokens
    **_of(
        SizeRow(_own, _pairs, "FluxPipeline"),
        "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlPipeline",
        "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline", "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline", "FluxFillPipeline",
        "FluxKontextPipeline", "FluxKontextInpaintPipeline",
    ),
    **_of(
        SizeRow(_own, _pairs, "Flux2Pipeline"),
        "Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline",
    ),
    **_of(SizeRow(_own, _pairs, "ChromaPipeline"), "ChromaPipeline", "ChromaInpaintPipeline"),
    **_of(SizeRow(_own, _pairs), "ChromaImg2ImgPipeline"),
    **_of(
        SizeRow(_own, _pairs, "QwenImagePipeline"),
        "QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline", "QwenImageEditPipeline", "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
    ),
    **_of(SizeRow(_resolution, _even, "QwenImage21Pipeline"), "QwenImage21Pipeline"),
    **_of(SizeRow(_own, _pairs, "OvisImagePipeline"), "OvisImagePipeline"),
    **_of(SizeRow(_own, _pairs, "LongCatImagePipeline"), "LongCatImagePipeline", "LongCatImageEditPipeline"),
    **_of(SizeRow(_own, _moe, "NucleusMoEImagePipeline"), "NucleusMoEImagePipeline"),
    **_of(SizeRow(_signature, _laid, "Krea2Pipeline"), "Krea2Pipeline"),
    **_of(SizeRow(_signature, _laid), "Ideogram4Pipeline"),
    **_of(SizeRow(_own, _counted_in, "BriaPipeline"), "BriaPipeline"),
    **_of(SizeRow(_own, _counted_in, "BriaFiboPipeline"), "BriaFiboPipeline"),
    **_of(SizeRow(_1024, _counted_in, "BriaFiboEditPipeline"), "BriaFiboEditPipeline"),
    **_of(SizeRow(_signature, _counted_in), "ErnieImagePipeline"),
}  # fmt: skip

# Denoisers on their own, without the pipeline that has their autoencoder. Listed are classes of which every model
# that is published paints so many pixels per token, or per latent; a UNet2DConditionModel may have 8, 4 or 1.
PER_TOKEN: Mapping[str, int] = dict.fromkeys(
    (
        "FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel", "BriaTransformer2DModel",
        "BriaFiboTransformer2DModel", "BriaFibo2Transformer2DModel", "QwenImageTransformer2DModel",
        "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel", "NucleusMoEImageTransformer2DModel",
        "Krea2Transformer2DModel", "Ideogram4Transformer2DModel", "ErnieImageTransformer2DModel",
        "ZImageTransformer2DModel", "Flux3Transformer2DModel", "QwenImage21Transformer2DModel",
    ),
    16,
)  # fmt: skip
PER_LATENT: Mapping[str, int] = dict.fromkeys(
    (
        "SD3Transformer2DModel", "AuraFlowTransformer2DModel", "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel", "GlmImageTransformer2DModel", "HunyuanDiT2DModel", "LuminaNextDiT2DModel",
        "Lumina2Transformer2DModel", "HiDreamImageTransformer2DModel", "OmniGenTransformer2DModel",
        "DiTTransformer2DModel", "JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel",
        "Kandinsky5Transformer3DModel", "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel",
        "MochiTransformer3DModel", "AllegroTransformer3DModel", "LatteTransformer3DModel",
        "Kandinsky3UNet", "DreamLiteUNetModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel",
        "UNet3DConditionModel", "I2VGenXLUNet",
    ),
    8,
)  # fmt: skip
# Denoisers whose config's ``sample_size`` is the size of training in latents: the one that their pipelines make.
STATE_THEIR_SIZE = frozenset(
    {
        "UNet2DConditionModel", "UNet2DModel", "UNetMotionModel", "UNet3DConditionModel", "UVit2DModel",
        "SD3Transformer2DModel", "PixArtTransformer2DModel",
        "DiTTransformer2DModel", "HunyuanDiT2DModel", "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel", "LuminaNextDiT2DModel", "Lumina2Transformer2DModel",
    }
)  # fmt: skip


def row_of(pipeline: Any) -> SizeRow | None:
    """The row of a pipeline's class, or of the class that it extends without making images in another way."""
    for kind in type(pipeline).__mro__:
        if kind.__name__ in PIPELINES and getattr(diffusers, kind.__name__, None) is kind:
            own = {"__call__", "prepare_latents", "prepare_intermediate_images"} & _changed(
                type(pipeline), kind
            )
            return None if own else PIPELINES[kind.__name__]
    return None


def _changed(kind: type, base: type) -> set[str]:
    """What ``kind`` and the classes between it and ``base`` define."""
    return {name for cls in kind.__mro__[: kind.__mro__.index(base)] for name in vars(cls)}


def is_listed(denoiser: nn.Module, names: Any) -> bool:
    """Whether the denoiser's very class is among these names of diffusers."""
    kind = type(denoiser)
    return kind.__name__ in names and getattr(diffusers, kind.__name__, None) is kind


def module_function(kind: type, name: str) -> Callable[..., Any] | None:
    """A function that stands beside a pipeline class in its file."""
    found: Callable[..., Any] | None = getattr(sys.modules[kind.__module__], name, None)
    return found
