"""The role of every attention module of diffusers is what it is given at a call, and no class is left to its name.

The tokens that a module's queries come from are made a leaf of their own: its keys are its own, or its own and others',
where they depend on it, and others' alone where they do not.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, MochiAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import trainless
from trainless.hosts.diffusers.denoisers import whose
from trainless.hosts.diffusers.denoisers.words import qualified
from trainless.hosts.diffusers.host import DiffusersHost

from . import (  # noqa: F401 - they fill CASES and OTHERS
    tiny_controls,
    tiny_frames,
    tiny_omni,
    tiny_packed,
    tiny_sound,
    tiny_transformers,
    tiny_unets,
    tiny_video,
)
from .cases import CASES, OTHERS

EVERY = {**CASES, **OTHERS}
# Said by the model's class, by the module, by the attention's class, and both in one softmax.
SOME = ("ltx", "blocks_over_frames", "sd3_controlnet", "z_image_controlnet", "motif_video")


class Watch(TorchFunctionMode):
    """Whether the keys of each module's attention calls depend on what the module was given as its own."""

    def __init__(self, modules: dict[nn.Module, str]):
        super().__init__()
        self.names, self.stack, self.own = modules, [], {}
        self.hooks = [m.register_forward_pre_hook(self.enter, with_kwargs=True) for m in modules]
        self.hooks += [m.register_forward_hook(self.leave, always_call=True) for m in modules]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = list(inspect.signature(type(module).forward).parameters)[1]
        own = args[0] if args else kwargs[first]
        leaf = own.detach().clone().requires_grad_(True)
        self.stack.append((module, leaf))
        torch.set_grad_enabled(True)  # inside of modules alone: some models cannot run with gradients

        def swap(value: Any) -> Any:
            return leaf if value is own else value

        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.stack.pop()
        torch.set_grad_enabled(bool(self.stack))
        if isinstance(output, Tensor):
            return output.detach()
        return tuple(o.detach() if isinstance(o, Tensor) else o for o in output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self.stack:
            module, leaf = self.stack[-1]
            key = args[1] if len(args) > 1 else kwargs["key"]
            depends = (
                key.requires_grad
                and torch.autograd.grad(key.sum(), leaf, allow_unused=True, retain_graph=True)[0] is not None
            )
            self.own.setdefault(self.names[module], set()).add(depends)
        return func(*args, **kwargs)


def _faults(name: str) -> list[str]:
    torch.manual_seed(0)
    case = EVERY[name]()
    sites = [s for s in DiffusersHost().sites(case.model) if s.refusal is None]
    roles = {s.name: s.role for s in sites}
    for parameter in case.model.parameters():
        parameter.requires_grad_(False)
    watch = Watch({s.module: s.name for s in sites})
    with torch.no_grad(), watch:
        case.run(case.trained)
    for hook in watch.hooks:
        hook.remove()
    assert watch.own or not sites, "it has to run"
    return [
        f"{name} {at}: {roles[at]}, and its keys {'are' if True in own else 'are not'} its own"
        for at, own in watch.own.items()
        if own != {roles[at] != "cross"}
    ]


# Its blocks put their own tokens among others' before they call the module, which is not what this test looks at.
BEFORE = {"stable_cascade"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*EVERY} - BEFORE) if os.environ.get("TRAINLESS_ALL") else SOME)
def test_the_role_is_what_a_call_gives(name: str) -> None:
    assert not _faults(name)
    for site in DiffusersHost().sites(EVERY[name]().model):
        assert site.facts["holds"] is not None, f"{site.name} is not declared"


def test_roles_of_a_model_whose_processors_no_patch_can_reach() -> None:
    """T5 Film does not use torch's operator: each layer is cross-attention where it is given what was encoded."""
    case = EVERY["t5_film"]()
    sites, given = DiffusersHost().sites(case.model), {}
    for site in sites:
        own = site.module.processor

        def told(
            attn: Any, hidden: Tensor, *args: Any, of: Any = own, at: str = site.name, **kwargs: Any
        ) -> Any:
            others = kwargs.get("encoder_hidden_states", args[0] if args else None)
            given.setdefault(at, set()).add("self" if others is None else "cross")
            return of(attn, hidden, *args, **kwargs)

        site.module.processor = told
    with torch.no_grad():
        case.run(case.other)
    assert given == {site.name: {site.role} for site in sites}
    assert {site.role for site in sites} == {"self", "cross"}
    for site in sites:
        assert (site.role != "cross") == case.self_layers(site.name)


def test_another_role_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainless.hosts.diffusers.denoisers import TABLE

    layout = TABLE["diffusers.models.transformers.transformer_ltx.LTXVideoTransformer3DModel"]
    monkeypatch.setitem(layout.sites, "*.attn1", "cross")
    assert any("attn1: cross, and its keys are its own" in fault for fault in _faults("ltx"))


# ---------------------------------------------------------------- classes of which their models alone say it

