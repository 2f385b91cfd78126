"""Host for diffusers: finds the attention modules of denoisers and routes them into the engine.

Two hooks stand at each patched attention module and two at the denoiser; no module, processor or forward
is replaced, so LoRA, IP-Adapters, fused projections, offloading and quantisation come and go as they like.
The hooks are in ``hooks``, how a call is caught is in ``calls``, and in ``traced`` while a compiler traces it. What its
tokens are is declared per class in ``denoisers`` and read from each call in ``geometry``; what a pipeline adds is in
``pipelines``.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from diffusers import ModelMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import nn

from ...edits.journal import AttributeEdit, HookEdit, Journal
from ...engine.runtime import ATTRIBUTE, Runtime
from ...seams import Lease, Site
from ..modules.around import Tell, nothing
from .calls import foreign_order
from .denoisers import Layout, layout_of, whose
from .denoisers.words import ROLES, holds_no_image, undeclared
from .geometry import CONTEXT, Context
from .hooks import AttentionHooks
from .pipelines import denoiser_of, denoisers_of, text_encoders_of
from .processors import refusal
from .rescaling import ASKED, AskedSize, declared
from .sizes import size_facts

__all__ = ["DiffusersHost", "denoiser_of", "denoisers_of", "text_encoders_of"]

KINDS = (Attention, MochiAttention, AttentionModuleMixin)


class DiffusersHost:
    """Attention modules of diffusers models whose processors end in torch's attention operator.

    ``pipeline``: the one the model belongs to, if it is known; it says at what size the model was trained.
    """

    name = "diffusers"
    lasting = "run"

    def __init__(self, pipeline: Any = None):
        self.pipeline = pipeline

    def accepts(self, model: nn.Module) -> bool:
        return any(isinstance(m, (ModelMixin, *KINDS)) for m in model.modules())

    def family(self, model: nn.Module) -> str:
        """The class name of the diffusers model, such as ``UNet2DConditionModel``."""
        return type(next(iter(_denoisers(model).values()))).__name__

    def sites(self, model: nn.Module, prefix: str = "", parts: frozenset[str] = frozenset()) -> list[Site]:
        """Every attention module, numbered per part and role in module order.

        Facts of a site: denoiser (the model), local (the site's name inside it), family, whole (calls that are traced
        go to the engine with all that is known of them), layout (what is declared about its class), holds (what the
        site's tokens are), no_images (why no method can know image tokens there, None where it can), level and levels
        (of a UNet), patch (latent pixels per token as (rows, columns), None in a UNet and where nothing is declared),
        sizes (see ``Sizes``), trained_latent (rows, columns) or None, vae_scale (for showing).
        """
        owners = _denoisers(model)
        common = {name: self._model_facts(owner) for name, owner in owners.items()}
        levels = {name: _levels(common[name]["layout"], owner) for name, owner in owners.items()}
        found: list[tuple[str, nn.Module, str, frozenset[str], dict[str, Any]]] = []
        for name, module in model.named_modules():
            owner = next((o for o in owners if not o or name.startswith(f"{o}.")), None)
            if owner is None or not _is_attention(module):
                continue
            local = name[len(owner) + 1 :] if owner else name
            layout: Layout | None = common[owner]["layout"]
            holds = _holds(layout, owners[owner], local, module)
            level = levels[owner](local)
            facts = {
                **common[owner],
                "local": local,
                "holds": holds,
                "no_images": _no_images(layout, common[owner]["family"], holds, level, module),
                "level": level,
                "levels": getattr(levels[owner], "deepest", 0) + 1,
            }
            part = "vae" if _is_vae(owners[owner]) else "denoiser"
            role = whose.role(module) if holds is None else ROLES[holds]
            if role is None:
                facts["whose"] = whose.unknown(module, facts["family"])
            found.append((name, module, role or "self", parts | {part}, facts))
        totals = Counter((role, group) for _, _, role, group, _ in found)
        running: Counter[tuple[str, frozenset[str]]] = Counter()
        sites = []
        for name, module, role, group, facts in found:
            heads, kv_heads, width = _head_counts(module)
            sites.append(
                Site(
                    name=prefix + name, module=module, host=self.name, role=role, parts=group,
                    layer=running[role, group], layers=totals[role, group], heads=heads, kv_heads=kv_heads,
                    head_dim=width, lasting=self.lasting, facts=facts,
                    refusal=facts.get("whose") or refusal(module, facts["denoiser"]),
                )
            )  # fmt: skip
            running[role, group] += 1
        return sites

    def _model_facts(self, model: nn.Module) -> dict[str, Any]:
        layout = layout_of(model)
        patch = None if layout is None or layout.patch is None else layout.patch(model)
        return {
            "denoiser": model,
            "family": type(model).__name__,
            "whole": True,
            "layout": layout,
            "patch": patch,
            **size_facts(self.pipeline, model, patch),
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
            if self.pipeline is not None:
                self._watch_sizes(owner, journal, where)

    def _watch_sizes(self, owner: nn.Module, journal: Journal, where: str) -> None:
        asked = AskedSize(self.pipeline, self._model_facts(owner)["sizes"])
        journal.add(AttributeEdit(owner, ASKED, asked, f"{where}.{ASKED}"))
        register = functools.partial(owner.register_forward_pre_hook, asked.before, with_kwargs=True)
        journal.add(HookEdit(owner, register, f"pre-hook on {where}"))

    def watch_sizes_for(self, model: nn.Module, lease: Lease) -> None:
        """Warn when a pipeline paints another size than it was asked for, as long as this patch is active."""
        for owner in _denoisers(model).values():
            if ASKED in vars(owner):
                vars(owner)[ASKED].leases.append(lease)

    def size_notes(self, model: nn.Module) -> list[str]:
        """What the pipeline does with the sizes that it is asked for, where that is not what was asked."""
        found = [vars(owner).get(ASKED) for owner in _denoisers(model).values()]
        seen = [note for asked in found if asked is not None for note in asked.notes()]
        said = None if self.pipeline is None or any(found) else declared(self.pipeline)
        return seen if said is None else [said]

    def around(self, runtime: Runtime, model: nn.Module, station: Journal) -> Tell:
        """Who tells of the denoiser's call that a module's call is part of."""
        for owner in _denoisers(model).values():
            inside = any(module is runtime.site.module for module in owner.modules())
            if inside and CONTEXT in vars(owner):
                return vars(owner)[CONTEXT].surroundings
        return nothing

    def forget_runs(self, model: nn.Module) -> None:
        """Take the next call of every denoiser inside ``model`` for the first of a run."""
        for owner in _denoisers(model).values():
            if CONTEXT in vars(owner):
                vars(owner)[CONTEXT].forget()

    def keep_runs(self, model: nn.Module) -> Callable[[], None]:
        """A function that gives the runs under way now, of any thread, back to denoisers patched anew since."""
        kept = {o: vars(o)[CONTEXT].local for o in _denoisers(model).values() if CONTEXT in vars(o)}

        def give_back() -> None:
            for owner, local in kept.items():
                if CONTEXT in vars(owner):
                    vars(owner)[CONTEXT].local = local

        return give_back


def _hook(journal: Journal, module: nn.Module, hooks: AttentionHooks | Context, where: str) -> None:
    """Call ``hooks.before`` and ``hooks.after`` around every call of ``module``, failed ones included."""
    before, after = hooks.before, hooks.after
    edits = {
        f"pre-hook on {where}": lambda: module.register_forward_pre_hook(before, with_kwargs=True),
        f"forward hook on {where}": lambda: module.register_forward_hook(after, always_call=True),
    }
    for name, register in edits.items():
        journal.add(HookEdit(module, register, name, kind=f"{name.split()[0]} of {type(hooks).__name__}"))


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


def _holds(layout: Layout | None, model: nn.Module, local: str, module: nn.Module) -> str | None:
    """What the tokens of the attention layer called ``local`` are, as declared; None where nothing is."""
    if layout is None:
        return None
    if callable(layout.sites):
        return layout.sites(model, local, module)
    return next((holds for glob, holds in layout.sites.items() if fnmatchcase(local, glob)), None)


def _levels(layout: Layout | None, model: nn.Module) -> Callable[[str], int | None]:
    """The level of a layer by its name; 0 everywhere in a transformer."""
    return (lambda name: 0) if layout is None or layout.levels is None else layout.levels(model)


def _no_images(
    layout: Layout | None, family: str, holds: str | None, level: int | None, module: nn.Module
) -> str | None:
    """Why image tokens cannot be told at a site, or None."""
    if layout is None:
        return undeclared(family)
    if layout.read is None:
        return layout.why
    if holds is not None and (said := holds_no_image(holds)):
        return said
    if holds is None or level is None:
        return f"it is not among the attention layers that are declared for {layout.family}"
    return foreign_order(layout, module)


def _head_counts(module: nn.Module) -> tuple[int | None, int | None, int | None]:
    """(query heads, key/value heads, head width) as far as the module says."""

    def first(*names: str) -> int | None:
        values = (getattr(module, name, None) for name in names)
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)

    heads, inner, inner_kv = first("heads", "num_heads"), first("inner_dim"), first("inner_kv_dim")
    width = first("head_dim", "dim_head") or (inner // heads if inner and heads else None)
    kv_heads = first("kv_heads", "num_kv_heads") or (inner_kv // width if inner_kv and width else heads)
    return heads, kv_heads, width
