"""The dense attention call: logits, masks, softmax, the rules' edits, output; all in float64.

``install`` runs a stock model through it. The model keeps a plain cache that forgets nothing; what a
rule has evicted is hidden by a mask per batch row and key/value head, which gives what a true eviction
gives. State belongs to one batch of sequences: a call without past tokens starts afresh.

Shapes: B batch, H query heads, Hkv key/value heads, Lq queries of the call, Lk keys so far, D head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "dense_oracle"
CROSS = ("EncDecAttention", "encoder_attn", "encoder_decoder_attention", "crossattention", "cross_attn")
# Arguments of attention functions that change no logits here, or that are read below.
HARMLESS = {
    "dropout",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "sliding_window",  # the mask function has already applied it
    "return_dict",
    "cache_position",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "logits_to_keep",
    "output_router_logits",
}


@dataclass
class Site:
    """One attention layer: module name, role (self, cross), part (encoder, decoder, "") and layer number."""

    name: str
    role: str
    part: str
    layer: int


@dataclass
class Call:
    """One attention call. ``visible`` (B, H, Lq, Lk) is what the model's own mask allows, ``real``
    (B, Lq) the queries that are no padding, ``real_keys`` (B, Lk) likewise; ``past`` = Lk - Lq. ``seen``
    is ``visible`` without what rules have evicted; it is set before the softmax. ``sinks``: a logit for each head
    that takes its part of every row, (1, H, 1, 1), or None."""

    site: Site
    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    real: Tensor
    real_keys: Tensor
    past: int
    model: nn.Module
    scaling: float
    seen: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]


@dataclass
class Trace:
    """Probabilities of one call (B, H, Lq, Lk), before and after edits, and which pairs took part."""

    before: Tensor
    after: Tensor
    seen: Tensor


class Rule:
    """A method. Override what it changes; every hook gets the call and returns its value unchanged.

    ``layers``: layer numbers it acts on (None: all); ``part``: encoder or decoder only (None: both).
    ``state``: per site, cleared when a sequence begins.
    """

    def __init__(self, layers: Collection[int] | None = None, part: str | None = None) -> None:
        self.layers = None if layers is None else set(layers)
        self.part = part
        self._state: dict[str, dict[str, Any]] = {}

    def applies(self, site: Site) -> bool:
        return (
            site.role == "self"
            and (self.layers is None or site.layer in self.layers)
            and self.part in (None, site.part)
        )

    def state(self, call: Call) -> dict[str, Any]:
        return self._state.setdefault(call.site.name, {})

    def attach(self, model: nn.Module) -> list[Any]:
        """Hooks on the model for what a call does not carry; removed when the run ends."""
        return []

    def begin(self, call: Call) -> None:
        """Forget the previous sequences of this site."""
        self._state.pop(call.site.name, None)

    def keys(self, call: Call, key: Tensor) -> Tensor:
        """The keys that the queries meet, (B, Hkv, Lk, D)."""
        return key

    def values(self, call: Call, value: Tensor) -> Tensor:
        """The values that the probabilities meet, (B, Hkv, Lk, D)."""
        return value

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        """The logits before masking, (B, H, Lq, Lk)."""
        return logits

    def learned(self, call: Call, sinks: Tensor) -> Tensor:
        """The learned sink of each head, one more logit in its rows, (1, H, 1, 1)."""
        return sinks

    def seen(self, call: Call, seen: Tensor) -> Tensor:
        """The pairs that take part in the softmax, (B, H, Lq, Lk)."""
        return seen

    def probabilities(self, call: Call, p: Tensor) -> Tensor:
        """The probabilities that meet the values, (B, H, Lq, Lk)."""
        return p

    def output(self, call: Call, out: Tensor) -> Tensor:
        """The heads' outputs, (B, H, Lq, D)."""
        return out

    def after(self, call: Call, p: Tensor) -> None:
        """Called last, with the probabilities before ``probabilities`` of any rule edited them; in the reverse
        order of the rules, so that a store that comes first on the way out of the cache is last on the way in.
        """


