"""Probes for denoisers: one call at the trained size and one at a larger size, from the model's config."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...errors import Unsupported
from ...seams import Site
from ..probes import Draw, Probe

TEXT = 12  # prompt tokens
TIMESTEP = 900.0  # of 1000: early in a run, where methods that act on some steps only do
SMALL = (32, 32)  # latent size for a model that does not say what it was trained at
SQUARE = {"DiTTransformer2DModel"}  # classes that take the root of the number of tokens for either side
SMALL_UNET = (32, 24)  # latents of a call that is computed in full
SMALL_GRID = (24, 16)  # the same for a transformer, in image tokens


def probes(part: Any, sites: Sequence[Site], tokens: int) -> list[Probe]:
    owners = dict.fromkeys(site.facts["denoiser"] for site in sites if "denoiser" in site.facts)
    found = []
    for owner in owners or [part.module]:
        own = [site for site in sites if site.facts.get("denoiser") in (owner, None)]
        found += _of(owner, next((s.facts.get("trained_latent") for s in own), None))
    return found


def dense(part: Any, sites: Sequence[Site], tokens: int) -> list[Probe]:
    """Calls of a few hundred tokens, whatever the model was trained at."""
    found = []
    for model, inputs in small_inputs(part, sites):
        rows, columns = _small_size(model, sites)
        found.append(Probe(f"latents of {rows}×{columns}", _runner(model, inputs), short=f"{rows}×{columns}"))
    return found


def small_inputs(part: Any, sites: Sequence[Site]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Each denoiser that one of ``sites`` belongs to, with the arguments of a small call that is not square."""
    owners = dict.fromkeys(site.facts["denoiser"] for site in sites if "denoiser" in site.facts)
    return [(owner, _inputs(owner, *_small_size(owner, sites))) for owner in owners or [part.module]]


def _small_size(model: nn.Module, sites: Sequence[Site]) -> tuple[int, int]:
    """Latents of a call whose image tokens are SMALL_GRID, or as many of them as the model has positions for."""
    own = [s for s in sites if s.facts.get("denoiser") in (model, None)]
    patch = next((s.facts["patch"] for s in own if s.facts.get("patch")), None)
    if patch is None:
        return SMALL_UNET
    if type(model).__name__ in SQUARE:
        return SMALL_GRID[1] * patch[0], SMALL_GRID[1] * patch[1]
    rows, columns = SMALL_GRID[0] * patch[0], SMALL_GRID[1] * patch[1]
    limit = _config(model, "pos_embed_max_size")
    if isinstance(limit, int):
        rows, columns = min(rows, limit * patch[0]), min(columns, max(1, limit - 1) * patch[1])
    return rows, columns


def _of(model: nn.Module, trained: tuple[int, int] | None) -> list[Probe]:
    base = trained or SMALL
    made = []
    for rows, columns, said in ((*base, "trained size" if trained else "small"), (*_other(model, base), "")):
        size = f"{rows}×{columns}"
        name = f"latents of {size}" + (f" ({said})" if said else "")
        made.append(Probe(name, _runner(model, _inputs(model, rows, columns)), short=f"{size} latents"))
    return made


