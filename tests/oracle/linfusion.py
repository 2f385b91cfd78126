"""LinFusion: the self-attention of a UNet as linear attention, with distilled weights of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entropy import DenoiserOracle, _heads, install_denoiser, knows

EPS = 1e-4


def feature(x: Tensor, name: str = "elu") -> Tensor:
    """Feature maps: elu(x) + 1, relu(x), softmax over the channels of a head."""
    if name == "softmax":
        return x.softmax(dim=-1)
    return x.relu() if name == "relu" else F.elu(x) + 1


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    name: str = "elu",
    eps: float = EPS,
    causal: bool = False,
    mean: bool = True,
    decay: Tensor | None = None,
) -> Tensor:
    """Linear attention (B, H, L, D) through all its weights: with w_ij = φ(q_i) · φ(k_j) over the visible j,

        out_i = mean_j(w_ij v_j) / (mean_j(w_ij) + eps)        (sums in place of means with mean=False).

    causal: j <= i, and means are over the i + 1 keys there are; there must be as many queries as keys.
    decay (H,): w_ij times decay^(i - j). No scale and no positions otherwise.
    """
    w = feature(query, name) @ feature(key, name).transpose(-2, -1)
    lq, lk = w.shape[-2:]
    if decay is not None:
        apart = (torch.arange(lq)[:, None] - torch.arange(lk)[None, :]).clamp_min(0)
        w = w * decay[:, None, None] ** apart
    count = torch.full((lq, 1), float(lk), dtype=w.dtype)
    if causal:
        w, count = w.tril(), torch.arange(1, lq + 1, dtype=w.dtype)[:, None]
    if mean:
        w = w / count
    return (w @ value) / (w.sum(dim=-1, keepdim=True) + eps)


def projected(x: Tensor, tensors: Mapping[str, Tensor], prefix: str, mid: int) -> Tensor:
    """x + f(x); f is a linear map to ``mid`` channels, a layer norm over them, a leaky relu of slope 0.01 and a
    linear map back. ``mid`` of -1: f is the identity, so that x comes out twice."""
    if mid == -1:
        return x + x

    def part(name: str) -> Tensor:
        return tensors[f"{prefix}.{name}"].to(x)

    y = F.linear(x, part("0.weight"), part("0.bias"))
    y = F.layer_norm(y, (mid,), part("1.weight"), part("1.bias"))
    return x + F.linear(F.leaky_relu(y, 0.01), part("3.weight"), part("3.bias"))


class _Linear:
    """One layer: its number in the file, its entry of the config."""

    def __init__(self, oracle: LinFusion, index: int, entry: Mapping[str, Any]) -> None:
        self.oracle, self.index, self.entry = oracle, index, entry

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attn.spatial_norm is not None or attn.group_norm is not None or hidden_states.ndim != 3:
            raise NotImplementedError("the oracle knows transformer blocks only")
        if attn.residual_connection or attn.rescale_output_factor != 1 or encoder_hidden_states is not None:
            raise NotImplementedError("the oracle knows plain self-attention only")
        tensors, n, mid = self.oracle.tensors, self.index, self.entry["projection_mid_dim"]

        def through(name: str, module: nn.Module, x: Tensor) -> Tensor:
            if self.oracle.base == "module":
                return module(x)
            bias = tensors.get(f"{n}.{name}.bias")
            return F.linear(x, tensors[f"{n}.{name}.weight"].to(x), None if bias is None else bias.to(x))

        heads = self.entry["heads"]
        q = through("to_q", attn.to_q, projected(hidden_states, tensors, f"{n}.to_q_", mid))
        k = through("to_k", attn.to_k, projected(hidden_states, tensors, f"{n}.to_k_", mid))
        v = through("to_v", attn.to_v, hidden_states)
        width = q.shape[-1] // heads

        def shared(x: Tensor) -> Tensor:  # keys and values may have fewer heads
            split = _heads(x, x.shape[-1] // width)
            return split.repeat_interleave(heads // split.shape[1], dim=1)

        queries, keys = _heads(q, heads), shared(k)
        queries = queries if attn.norm_q is None else attn.norm_q(queries)
        keys = keys if attn.norm_k is None else attn.norm_k(keys)
        out = linear_attention(queries, keys, shared(v))
        out = through("to_out.0", attn.to_out[0], out.transpose(1, 2).flatten(2))
        return attn.to_out[1](out)


class LinFusion(DenoiserOracle):
    """Every layer that ``config["modules_list"]`` names becomes ``linear_attention`` (elu + 1, eps 1e-4) of

        q = to_q(x + f_q(x)),  k = to_k(x + f_k(x)),  v = to_v(x),   then to_out,

    with the tensors ``{number}.to_q.weight``, ``.to_k.weight``, ``.to_v.weight``, ``.to_out.0.weight`` and
    ``.bias`` of the file in place of the model's own, and ``.to_q_.{0,1,3}.*``, ``.to_k_.{0,1,3}.*`` for f.
    Other layers stay as they are.

    Settled here where sources differ: a mask is ignored; the middle width is each entry's own; eps is added
    to the mean form of the divisor. base="module" takes the model's own projections (adapters in them
    included) and only f from the file.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: str = "file") -> None:
        self.entries: Sequence[Mapping[str, Any]] = config["modules_list"]
        self.tensors, self.base = tensors, base