@dataclass
class Oracle:
    """What ``install`` yields: the rules, the sites met so far, and a trace of the present sequence."""

    model: nn.Module
    rules: list[Rule]
    sites: dict[int, Site] = field(default_factory=dict)
    real: dict[str, Tensor] = field(default_factory=dict)
    traces: dict[str, list[Trace]] = field(default_factory=dict)
    whole: bool = False  # there is no padding, although a token may be hidden from itself

    def trace(self, layer: int, call: int = -1, part: str = "", role: str = "self") -> Trace:
        """The trace of one call of a layer in the present sequence."""
        for site in self.sites.values():
            if (site.layer, site.part, site.role) == (layer, part, role):
                return self.traces[site.name][call]
        raise KeyError(f"no {role} site {part} {layer}; met: {[s.name for s in self.sites.values()]}")

    def site(self, module: nn.Module) -> Site:
        """Describe an attention module; layers without a number of their own are numbered as they are met."""
        if id(module) not in self.sites:
            name = next(n for n, m in self.model.named_modules() if m is module)
            role = "cross" if any(word in name for word in CROSS) else "self"
            pieces = name.split(".")
            part = next((p for p in ("encoder", "decoder") if p in pieces), "")
            if not getattr(self.model.config, "is_encoder_decoder", False):
                part = ""
            own = getattr(module, "layer_idx", None)
            met = sum(s.role == role and s.part == part for s in self.sites.values())
            self.sites[id(module)] = Site(name, role, part, own if isinstance(own, int) else met)
        return self.sites[id(module)]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor,
        scaling: float,
        bias: Tensor | None,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one call, (B, H, Lq, D). sinks: a logit for each head (H,) that takes its part of every row."""
        site = self.site(module)
        batch, heads, lq, _ = query.shape
        lk = key.shape[2]
        visible = visible.expand(batch, heads, lq, lk)
        past = lk - lq if site.role == "self" else 0
        if site.role == "self":
            # A real token always sees itself, a padding token never does.
            real = visible[:, 0, :, past:].diagonal(dim1=-2, dim2=-1)
            real = torch.ones_like(real) if self.whole else real
            before = self.real[site.name] if past else real[:, :0]
            real_keys = torch.cat([before, real], dim=1)
            self.real[site.name] = real_keys
        else:
            real, real_keys = torch.ones_like(visible[:, 0, :, 0]), visible[:, 0].any(dim=1)
        call = Call(site, query, key, value, visible, real, real_keys, past, self.model, scaling)
        rules = [rule for rule in self.rules if rule.applies(site)]
        if past == 0:
            self.traces[site.name] = []
            for rule in rules:
                rule.begin(call)
        for rule in rules:
            key, value = rule.keys(call, key), rule.values(call, value)
        z = query @ key.repeat_interleave(call.groups, dim=1).transpose(2, 3) * scaling
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        if bias is not None:
            z = z + bias
        seen = visible
        call.sinks = None if sinks is None else sinks[None, :, None, None].to(z)
        for rule in rules:
            call.sinks = None if call.sinks is None else rule.learned(call, call.sinks)
            z = rule.logits(call, z)
            seen = rule.seen(call, seen)
        call.seen = seen
        before_edits = masked_softmax(z, seen, call.sinks)
        p = before_edits
        for rule in rules:
            p = rule.probabilities(call, p)
        out = p @ value.repeat_interleave(call.groups, dim=1)
        for rule in rules:
            out = rule.output(call, out)
        for rule in reversed(rules):
            rule.after(call, before_edits)
        self.traces[site.name].append(Trace(before_edits, p, seen))
        return out


def masked_softmax(logits: Tensor, seen: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the pairs that are seen; a row that sees nothing is all zeros. sinks: a logit of each row besides."""
    weights = torch.where(seen, logits, torch.full_like(logits, -torch.inf))
    top = weights.amax(dim=-1, keepdim=True)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    weights = torch.exp(weights - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(weights.dtype).tiny), weights)


_oracles: weakref.WeakKeyDictionary[nn.Module, Oracle] = weakref.WeakKeyDictionary()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    unknown = {k for k, v in kwargs.items() if v is not None and k not in HARMLESS}
    if unknown:
        raise NotImplementedError(f"the oracle does not know what {sorted(unknown)} do to the logits")
    lq, lk = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
        visible = torch.ones(lq, lk, dtype=torch.bool)[None, None]
        if causal and lq > 1:
            visible = visible.tril(lk - lq)
    elif attention_mask.dtype == torch.bool:
        visible = attention_mask
    else:
        raise NotImplementedError("the oracle builds boolean masks only")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = _oracles[module].attend(module, query, key, value, visible, scaling, position_bias, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The boolean mask of the model's own pattern and padding, always written out."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def install(
    model: nn.Module, rule: Rule | Sequence[Rule] = (), within: nn.Module | None = None
) -> Iterator[Oracle]:
    """Run ``model`` (stock, float64) through the oracle with ``rule``, one or several; restored on exit.

    ``within``: the part whose attention goes through it (None: all); the rest stays stock. Give the model
    a ``DynamicCache()`` made without a config, which keeps everything even in layers with a sliding
    window; ``replay`` does.
    """
    rules = [rule] if isinstance(rule, Rule) else list(rule)
    if any(p.dtype != torch.float64 for p in model.parameters() if p.is_floating_point()):
        raise TypeError("the oracle wants a float64 model: model.double(), or models.build(...)")
    oracle = Oracle(model, rules)
    for module in model.modules():
        _oracles[module] = oracle
    hooks = [hook for one in rules for hook in one.attach(model if within is None else within)]
    try:
        with attention_set(model if within is None else within, NAME):
            yield oracle
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            _oracles.pop(module, None)


@contextmanager
def attention_set(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, every part of ``model`` looks up attention ``name``; restored on exit, each part to its own.

    Part by part, because in transformers 5.17 ``set_attn_implementation`` passes over submodels whose config
    is of the model's own class (T5's stacks hold copies), and leaves those as they are without a word.
    """
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    previous = [part.config._attn_implementation for part in parts]
    try:
        for part in parts:
            part.set_attn_implementation(name)
            if part.config._attn_implementation != name:
                raise NotImplementedError(f"{type(part).__name__} did not take attention {name!r}")
        yield
    finally:
        for part, before in zip(parts, previous, strict=True):
            part.set_attn_implementation(before)
