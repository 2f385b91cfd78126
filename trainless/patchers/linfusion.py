"""LinFusion: the self-attention of a Stable Diffusion UNet as linear attention, with weights distilled for it.

What     In every listed ``attn1``: q = to_q(x + f_q(x)), k = to_k(x + f_k(x)), v = to_v(x), where f is Linear,
         LayerNorm, LeakyReLU(0.01), Linear (a middle width of -1: f is the identity). With phi(u) = elu(u) + 1,
         out_i = mean_j phi(q_i)·phi(k_j) v_j / (mean_j phi(q_i)·phi(k_j) + 1e-4), then to_out. There is no
         scale, no position and no softmax. The projections q, k, v and out are replaced as well.
Source   "LinFusion: 1 GPU, 1 Minute, 16K Image" and its released code and weights.
Seams    weights (q, k, v, out), input (f in front of to_q and to_k), form (the operator).
Exact    never: it is another operator. Without distilled weights its images are noise, so it is refused.
Costs    Two products of 2·N·c·d per layer, against two of 2·N²·c, and 8·N·c² for f at the full middle width
         (0.5·N·c² at a sixteenth): it pays from about N = d + 2c tokens on. Memory grows with N. The replaced
         projections wait on the CPU. See benchmarks/results; speed on a GPU is not measured.
Differs  - Modules stay what they are and where they are: adapters (LoRA) and image prompts stay alive, and
           all of it comes off again. The code exchanges the modules, with whatever is attached to them.
         - A publication must fit: every listed layer with its heads and width, every tensor and none besides.
           The code looks the base model up by name.
         - A padding mask is honoured where there is one; the code ignores it.
         - Sums are in float32 and means are taken of both terms; the code spreads N over two factors.
         - What the base model's own self-attention had learnt (a fine-tune's, a fused LoRA's) is overwritten,
           as it is by the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import elu, layer_norm, leaky_relu, linear

from ..errors import InputError, Unsupported
from ..kernels import Visibility, linear_attention, visibility
from ..kernels.linear import choose
from ..seams import (
    AttentionCall,
    Contribution,
    Form,
    Formed,
    Input,
    Site,
    State,
    Statistics,
    Weights,
)
from ._distilled import Distilled, Shape, check_keys, check_plain, distilled, shape_at
from .base import Method, option, register

EPS = 1e-4  # published: added to the divisor
SLOPE = 0.01  # published: of the leaky ReLU
HIDDEN = -1000.0  # a mask that adds this or less hides its key
PROJECTIONS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
PLAIN = -1  # a middle width that stands for "f is the identity"


@dataclass(frozen=True)
class ListedLayer:
    """One entry of a publication's list: its number there, the layer, and what it was made for."""

    index: int
    module: str
    width: int
    heads: int
    middle: int

    def keys(self) -> dict[str, str]:
        """The layer's own parameters -> keys of the publication."""
        return {name: f"{self.index}.{name}" for name in PROJECTIONS}

    def front(self, projection: str) -> dict[str, str]:
        """Names of f in front of to_q or to_k -> keys of the publication; none when it is the identity."""
        names = (f"{part}.{kind}" for part in (0, 1, 3) for kind in ("weight", "bias"))
        return {} if self.middle == PLAIN else {name: f"{self.index}.{projection}_.{name}" for name in names}

    def shapes(self) -> dict[str, Shape]:
        """Shape of each name of ``front``."""
        m, c = self.middle, self.width
        return {
            "0.weight": (m, c), "0.bias": (m,), "1.weight": (m,), "1.bias": (m,), "3.weight": (c, m), "3.bias": (c,)
        }  # fmt: skip