@contextmanager
def install_linfusion(model: nn.Module, oracle: LinFusion) -> Iterator[LinFusion]:
    """Run a stock float64 UNet with linear self-attention; restored on exit."""
    mine = {
        f"{entry['module_name']}.processor": _Linear(oracle, n, entry)
        for n, entry in enumerate(oracle.entries)
    }
    unknown = set(mine) - set(model.attn_processors)
    if unknown:
        raise KeyError(f"no such layers: {sorted(unknown)}")
    if knows(model):
        with install_denoiser(model, oracle, mine):
            yield oracle
        return
    before = dict(
        model.attn_processors
    )  # a UNet of another class: the layers of the list, and the rest stays stock
    try:
        model.set_attn_processor({**before, **mine})
        yield oracle
    finally:
        model.set_attn_processor(before)


def random_weights(
    model: nn.Module,
    mid: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    only: Collection[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and tensors in the published format for all ``attn1`` layers of a UNet, in order, or those in ``only``.
    The projections are the model's own with noise; ``mid``: middle width (None: the layer's)."""
    generator = torch.Generator().manual_seed(4000 + seed)
    modules, tensors = [], {}

    def normal(like: Sequence[int], std: float) -> Tensor:
        return torch.randn(*like, generator=generator, dtype=torch.float64) * std

    for name, attn in model.named_modules():
        if not name.endswith("attn1") or (only is not None and name not in only):
            continue
        n, width = len(modules), attn.to_q.in_features
        middle = width if mid is None else mid
        modules.append(
            {"module_name": name, "dim_n": width, "heads": attn.heads, "projection_mid_dim": middle}
        )
        for part, module in (("to_q", attn.to_q), ("to_k", attn.to_k), ("to_v", attn.to_v)):
            weight = module.weight.detach().double()
            tensors[f"{n}.{part}.weight"] = weight + normal(weight.shape, 0.1)
        out = attn.to_out[0]
        tensors[f"{n}.to_out.0.weight"] = out.weight.detach().double() + normal(out.weight.shape, 0.1)
        tensors[f"{n}.to_out.0.bias"] = out.bias.detach().double() + normal(out.bias.shape, 0.1)
        if middle == -1:
            continue
        for part in ("to_q_", "to_k_"):
            tensors[f"{n}.{part}.0.weight"] = normal((middle, width), width**-0.5)
            tensors[f"{n}.{part}.0.bias"] = normal((middle,), 0.2)
            tensors[f"{n}.{part}.1.weight"] = 1 + normal((middle,), 0.2)
            tensors[f"{n}.{part}.1.bias"] = normal((middle,), 0.2)
            tensors[f"{n}.{part}.3.weight"] = normal((width, middle), middle**-0.5)
            tensors[f"{n}.{part}.3.bias"] = normal((width,), 0.2)
    return {"modules_list": modules}, {k: v.to(dtype or torch.float64) for k, v in tensors.items()}
