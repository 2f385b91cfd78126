"""Test-only methods, one for each seam that the six methods leave unused; registered while a test needs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
from torch import Tensor

from trainless import seams
from trainless.patchers import Method, register
from trainless.patchers.base import _registry
from trainless.seams import Contribution, ExtraKeys, Groups, MassMove, Pairs, Site, Tokens

Make = Callable[[Site], Sequence[Contribution]]


def toy(name: str, make: Make, **attributes: Any) -> type[Method]:
    """A method without parameters that contributes ``make(site)``."""
    body = {"name": f"toy_{name}", "contribute": lambda self, site: make(site), **attributes}
    cls = make_dataclass(f"Toy_{name}", [], bases=(Method,), namespace=body, frozen=True)
    cls.__module__ = __name__
    return cls


@contextmanager
def registered(*methods: type[Method]) -> Iterator[None]:
    """Inside, ``patch(model, "toy_…")`` knows these methods."""
    from trainless.patchers import known

    known()  # scan first, so that the real ones are there
    before = dict(_registry)
    for method in methods:
        register(method)
    try:
        yield
    finally:
        _registry.clear()
        _registry.update(before)


def with_toys(*methods: type[Method]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> Any:
            with registered(*methods):
                return test(*args, **kwargs)

        return run

    return wrap


# ---------------------------------------------------------------- keys


def extra(layer: int, kv_heads: int = 2, width: int = 8, count: int = 3) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, (1, Hkv, E, D)."""
    g = torch.Generator().manual_seed(50 + layer)
    make = functools.partial(torch.randn, 1, kv_heads, count, width, generator=g, dtype=torch.float64)
    return make(), make()


def visible_extra(rows: int) -> Tensor:
    """(1, 1, rows, 3): odd rows do not see the last of the three."""
    seen = torch.ones(1, 1, rows, 3, dtype=torch.bool)
    seen[..., 1::2, 2] = False
    return seen


def _keys(site: Site) -> Sequence[Contribution]:
    def value(call: Any, stats: Any, state: Any) -> ExtraKeys:
        key, value = (t.expand(call.shape[0], -1, -1, -1).to(call.query.dtype) for t in extra(site.layer))
        return ExtraKeys(key, value, visible_extra(call.shape[3]))

    return [seams.Keys(value)]


def _more_keys(site: Site) -> Sequence[Contribution]:
    def value(call: Any, stats: Any, state: Any) -> ExtraKeys:
        key, value = (t.expand(call.shape[0], -1, -1, -1) for t in extra(site.layer + 10))
        return ExtraKeys(key, value)

    return [seams.Keys(value)]


Keys, MoreKeys = toy("keys", _keys), toy("more_keys", _more_keys)

# ---------------------------------------------------------------- chosen rows

PROBED: dict[int, list[tuple[Tensor, Tensor]]] = {}


def last_and_third(call: Any, state: Any) -> Tensor:
    """bool (B, Lq): every third row, another third in each row of the batch, and the last one."""
    b, lq = call.shape[0], call.shape[3]
    chosen = (torch.arange(lq)[None] + torch.arange(b)[:, None]) % 3 == 0
    chosen[:, -1] = True
    return chosen


