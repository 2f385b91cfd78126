"""Replaced weights: ordinary tensors in ordinary layers are, whatever only looks like one is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from oracle import models
from safetensors.torch import save_file

import trainless
from trainless.seams import Weights, why_not_plain


class Packed(torch.Tensor):
    """A tensor as quantisers have them: float32 from outside, with its values in other tensors."""

    @staticmethod
    def __new__(cls, plain):
        made = torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)
        made.codes = plain.mul(8).round().to(torch.int8)
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = [a.codes.float() / 8 if isinstance(a, Packed) else a for a in args]
        return func(*plain, **(kwargs or {}))


class Derived(nn.Linear):
    """A layer that unpacks at every call, and keeps a weight that is not what it multiplies with."""


class Codes(nn.Module):
    """A layer without any weight."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().mul(8).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) / 8, self.bias)


class Subclass(nn.Parameter):
    pass


def _derived(linear):
    made = Derived(linear.in_features, linear.out_features, linear.bias is not None)
    made.load_state_dict(linear.state_dict())
    return made


def _packed(linear):
    linear.weight = nn.Parameter(Packed(linear.weight.detach()), requires_grad=False)
    return linear


def _parameter(linear):
    linear.weight = Subclass(linear.weight.detach(), requires_grad=False)
    return linear


def _parametrised(linear):
    return nn.utils.parametrizations.weight_norm(linear.requires_grad_(True))


def _from_others(linear):
    """As torch's older weight normalisation does: the weight is an attribute, worked out at every call."""
    weight = linear.weight
    del linear._parameters["weight"]
    linear.register_parameter("weight_v", nn.Parameter(weight.detach()))
    linear.weight = linear.weight_v.detach()
    return linear


FLUX = ("to_q", "to_k", "to_v", "to_out")


def _published(model, folder):
    """Weights for every projection of the tiny FLUX, in the published names; made before it is quantised."""
    tensors = {
        f"{name}.{key}": torch.randn_like(tensor)
        for name, module in model.named_modules() if hasattr(module, "processor")
        for key, tensor in module.named_parameters() if key.split(".")[0] in FLUX
    }  # fmt: skip
    save_file(tensors, folder / "distilled.safetensors")
    return folder


@pytest.mark.parametrize("layer", ["to_v", "to_out.0"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_packed, "Packed"), (_parameter, "Subclass"), (_derived, "Derived"), (Codes, "Codes"),
        (_parametrised, "ParametrizedLinear"), (_from_others, "Linear, keeps no weight"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_weights_that_only_look_like_weights_are_refused_when_patching(tmp_path, change, named, layer):
    model = models.build("flux", dtype=torch.float32)
    folder = _published(model, tmp_path)
    trainless.patch(model, "clear", radius=3, weights=folder).remove()
    attention = model.transformer_blocks[1].attn
    *path, leaf = layer.split(".")
    holder = attention.get_submodule(".".join(path))
    with torch.enable_grad():
        changed = change(attention.get_submodule(layer))
    setattr(holder, leaf, changed)
    stock = model(**_inputs())[0]
    with pytest.raises(
        trainless.Unsupported, match=rf"transformer_blocks\.1\.attn\.{layer}.*{named}.*unquantised"
    ):
        trainless.patch(model, "clear", radius=3, weights=folder)
    (problem,) = trainless.explain(
        model, [{"use": "clear", "with": {"radius": 3, "weights": folder}}]
    ).problems
    assert problem.kind == "Unsupported" and named in problem.message
    assert torch.equal(model(**_inputs())[0], stock)
    with trainless.patched(model, "clear", radius=3, force=True) as patch:  # without weights there is no need
        model(**_inputs())
        assert patch.report().methods[0].acted


def _inputs():
    return {k: v.float() for k, v in models.inputs("flux", height=24, width=24).items()}


def test_layers_of_torch_are_plain_and_biases_may_be_missing():
    block = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.LayerNorm(4)})
    assert [why_not_plain(block, n) for n in ("a.weight", "a.bias", "b.weight", "c.weight")] == [None] * 4
    block["a"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    assert why_not_plain(block, "a.weight") is None


def test_what_the_weights_seam_writes_is_checked_for_every_method():
    from trainless.edits.weights import check
    from trainless.seams import Site

    linear = _packed(nn.Linear(4, 4))
    site = Site("net.layer", nn.ModuleDict({"inner": linear}), "any")
    given = Weights(tensors={"inner.weight": torch.zeros(4, 4)})
    with pytest.raises(
        trainless.Unsupported, match=r"some: net\.layer\.inner\.weight cannot be replaced.*Packed"
    ):
        check([("some", site, given)])