@register
@dataclass(frozen=True)
class LinFusion(Method):
    """Linear attention in a UNet's self-attention, with the distilled ``weights`` of a publication.

    Raises InputError without weights, and for weights that are incomplete or of another base model.
    """

    name: ClassVar[str] = "linfusion"
    summary: ClassVar[str] = "linear attention instead of softmax in a UNet, with distilled weights"
    source: ClassVar[str] = "LinFusion: 1 GPU, 1 Minute, 16K Image"
    parts: ClassVar[frozenset[str]] = frozenset({"denoiser"})
    hosts: ClassVar[frozenset[str]] = frozenset({"diffusers"})

    weights: Path | None = option(
        None,
        help="folder of the published weights (config.json and safetensors); required, no default is any good",
    )

    def refuses(self, site: Site) -> str | None:
        if site.facts.get("no_images"):
            return str(site.facts["no_images"])
        if site.facts.get("patch") is not None:
            return "not a UNet's self-attention, for which alone weights were distilled"
        if "attn1" not in site.name.split(".")[-1]:
            return "not called attn1, as the self-attention of these UNets is"
        if getattr(site.module, "fused_projections", False):
            return "its projections are fused; call unfuse_qkv_projections() first"
        if self.weights is not None and _name(site) not in _listed(self._published()):
            return "not among the layers that the weights were made for"
        return None

    def validate(self, sites: Sequence[Site]) -> None:
        source = self._published()
        listed, present = _listed(source), {_name(site): site for site in sites}
        layers = dict.fromkeys(name.rpartition(".")[0] for name in PROJECTIONS)
        check_plain([site for site in sites if _name(site) in listed], list(layers), self.name)
        expected: dict[str, Shape | None] = {}
        for entry in listed.values():
            site = present.get(entry.module)
            if site is None:
                raise InputError(
                    f"{self.name}: the weights in {source.path} are for {len(listed)} layers, {entry.module} among "
                    "them, and this model has no such layer that could be patched; they are of another base model"
                )
            _fits(entry, site, self.name)
            expected |= {key: shape_at(site, name) for name, key in entry.keys().items()}
            for projection in ("to_q", "to_k"):
                shapes = entry.shapes()
                expected |= {key: shapes[name] for name, key in entry.front(projection).items()}
        check_keys(source, expected, self.name)

    def contribute(self, site: Site) -> Sequence[Contribution]:
        source = self._published()
        entry = _listed(source)[_name(site)]
        fronts = [
            Input(
                _through(entry.middle),
                module=projection,
                tensors=source.under(entry.front(projection)),
                traceable=True,
            )
            for projection in ("to_q", "to_k")
        ]
        return [
            Weights(tensors=source.under(entry.keys())),
            *fronts,
            Form(_form, plain=_plainly, traceable=True),
        ]

    def _published(self) -> Distilled:
        if self.weights is None:
            raise InputError(
                f"{self.name}: needs distilled weights, and none are given; with the model's own or random ones its "
                f"images are noise. Download those made for this base model and say weights=FOLDER "
                f"(--set {self.name}.weights=FOLDER)"
            )
        return distilled(self.weights, self.name)


def _name(site: Site) -> str:
    return str(site.facts.get("local", site.name))


def _listed(source: Distilled) -> dict[str, ListedLayer]:
    """The publication's list by layer name; InputError when its config is not of this format."""
    given = source.config.get("modules_list")
    if not isinstance(given, list) or not given:
        raise InputError(
            f"{source.path}: its config.json has no modules_list, which says what each tensor is for; give the folder "
            "as it was published"
        )
    found = {}
    for index, item in enumerate(given):
        try:
            sizes = (int(item["dim_n"]), int(item["heads"]), int(item["projection_mid_dim"]))
            entry = ListedLayer(index, str(item["module_name"]), *sizes)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{source.path}: entry {index} of modules_list is malformed ({error!r})"
            ) from None
        if entry.module in found or (entry.middle < 1 and entry.middle != PLAIN):
            raise InputError(f"{source.path}: entry {index} of modules_list makes no sense: {item}")
        found[entry.module] = entry
    return found


def _fits(entry: ListedLayer, site: Site, method: str) -> None:
    """InputError unless the layer has the heads and the width that its weights were made for."""
    shape = shape_at(site, "to_q.weight")
    width = None if shape is None else shape[1]
    for said, made, here in (("heads", entry.heads, site.heads), ("channels", entry.width, width)):
        if made != here:
            raise InputError(
                f"{method}: the weights for {site.name} were made for {made} {said}, and it has {here}; they are of "
                "another base model"
            )


def _through(middle: int) -> Callable[..., Any]:
    """What to_q or to_k is given instead of x: x + f(x)."""

    def value(args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        x, *rest = args
        if middle == PLAIN:
            return (x + x, *rest), kwargs
        t = {name: tensor.to(x) for name, tensor in tensors.items()}  # under offloading they may be elsewhere
        y = linear(x, t["0.weight"], t["0.bias"])
        y = leaky_relu(layer_norm(y, (middle,), t["1.weight"], t["1.bias"]), SLOPE)
        return (x + linear(y, t["3.weight"], t["3.bias"]), *rest), kwargs

    return value


def _form(call: AttentionCall, statistics: Statistics, state: State) -> Formed:
    seen = _seen(call)
    tensors = (call.query, call.key, call.value)
    made = choose(*tensors, visibility=seen)
    out = linear_attention(*tensors, visibility=seen, feature="elu", eps=EPS)
    return Formed(out.transpose(1, 2), f"linear/{made.name}", "; ".join(made.reasons))


def _plainly(call: AttentionCall) -> Tensor:
    """The same with every pair at hand: weights phi(q)·phi(k), means of what they weigh and of themselves."""
    share = call.query.shape[1] // call.key.shape[1]
    q, k = (elu(t) + 1 for t in (call.query, call.key.repeat_interleave(share, 1)))
    weight = q @ k.mT
    if isinstance(call.mask, Tensor):
        weight = weight * (call.mask if call.mask.dtype == torch.bool else call.mask > HIDDEN)
    out = weight @ call.value.repeat_interleave(share, 1)
    keys = (weight != 0).sum(-1, keepdim=True).clamp_min(1)
    return ((out / keys) / (weight.sum(-1, keepdim=True) / keys + EPS)).transpose(1, 2)


def _seen(call: AttentionCall) -> Visibility:
    _, _, _, lq, lk = call.shape
    seen = visibility(call.mask, causal=False, lq=lq, lk=lk, device=call.query.device)
    if not seen.structured or call.causal:
        where = call.site.name if call.site is not None else "this layer"
        raise Unsupported(f"{where}: linear attention takes no mask but padding, and this call has another")
    return seen