# They take keys from an argument that may be missing, and each stands in a model that is declared.
BY_MODEL = {
    "AnimaTextConditionerAttention", "AnyFlowAttention", "AudioDiTAttention", "BriaFibo2Attention",
    "Kandinsky5Attention", "Kandinsky6Attention", "LTX2Attention", "LTXAttention", "SanaWMLTX2Attention",
}  # fmt: skip


def _classes() -> list[type]:
    found: dict[str, type] = {}
    for package in ("models", "pipelines.ltx2"):
        home = importlib.import_module(f"diffusers.{package}")
        for info in pkgutil.walk_packages(home.__path__, f"{home.__name__}."):
            try:
                module = importlib.import_module(info.name)
            except Exception:  # what needs libraries that are not there
                continue
            for kind in vars(module).values():
                if inspect.isclass(kind) and issubclass(
                    kind, (Attention, MochiAttention, AttentionModuleMixin)
                ):
                    if issubclass(kind, nn.Module) and kind.__module__.startswith("diffusers."):
                        found[qualified(kind)] = kind
    return list(found.values())


def test_every_attention_class_of_diffusers_is_known() -> None:
    kinds = _classes()
    says = {
        kind for kind in kinds if issubclass(kind, Attention) or whose.CROSS_SAID in inspect.getsource(kind)
    }
    left = {
        kind.__name__
        for kind in kinds
        if kind not in says and qualified(kind) not in whose.CLASSES and qualified(kind) not in whose.ADDED
    }
    assert left == BY_MODEL
    gone = {*whose.CLASSES, *whose.ADDED} - {qualified(kind) for kind in kinds}
    assert not gone, gone


# ---------------------------------------------------------------- models and modules of nobody's


class Strange(nn.Module, AttentionModuleMixin):
    """An attention of somebody's own, under a name that would say something."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.to_q, self.to_k = 2, nn.Linear(8, 8), nn.Linear(8, 8)
        self.processor = SimpleNamespace()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Mine(nn.Module):
    def __init__(self, **attention: nn.Module) -> None:
        super().__init__()
        for name, module in attention.items():
            setattr(self, name, module)


def test_a_class_that_does_not_say_is_refused_by_name_when_patching() -> None:
    model = Mine(cross_attn=Strange(), single_blocks=Strange())
    with pytest.raises(trainless.NoMatch, match=r"whose keys a Strange reads is not declared for a Mine"):
        trainless.patch(model, "attn_temperature", temperature=0.7)
    report = trainless.explain(model, "attn_temperature", temperature=0.7)
    assert not report.ok and "Strange" in str(report.problems)
    model.cross_attn.is_cross_attention = model.single_blocks.is_cross_attention = False
    roles = {site.name: site.role for site in DiffusersHost().sites(model)}
    assert roles == {"cross_attn": "self", "single_blocks": "self"}


def test_a_module_says_it_and_its_place_does_not() -> None:
    text = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    model = Mine(
        cross_attn=Attention(8, heads=2, dim_head=4), single_one=Attention(8, cross_attention_dim=8, heads=2),
        own=text.single_transformer_blocks[0].attn, both=text.transformer_blocks[0].attn,
    )  # fmt: skip
    roles = {site.name: site.role for site in DiffusersHost().sites(model)}
    assert roles == {"cross_attn": "self", "single_one": "cross", "own": "self", "both": "joint"}


def test_self_attention_that_is_given_others_tokens_is_refused_at_the_call() -> None:
    block = EVERY["blocks_over_frames"]().model.transformer_blocks[0]
    model = Mine(attn=block.attn1)
    own, width = torch.randn(1, 5, 8), block.attn1.query_dim
    own = torch.randn(1, 5, width)
    with torch.no_grad(), trainless.patched(model, "attn_temperature", temperature=0.7):
        model.attn(own)
        for others in (5, 7):
            with pytest.raises(trainless.Unsupported, match=rf"says self-attention.*the {others} tokens"):
                model.attn(own, encoder_hidden_states=torch.randn(1, others, width))


def test_classes_beside_denoisers_are_declared_too() -> None:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
    from diffusers.pipelines.ltx2.duration_head import LTX2DurationHead

    prior = WuerstchenPrior(c_in=4, c=8, c_cond=8, c_r=4, depth=1, nhead=2)
    prior.set_attn_processor(AttnProcessor2_0())
    given = {"x": torch.randn(1, 4, 6, 5), "r": torch.rand(1), "c": torch.randn(1, 3, 8)}
    with torch.no_grad(), trainless.patched(prior, "attn_temperature", temperature=0.3) as patch:
        assert not torch.equal(prior(**given), _stock(patch, prior, given))
        assert patch.report().methods[0].acted
    assert [site.role for site in DiffusersHost().sites(prior)] == ["joint"]
    # Its queries are learned: it never was self-attention.
    head = LTX2DurationHead(
        video_cross_attention_dim=8, audio_cross_attention_dim=8, pooler_hidden_dim=8, num_pooler_heads=2,
        mlp_hidden_dim=8,
    )  # fmt: skip
    assert [site.role for site in DiffusersHost().sites(head)] == ["cross"]


def _stock(patch: Any, model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with patch.paused():
        return model(**given)