def twice_and_none(call: Any, state: Any) -> Tensor:
    """int64 (B, 4): the last row twice, one in the middle, none."""
    b, lq = call.shape[0], call.shape[3]
    return torch.tensor([lq - 1, lq // 2, lq - 1, -1]).expand(b, 4)


def _probe(probes: Any) -> Make:
    def make(site: Site) -> Sequence[Contribution]:
        def value(call: Any, stats: Any, state: Any) -> None:
            PROBED.setdefault(site.layer, []).append((stats.probe_mass.clone(), stats.probe_rows.clone()))

        return [seams.Observe(value, needs={"probe_mass"}, probes=probes)]

    return make


ProbeMask, ProbeIndex = toy("probe_mask", _probe(last_and_third)), toy("probe_index", _probe(twice_and_none))
ProbeNone = toy(
    "probe_none",
    lambda site: [seams.Observe(lambda c, s, t: None, needs={"probe_mass"}, probes=lambda c, s: None)],
)

# ---------------------------------------------------------------- patterns


def near(q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() < 5


def even(q: Tensor, k: Tensor) -> Tensor:
    return (k % 2 == 0) | (q == k)


def _static(predicate: Any) -> Make:
    return lambda site: [seams.Pattern(lambda call, stats, state: Pairs(predicate))]


Near, Even = toy("near", _static(near)), toy("even", _static(even))
Nothing = toy("nothing", lambda site: [seams.Pattern(lambda call, stats, state: None)])


def chosen(mass: Tensor) -> Tensor:
    """bool (Lk,): the better half of the keys, by mass summed over rows and heads (B, H, Lk)."""
    total = mass.sum((0, 1))
    keep = torch.zeros_like(total, dtype=torch.bool)
    keep[total.topk((total.numel() + 1) // 2).indices] = True
    return keep


def _dynamic(site: Site) -> Sequence[Contribution]:
    def value(call: Any, stats: Any, state: Any) -> Pairs:
        keep = chosen(stats.column_mass)
        return Pairs(lambda q, k: keep[k] | (q == k))

    return [seams.Pattern(value, needs={"column_mass"})]


Dynamic = toy("dynamic", _dynamic)


def taking_part(mass: Tensor, real: Tensor) -> Tensor:
    """bool (B, Lk): in each row the better half of the real keys, by mass (B, H, Lk), and the last one."""
    total = mass.sum(1).masked_fill(~real, -1.0)
    rank = total.argsort(dim=1, descending=True, stable=True).argsort(1)
    keep = (rank < (real.sum(1, keepdim=True) + 1) // 2) & real
    keep[:, -1] = True
    return keep


def _tokens(site: Site) -> Sequence[Contribution]:
    def value(call: Any, stats: Any, state: Any) -> Tokens:
        real = state.get("real")
        own = torch.ones(call.shape[0], call.shape[3], dtype=torch.bool) if call.real is None else call.real
        real = own if real is None else torch.cat([real, own], 1)
        state.set("real", real)
        return Tokens(taking_part(stats.probe_mass, real))

    return [
        seams.Pattern(value, needs={"probe_mass"}, probes=last_and_third, scope="sequence",
        )
    ]  # fmt: skip


Subset = toy("subset", _tokens)

# ---------------------------------------------------------------- form, observe, position, mass


def feature(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def linear(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Linear attention over the pairs that are seen, (B, H, Lq, D)."""
    weights = (feature(query) @ feature(key).mT) * seen
    return (weights @ value) / weights.sum(-1, keepdim=True).clamp_min(1e-300)


def _form(site: Site) -> Sequence[Contribution]:
    def value(call: Any, stats: Any, state: Any) -> Tensor:
        _, h, hkv, lq, lk = call.shape
        key, value = (t.repeat_interleave(h // hkv, 1) for t in (call.key, call.value))
        seen = (
            torch.ones(1, 1, lq, lk, dtype=torch.bool).tril(lk - lq)
            if site.causal
            else torch.ones(1, 1, lq, lk)
        )
        if call.mask is not None:
            seen = call.mask
        return linear(call.query, key, value, seen).transpose(1, 2)

    return [seams.Form(value)]


Form, OtherForm = toy("form", _form), toy("other_form", _form)


@dataclass
class Seen:
    """What the observer saw, per layer and call."""

    lse: list[Tensor]
    column_mass: list[Tensor]


SEEN: dict[int, Seen] = {}


def _observe(site: Site) -> Sequence[Contribution]:
    def value(call: Any, stats: Any, state: Any) -> None:
        seen = SEEN.setdefault(site.layer, Seen([], []))
        seen.lse.append(stats.lse.clone())
        seen.column_mass.append(stats.column_mass.clone())

    return [seams.Observe(value, needs={"lse", "column_mass"})]


Observe, ObserveToo = toy("observe", _observe), toy("observe_too", _observe)


def _position(site: Site) -> Sequence[Contribution]:
    def value(call: Any, stats: Any, state: Any) -> Tensor:
        b, _, hkv, _, lk = call.shape
        return torch.arange(lk).expand(b, hkv, lk) % 3

    return [seams.Position(value)]


Position, OtherPosition = toy("position", _position), toy("other_position", _position)


def _mass_of(heads: tuple[int, ...]) -> Make:
    def make(site: Site) -> Sequence[Contribution]:
        def value(call: Any, stats: Any, state: Any) -> MassMove:
            lk = call.shape[4]
            source = (torch.arange(lk) % 3 == 1).expand(call.shape[0], len(heads), lk)
            target = (torch.arange(lk) % 3 == 0).expand(call.shape[0], len(heads), lk)
            return MassMove(source, 0.25, target)

        return [seams.Mass(value, heads=heads)]

    return make


Mass, MassElsewhere, MassHere = (
    toy("mass", _mass_of((0, 1))),
    toy("mass_elsewhere", _mass_of((2, 3))),
    toy("mass_here", _mass_of((1, 2))),
)


def _lse_elsewhere(site: Site) -> Sequence[Contribution]:
    def value(call: Any, stats: Any, state: Any) -> None:
        SEEN.setdefault(site.layer, Seen([], [])).lse.append(stats.lse.clone())

    return [seams.Mass(value, needs={"lse"}, heads=(2, 3))]


LseElsewhere = toy("lse_elsewhere", _lse_elsewhere)


GATE = 0.3


def _gated(heads: tuple[int, ...] | None) -> Make:
    """On odd rows of the sequence, where every third key from the second on has GATE of the mass: most of it moves."""

    def make(site: Site) -> Sequence[Contribution]:
        def thirds(call: Any) -> Tensor:
            return torch.arange(call.shape[4]) % 3

        def groups(call: Any, state: Any) -> Groups:
            b, _, _, lq, lk = call.shape
            of = torch.where(thirds(call) == 1, 1, torch.where(thirds(call) == 0, 2, 0))
            rows = (torch.arange(lk - lq, lk) % 2 == 1).expand(b, lq)
            return Groups(of.expand(b, 1, lk), 2, rows)

        def value(call: Any, stats: Any, state: Any) -> MassMove:
            b, h, _, _, lk = call.shape
            own = list(range(h) if heads is None else heads)
            gate = stats.group_mass[:, own, :, 0] >= GATE
            source, target = ((thirds(call) == n).expand(b, len(own), lk) for n in (1, 0))
            return MassMove(source, 0.25, target, gate)

        return [seams.Mass(value, heads=heads, groups=groups)]

    return make


Gated, GatedHeads = toy("gated", _gated(None)), toy("gated_heads", _gated((1, 2)))