def _runner(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return lambda: model(**inputs)


def _other(model: nn.Module, base: tuple[int, int]) -> tuple[int, int]:
    """A larger size, not square; a smaller one where the model's position table ends before that."""
    rows = max(base[0] + 8, (base[0] * 3 // 2) // 8 * 8)
    limit, patch = _config(model, "pos_embed_max_size"), _config(model, "patch_size")
    if isinstance(limit, int) and isinstance(patch, int) and rows > limit * patch:
        rows = max(patch, base[0] // 2 // patch * patch)
    return rows, rows if type(model).__name__ in SQUARE else base[1]


def _config(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _inputs(model: nn.Module, rows: int, columns: int) -> dict[str, Any]:
    """Arguments for one call; Unsupported when the model asks for something that its config does not explain."""
    takes = dict(list(inspect.signature(type(model).forward).parameters.items())[1:])
    draw = Draw(model)
    given: dict[str, Any] = {}
    packed = "img_ids" in takes
    channels = _need(model, "in_channels")
    if "sample" in takes:
        given["sample"] = draw.normal(1, channels, rows, columns)
    elif packed:
        tall, wide = rows // 2, columns // 2
        given["hidden_states"] = draw.normal(1, tall * wide, channels)
        given["img_ids"] = _image_ids(tall, wide, draw)
        given["txt_ids"] = draw.full(0, TEXT, 3)
    elif "hidden_states" in takes:
        given["hidden_states"] = draw.normal(1, channels, rows, columns)
    given["timestep"] = draw.full(TIMESTEP / 1000 if packed else TIMESTEP, 1)
    width = _text_width(model)
    if "encoder_hidden_states" in takes and width is not None:
        given["encoder_hidden_states"] = draw.normal(1, TEXT, width)
    if "encoder_attention_mask" in takes and "sample" not in takes:
        given["encoder_attention_mask"] = draw.full(1, 1, TEXT)
    if "pooled_projections" in takes:
        given["pooled_projections"] = draw.normal(1, _need(model, "pooled_projection_dim"))
    if "guidance" in takes and _config(model, "guidance_embeds"):
        given["guidance"] = draw.full(3.5, 1)
    if "class_labels" in takes and _classes(model):
        given["class_labels"] = torch.zeros(1, dtype=torch.long, device=draw.device)
    if "added_cond_kwargs" in takes:
        given["added_cond_kwargs"] = _conditions(model, rows, columns, draw)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [n for n, p in takes.items() if p.default is inspect.Parameter.empty and p.kind not in variable]
    missing = [name for name in needed if name not in given]
    if missing:
        raise _unknown(model, missing[0])
    return given


def _image_ids(rows: int, columns: int, draw: Draw) -> Any:
    ids = draw.full(0, rows, columns, 3)
    ids[..., 1] += torch.arange(rows, device=draw.device, dtype=draw.dtype)[:, None]
    ids[..., 2] += torch.arange(columns, device=draw.device, dtype=draw.dtype)
    return ids.reshape(-1, 3)


def _text_width(model: nn.Module) -> int | None:
    kind = _config(model, "encoder_hid_dim_type")
    if kind not in (None, "text_proj"):
        raise _unknown(model, f"encoder_hid_dim_type={kind!r}")
    names = ("encoder_hid_dim", "joint_attention_dim", "caption_channels", "cross_attention_dim")
    widths = (_config(model, name) for name in names)
    return next((w for w in widths if isinstance(w, int)), None)


def _classes(model: nn.Module) -> bool:
    kind = _config(model, "class_embed_type")
    if kind not in (None, "timestep"):
        raise _unknown(model, f"class_embed_type={kind!r}")
    return bool(_config(model, "num_class_embeds")) or _config(model, "norm_type") == "ada_norm_zero"


def _conditions(model: nn.Module, rows: int, columns: int, draw: Draw) -> dict[str, Any]:
    """What the pipelines of SDXL and PixArt add: sizes in pixels, and a pooled prompt."""
    kind = _config(model, "addition_embed_type")
    height, width = float(rows * 8), float(columns * 8)
    sizes = torch.tensor([[height, width]], device=draw.device, dtype=draw.dtype)
    if kind == "text_time":
        table = 6 * int(_need(model, "addition_time_embed_dim"))
        pooled = int(_need(model, "projection_class_embeddings_input_dim")) - table
        corners = torch.zeros_like(sizes)
        return {"text_embeds": draw.normal(1, pooled), "time_ids": torch.cat([sizes, corners, sizes], 1)}
    if kind is not None:
        raise _unknown(model, f"addition_embed_type={kind!r}")
    if _config(model, "use_additional_conditions"):
        return {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
    return {"resolution": None, "aspect_ratio": None}


def _need(model: nn.Module, name: str) -> Any:
    value = _config(model, name)
    if value is None:
        raise _unknown(model, name)
    return value


def _unknown(model: nn.Module, what: str) -> Unsupported:
    return Unsupported(
        f"what to feed a {type(model).__name__} is not known ({what}); "
        "give probe=, a dictionary of its inputs or a function of the model"
    )
