"""Host for diffusers: finds the attention modules of denoisers and routes them into the engine.

Two hooks stand at each patched attention module and two at the denoiser; no module, processor or forward
is replaced, so LoRA, IP-Adapters, fused projections, offloading and quantisation come and go as they like.
How a call is caught is in ``diffusers_calls``, what is known about its tokens in ``diffusers_geometry``,
what a pipeline adds in ``diffusers_pipelines``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from diffusers import ModelMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import nn

from ..journal import AttributeEdit, HookEdit, Journal
from ..seams import Site
from .base import ATTRIBUTE, Runtime
from .diffusers_calls import AttentionHooks, refusal
from .diffusers_geometry import CONTEXT, Context, UNetLevels, forward_names, patch_of
from .diffusers_pipelines import denoiser_of, denoisers_of, text_encoders_of
from .diffusers_sizes import size_facts

__all__ = ["DiffusersHost", "denoiser_of", "denoisers_of", "text_encoders_of"]

KINDS = (Attention, MochiAttention, AttentionModuleMixin)
# Attention over frames, or over a prompt before it meets the image: not over image tokens.
OVER_FRAMES = {"temp_attentions", "motion_modules", "temporal_transformer_blocks", "transformer_in"}
OVER_TEXT = {"context_refiner", "token_refiner", "txt_refiner", "text_refiner"}
# Processors that put the image before the text; all others put the text first.
IMAGE_FIRST = ("JointAttn", "FusedJointAttn", "PAGJoint", "PAGCFGJoint", "SD3IPAdapter", "HunyuanVideo")


class DiffusersHost:
    """Attention modules of diffusers models whose processors end in torch's attention operator.

    ``pipeline``: the one the model belongs to, if it is known; it says at what size the model was trained.
    """

    name = "diffusers"

    def __init__(self, pipeline: Any = None):
        self.pipeline = pipeline

    def accepts(self, model: nn.Module) -> bool:
        return any(isinstance(m, (ModelMixin, *KINDS)) for m in model.modules())

    def family(self, model: nn.Module) -> str:
        """The class name of the diffusers model, such as ``UNet2DConditionModel``."""
        return type(next(iter(_denoisers(model).values()))).__name__

    def sites(self, model: nn.Module, prefix: str = "", parts: frozenset[str] = frozenset()) -> list[Site]:
        """Every attention module, numbered per part and role in module order.

        Facts of a site: denoiser (the model), local (the site's name inside it), family, level and levels
        (of a UNet), patch (latent pixels per token as (rows, columns), None in a UNet), text_order, video,
        sizes (see ``Sizes``), trained_latent (rows, columns) or None, vae_scale (for showing).
        """
        owners = _denoisers(model)
        common = {name: self._model_facts(owner) for name, owner in owners.items()}
        levels = {name: UNetLevels(owner) for name, owner in owners.items()}
        found: list[tuple[str, nn.Module, str, frozenset[str], dict[str, Any]]] = []
        for name, module in model.named_modules():
            owner = next((o for o in owners if not o or name.startswith(f"{o}.")), None)
            if owner is None or not _is_attention(module):
                continue
            local = name[len(owner) + 1 :] if owner else name
            facts = {
                **common[owner],
                "local": local,
                "level": levels[owner].of(local) if common[owner]["patch"] is None else 0,
                "levels": levels[owner].deepest + 1,
                "text_order": _text_order(module),
            }
            part = "vae" if _is_vae(owners[owner]) else "denoiser"
            found.append((name, module, _role(local, module), parts | {part}, facts))
        totals = Counter((role, group) for _, _, role, group, _ in found)
        running: Counter[tuple[str, frozenset[str]]] = Counter()
        sites = []
        for name, module, role, group, facts in found:
            heads, kv_heads, width = _head_counts(module)
            sites.append(
                Site(
                    name=prefix + name, module=module, host=self.name, role=role, parts=group,
                    layer=running[role, group], layers=totals[role, group], heads=heads, kv_heads=kv_heads,
                    head_dim=width, facts=facts, refusal=_refused(name, module),
                )
            )  # fmt: skip
            running[role, group] += 1
        return sites

    def _model_facts(self, model: nn.Module) -> dict[str, Any]:
        names, config = forward_names(model), getattr(model, "config", None)
        size = getattr(config, "patch_size", None)
        video = "num_frames" in names or getattr(config, "patch_size_t", None) is not None
        video = video or "3D" in type(model).__name__ or (isinstance(size, (list, tuple)) and len(size) > 2)
        return {
            "denoiser": model,
            "family": type(model).__name__,
            "patch": patch_of(model, names),
            "video": video and "sample" not in names,  # a video UNet attends to one frame at a time
            **size_facts(self.pipeline, model, patch_of(model, names)),
        }

    def install(self, runtime: Runtime) -> None:
        module, name = runtime.site.module, runtime.site.name
        runtime.journal.add(AttributeEdit(module, ATTRIBUTE, runtime, f"{name}.{ATTRIBUTE}"))
        _hook(runtime.journal, module, AttentionHooks(runtime), name)

    def install_model(self, model: nn.Module, journal: Journal, runtimes: Sequence[Runtime]) -> None:
        """Note the sizes of every call of each denoiser inside ``model``; once per denoiser."""
        for name, owner in _denoisers(model).items():
            if CONTEXT in vars(owner) or _is_vae(owner):
                continue
            where = name or self.family(model)
            context = Context(owner, runtimes)
            journal.add(AttributeEdit(owner, CONTEXT, context, f"{where}.{CONTEXT}"))
            _hook(journal, owner, context, where)

    def forget_runs(self, model: nn.Module) -> None:
        """Take the next call of every denoiser inside ``model`` for the first of a run."""
        for owner in _denoisers(model).values():
            if CONTEXT in vars(owner):
                vars(owner)[CONTEXT].forget()


def _hook(journal: Journal, module: nn.Module, hooks: AttentionHooks | Context, where: str) -> None:
    """Call ``hooks.before`` and ``hooks.after`` around every call of ``module``, failed ones included."""
    before, after = hooks.before, hooks.after
    edits = {
        f"pre-hook on {where}": lambda: module.register_forward_pre_hook(before, with_kwargs=True),
        f"forward hook on {where}": lambda: module.register_forward_hook(after, always_call=True),
    }
    for name, register in edits.items():
        journal.add(HookEdit(module, register, name))


# ---------------------------------------------------------------- reading a module


def _denoisers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost diffusers models inside ``model``, itself included, by name; ``model`` when none is.

    Outermost, because the blocks of a UNet are diffusers models too, and do not know its size.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModelMixin) and not any(not o or name.startswith(f"{o}.") for o in found):
            found[name] = module
    return found or {"": model}


def _is_vae(model: nn.Module) -> bool:
    return callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None))


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, KINDS) and hasattr(module, "processor")


def _role(name: str, module: nn.Module) -> str:
    """self, cross or joint (image and text in one sequence)."""
    path = name.split(".")
    added = getattr(module, "added_kv_proj_dim", None) is not None
    if isinstance(module, Attention) and added:
        # Text has projections of its own here; its keys stand beside the image's unless they are alone.
        return "cross" if module.only_cross_attention else "joint"
    if getattr(module, "is_cross_attention", False) or path[-1] in ("cross_attn", "cross_attention"):
        return "cross"
    if added or any(part.startswith("single_") for part in path):
        return "joint"
    return "self"


def _refused(name: str, module: nn.Module) -> str | None:
    path = set(name.split("."))
    if path & OVER_FRAMES:
        return "its tokens are frames, not image tokens"
    if path & OVER_TEXT:
        return "its tokens are text only, before text meets the image"
    return refusal(module)


def _text_order(module: nn.Module) -> str:
    kind = type(getattr(module, "processor", None)).__name__
    return "image first" if kind.startswith(IMAGE_FIRST) else "text first"


def _head_counts(module: nn.Module) -> tuple[int | None, int | None, int | None]:
    """(query heads, key/value heads, head width) as far as the module says."""

    def first(*names: str) -> int | None:
        values = (getattr(module, name, None) for name in names)
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)

    heads, inner, inner_kv = first("heads", "num_heads"), first("inner_dim"), first("inner_kv_dim")
    width = first("head_dim", "dim_head") or (inner // heads if inner and heads else None)
    kv_heads = first("kv_heads", "num_kv_heads") or (inner_kv // width if inner_kv and width else heads)
    return heads, kv_heads, width
