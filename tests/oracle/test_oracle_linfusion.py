"""Linear attention by its recurrences and by hand; LinFusion in a stock UNet, restored afterwards."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from . import models
from .entropy import _heads
from .linfusion import (
    EPS,
    LinFusion,
    feature,
    install_linfusion,
    linear_attention,
    projected,
    random_weights,
)

NAMES = ["elu", "relu", "softmax"]


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(length=23, d=5):
    return tensor(2, 3, length, d), tensor(2, 3, length, d, seed=1), tensor(2, 3, length, d, seed=2)


def same(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---------------------------------------------------------------- the operator


def test_by_hand():
    def t(*rows):
        return torch.tensor([[[[value] for value in rows]]], dtype=torch.float64)

    q, k, v = t(0.0), t(0.0, math.log(0.5)), t(2.0, 8.0)
    # features: elu(0) + 1 = 1; the keys 1 and 0.5; mean weights 0.5 and 0.25
    same(linear_attention(q, k, v), t((0.5 * 2 + 0.25 * 8) / (0.75 + EPS)))
    same(linear_attention(q, k, v, eps=0.0), t(4.0))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_two_products(name):
    q, k, v = qkv()
    fq, fk, n = feature(q, name), feature(k, name), k.shape[2]
    state = (fk / n**0.5).transpose(2, 3) @ (v / n**0.5)
    z = (fq * fk.mean(dim=2, keepdim=True)).sum(-1, keepdim=True) + EPS
    same(linear_attention(q, k, v, name), fq @ state / z)
    # Chunks of keys in any order add up to the same state.
    chunks = list(zip(fk.split(7, 2), v.split(7, 2), strict=True))
    same(sum(a.transpose(2, 3) @ b for a, b in reversed(chunks)) / n, state)


@pytest.mark.parametrize("name", NAMES)
def test_constant_values_come_out_less_eps(name):
    q, k, v = qkv()
    z = (feature(q, name) * feature(k, name).mean(dim=2, keepdim=True)).sum(-1, keepdim=True) + EPS
    same(linear_attention(q, k, torch.ones_like(v), name), (1 - EPS / z).expand_as(v))
    assert (feature(q, name) >= 0).all()
    if name == "softmax":
        same(feature(q, name).sum(-1), torch.ones(2, 3, 23).double())
    if name == "relu":  # a query without features gives nothing
        assert not linear_attention(-q.abs(), k, v, name).any()


def test_permuted_tokens_permute_the_output():
    q, k, v = qkv()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(5))
    same(
        linear_attention(q[:, :, order], k[:, :, order], v[:, :, order]),
        linear_attention(q, k, v)[:, :, order],
    )
    same(linear_attention(q, k[:, :, order], v[:, :, order]), linear_attention(q, k, v))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("decay", [None, torch.tensor([1.0, 0.9, 0.5]).double()])
def test_causal_form_is_a_recurrence(mean, decay):
    q, k, v = qkv()
    fq, fk = feature(q), feature(k)
    state, keys = torch.zeros(2, 3, 5, 5).double(), torch.zeros(2, 3, 5).double()
    rate = torch.ones(3).double() if decay is None else decay
    rows = []
    for i in range(23):
        state = rate[:, None, None] * state + fk[:, :, i, :, None] * v[:, :, i, None, :]
        keys = rate[:, None] * keys + fk[:, :, i]
        count = i + 1 if mean else 1
        z = (fq[:, :, i] * keys).sum(-1, keepdim=True) / count + EPS
        rows.append(torch.einsum("bhd,bhde->bhe", fq[:, :, i], state) / count / z)
    same(linear_attention(q, k, v, causal=True, mean=mean, decay=decay), torch.stack(rows, dim=2))


# ---------------------------------------------------------------- the projections


def test_projection_is_a_small_network():
    x, mid = tensor(2, 7, 6), 4
    net = torch.nn.Sequential(
        torch.nn.Linear(6, mid), torch.nn.LayerNorm(mid), torch.nn.LeakyReLU(0.01), torch.nn.Linear(mid, 6)
    ).double()
    tensors = {f"0.to_q_.{k}": v.detach() for k, v in net.state_dict().items()}
    assert sorted(tensors) == sorted(f"0.to_q_.{n}.{p}" for n in (0, 1, 3) for p in ("weight", "bias"))
    same(projected(x, tensors, "0.to_q_", mid), x + net(x).detach())
    same(projected(x, {}, "0.to_q_", -1), 2 * x)


# ---------------------------------------------------------------- in a UNet


@pytest.mark.parametrize("mid", [None, 4, -1])
@torch.no_grad()
def test_unet_layers_by_hand_and_restored(mid):
    model, given = models.build("unet"), models.inputs("unet", height=12, width=20)
    config, tensors = random_weights(model, mid)
    names = [entry["module_name"] for entry in config["modules_list"]]
    assert names and all(name.endswith("attn1") for name in names)
    stock, seen = model(**given)[0], {}

    def keep(name):
        return lambda _m, args, kwargs, out: seen.__setitem__(name, (args[0], out))

    hooks = [model.get_submodule(n).register_forward_hook(keep(n), with_kwargs=True) for n in names]
    with install_linfusion(model, LinFusion(config, tensors)):
        got = model(**given)[0]
    for hook in hooks:
        hook.remove()
    assert (got - stock).abs().max() > 1e-3 and torch.equal(model(**given)[0], stock)
    for n, name in enumerate(names):
        x, out = seen[name]
        middle = config["modules_list"][n]["projection_mid_dim"]
        heads = config["modules_list"][n]["heads"]

        def w(part, n=n):
            return tensors[f"{n}.{part}"]

        q = F.elu(_heads(projected(x, tensors, f"{n}.to_q_", middle) @ w("to_q.weight").T, heads)) + 1
        k = F.elu(_heads(projected(x, tensors, f"{n}.to_k_", middle) @ w("to_k.weight").T, heads)) + 1
        v = _heads(x @ w("to_v.weight").T, heads)
        z = q @ k.mean(dim=2).unsqueeze(-1) + EPS
        o = (q @ (k.transpose(2, 3) @ v / k.shape[2]) / z).transpose(1, 2).flatten(2)
        same(out, o @ w("to_out.0.weight").T + w("to_out.0.bias"))


@torch.no_grad()
def test_the_models_own_projections_can_stay():
    model, given = models.build("unet"), models.inputs("unet")
    config, tensors = random_weights(model, 4)
    for n, entry in enumerate(config["modules_list"]):
        attn = model.get_submodule(entry["module_name"])
        for part, module in (("to_q", attn.to_q), ("to_k", attn.to_k), ("to_v", attn.to_v)):
            tensors[f"{n}.{part}.weight"] = module.weight.clone()
        tensors[f"{n}.to_out.0.weight"] = attn.to_out[0].weight.clone()
        tensors[f"{n}.to_out.0.bias"] = attn.to_out[0].bias.clone()
    out = []
    for base in ("file", "module"):
        with install_linfusion(model, LinFusion(config, tensors, base)):
            out.append(model(**given)[0])
    same(*out)


def test_unknown_layers_are_named():
    model = models.build("unet")
    config, tensors = random_weights(model)
    config["modules_list"][0]["module_name"] = "nowhere.attn1"
    with pytest.raises(KeyError, match="nowhere"), install_linfusion(model, LinFusion(config, tensors)):
        pass
