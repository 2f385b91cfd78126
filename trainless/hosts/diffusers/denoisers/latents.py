"""Denoisers that are given the latent image whole, (B, C, rows, columns) or with frames, and cut it into patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .words import IMAGE, JOINT, Geometry, Given, Part, Read, Sequence, Size, Unknown, product

Count = Callable[[Any, Given], int]


def tensor(given: Given, name: str) -> Tensor:
    value = given.get(name)
    if not isinstance(value, Tensor):
        raise Unknown(f"the call of the denoiser has no tensor {name}")
    return value


def length(given: Given, *names: str, axis: int = 1) -> int:
    """Tokens of the tensor arguments ``names`` that are there, together."""
    return sum(given[name].shape[axis] for name in names if isinstance(given.get(name), Tensor))


def text_of(*names: str) -> Count:
    return lambda model, given: length(given, *names)


def no_text(model: Any, given: Given) -> int:
    return 0


# ---------------------------------------------------------------- latent pixels per token


def side(model: Any) -> Size:
    """``patch_size`` of the config: a side, (rows, columns) or (frames, rows, columns)."""
    size = model.config.patch_size
    return (int(size), int(size)) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def one(model: Any) -> Size:
    return 1, 1


def four(model: Any) -> Size:
    """A pipeline packs 2 × 2 latent pixels into a token before the model sees them."""
    return 2, 2


def grid_of(sample: Size, patch: Size) -> Size:
    return sample[0] // patch[0], sample[1] // patch[1]


# ---------------------------------------------------------------- what a call says


def ordered(order: str, grid: Size, text: int, beside: tuple[Part, ...] = (), **more: Any) -> Geometry:
    """One image and its text. order: "image text", "text image", or "image" alone with text as others' keys."""
    image = Part(IMAGE, product(grid) * more.pop("grids", 1))
    words = (Part("text", text),) if text else ()
    parts = {"image text": (image, *beside, *words), "text image": (*words, image, *beside)}
    found = {IMAGE: (Sequence((image, *beside), grid),)}
    if order in parts:
        found[JOINT] = (Sequence(parts[order], grid),)
    return Geometry(sequences=found, **more)


def patched(order: str, text: Count = no_text, patch: Callable[[Any], Size] = side) -> Read:
    """A class that cuts ``hidden_states`` (B, C, rows, columns) into patches, row by row."""

    def read(model: Any, given: Given) -> Geometry:
        hidden = tensor(given, "hidden_states")
        if hidden.dim() == 5:
            return one_frame(model, given)
        if hidden.dim() != 4:
            raise Unknown(f"hidden_states are {hidden.dim()}-D, and this class is read with 4-D latents")
        sample = hidden.shape[-2], hidden.shape[-1]
        return ordered(order, grid_of(sample, patch(model)), text(model, given), sample=sample)

    one_frame = framed(order, text, patch)
    return read


def framed(
    order: str, text: Count = no_text, patch: Callable[[Any], Size] = side, axis: int = 2, size: int = 3
) -> Read:
    """A video class, given one frame. axis: where the frames stand, size: where rows and columns begin."""

    def read(model: Any, given: Given) -> Geometry:
        hidden = tensor(given, "hidden_states")
        if hidden.dim() != 5:
            raise Unknown(f"hidden_states are {hidden.dim()}-D, and this class is read with 5-D latents")
        sample = hidden.shape[size], hidden.shape[size + 1]
        single_frame(hidden.shape[axis])
        return ordered(order, grid_of(sample, patch(model)), text(model, given), sample=sample)

    return read


def single_frame(frames: int) -> None:
    if frames != 1:
        raise Unknown(
            f"the call has {frames} frames, and how many were trained on is not known; one frame is an image"
        )


def frames_apart(model: Any, given: Given) -> Geometry:
    """Latte: its spatial layers take every frame for an image of the batch."""
    hidden = tensor(given, "hidden_states")
    sample = hidden.shape[-2], hidden.shape[-1]
    return ordered("image", grid_of(sample, side(model)), 0, sample=sample)


# ---------------------------------------------------------------- single classes


def registers_too(model: Any, given: Given) -> int:
    """AuraFlow: learned register tokens stand before the text."""
    return length(given, "encoder_hidden_states") + int(model.register_tokens.shape[1])


def hunyuan_text(model: Any, given: Given) -> int:
    """HunyuanImage: a second text encoder's tokens count where the model has a place for them."""
    second = getattr(model, "context_embedder_2", None) is not None
    return length(given, "encoder_hidden_states", *(("encoder_hidden_states_2",) if second else ()))


def lumina_next(model: Any, given: Given) -> Geometry:
    found = patched("image")(model, given)
    own = (given.get("cross_attention_kwargs") or {}).get("base_sequence_length")
    if own is None:
        return found
    said = (
        f"the pipeline already scales logits with the image's size (base_sequence_length={own}); call it with "
        "proportional_attn=False"
    )
    return Geometry(found.sample, found.sequences, scaled=said)


def joy(model: Any, given: Given) -> Geometry:
    """JoyImage: of several images the last is the one that is edited; the model puts it first, the text last."""
    hidden = tensor(given, "hidden_states")
    if hidden.dim() not in (5, 6):
        raise Unknown(f"hidden_states are {hidden.dim()}-D, and this class is read with 5-D or 6-D latents")
    single_frame(hidden.shape[-3])
    sample = hidden.shape[-2], hidden.shape[-1]
    grid = grid_of(sample, side(model))
    others = (hidden.shape[1] - 1 if hidden.dim() == 6 else 0) * product(grid)
    beside = (Part("reference", others),) if others else ()
    return ordered("image text", grid, length(given, "encoder_hidden_states"), beside, sample=sample)


def kandinsky5(model: Any, given: Given) -> Geometry:
    """Channels stand last. With sparse attention the tokens lie in blocks of 8 × 8, so they are no grid of rows."""
    found = framed("image", axis=1, size=2)(model, given)
    if not (given.get("sparse_params") or {}).get("to_fractal"):
        return found
    blocks = {kind: tuple(Sequence(s.parts) for s in some) for kind, some in found.sequences.items()}
    return Geometry(found.sample, blocks)


def glm(model: Any, given: Given) -> Geometry:
    """GLM-Image: a call that writes its cache reads a reference image, later ones see the cached keys first."""
    found = patched("text image", text_of("encoder_hidden_states"))(model, given)
    cache = given.get("kv_caches")
    if cache is None or cache[0].mode not in ("write", "read"):
        return found
    (own,) = found.sequences[JOINT]
    if cache[0].mode == "write":
        parts = tuple(Part("reference" if p.what == IMAGE else p.what, p.tokens) for p in own.parts)
        return Geometry(found.sample, {JOINT: (Sequence(parts),)})
    held = [keys.shape[1] for keys in cache[0].k_caches]
    if len(set(held)) > 1:
        raise Unknown(f"the rows have references of different sizes in their cache ({held} keys)")
    cached = (Part("reference", held[0], rows=False),) if held else ()
    return Geometry(found.sample, {JOINT: (Sequence((*cached, *own.parts), own.grid),)})


def uvit(model: Any, given: Given) -> Geometry:
    """aMUSEd: one token for each code of the image, or for 2 × 2 of them."""
    ids = tensor(given, "input_ids")
    sample = ids.shape[-2], ids.shape[-1]
    return ordered("image", grid_of(sample, codes(model)), 0, sample=sample)


def codes(model: Any) -> Size:
    return (2, 2) if model.config.downsample else (1, 1)


def prx(model: Any, given: Given) -> Geometry:
    """PRX: text has keys only, and they stand first."""
    found = patched("image")(model, given)
    (own,) = found.sequences[IMAGE]
    text = Part("text", length(given, "encoder_hidden_states"), rows=False)
    return Geometry(found.sample, {JOINT: (Sequence((text, *own.parts), own.grid),)})
