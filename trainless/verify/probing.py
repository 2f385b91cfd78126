"""Running probes: which ones, the same inputs and seeds each time, and what two runs have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.runtime import Tally
from ..errors import InputError
from ..hosts import Component
from ..hosts.probes import SEED, STEPS, Probe, default_probes
from ..hosts.transformers.version import CACHE_NAMES
from ..seams import Evict, Lease, Quantise, Site
from .standing import Standing, runtimes, seed

BASE = 64  # tokens of a prefill: more than few rows, so that the blocked kernels are tried
MOST = 2048  # tokens of a prefill that is made longer so that an evictor has something to drop


# ---------------------------------------------------------------- which probes


Make = Callable[[Any, Sequence[Site], int], list[Probe]]


def probes_for(
    parts: Sequence[Component], sites: Sequence[Site], tokens: int, make: Make = default_probes
) -> list[Probe]:
    """The probes of every component that one of ``sites`` belongs to; Unsupported names what has none."""
    found = []
    for part in parts:
        own = [s for s in sites if s.name.startswith(part.prefix)]
        longer = [p for p in parts if len(p.prefix) > len(part.prefix)]
        own = [s for s in own if not any(s.name.startswith(p.prefix) for p in longer)]
        if own:
            found += make(part, own, tokens)
    return found


def tokens_for(rules: Sequence[Evict | Quantise], least: int = 0) -> int:
    """A prefill length at which every rule of the cache has to drop or pack something, where that is within reason.

    least: that of contributions which act in long calls alone.
    """
    need = max(BASE, least) if least <= MOST else BASE
    for rule in rules:
        if isinstance(rule, Evict):
            parts = (rule.sinks, rule.recent, rule.heavy)
        else:
            parts = (rule.residual, max(rule.group, rule.interval), rule.start)
        fixed = sum(b for b in parts if isinstance(b, int))
        share = sum(b for b in parts if isinstance(b, float))
        if share < 1:
            need = max(need, int((fixed + STEPS + 1) / (1 - share)) + 8)
    return need if need <= MOST else BASE


def user_probe(model: Any, parts: Sequence[Component], given: Any) -> Probe:
    """A probe from what the user gave: inputs of the model by name, input ids, or a function of the model."""
    # A diffusers pipeline is called as a whole; it has its own arguments.
    target = model if parts[0].prefix else parts[0].module
    if isinstance(given, Mapping):
        return Probe("the inputs given", lambda: target(**_fresh(dict(given))))
    if isinstance(given, Tensor):
        from ..hosts.transformers.probe import cached

        ids = given if given.dim() == 2 else given[None]
        module = parts[0].module
        if parts[0].host.name != "transformers" or ids.is_floating_point():
            raise InputError("probe: a tensor means input ids; for other inputs give a dictionary of them")
        if not any(getattr(m, "is_causal", False) for m in module.modules()):
            return Probe(f"the {ids.shape[1]} tokens given", lambda: module(input_ids=ids))
        said = f"the {ids.shape[1]} tokens given, then {min(STEPS, ids.shape[1])} cached steps"
        return Probe(said, lambda: cached(module, ids, ids[:, :STEPS]))
    if callable(given):
        return Probe("the function given", lambda: given(model))
    raise InputError(
        f"probe={type(given).__name__}: give a dictionary of the model's inputs, a tensor of input ids, "
        "or a function of the model that returns its outputs"
    )


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with copies of what a call may change: caches and containers, not tensors."""
    return {k: v if isinstance(v, Tensor) else deepcopy(v) for k, v in inputs.items()}


# ---------------------------------------------------------------- running


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor and image in an output, depth first; caches are not outputs."""
    if isinstance(value, Tensor):
        yield value.detach().clone()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in CACHE_NAMES:
                yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__array__") or hasattr(value, "getbands"):
        import numpy

        array = numpy.asarray(value)
        if array.dtype.kind in "fiub":
            yield torch.from_numpy(array.copy())


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of outputs agree in shape, type and every bit."""
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y)]
    return torch.equal(raw[0], raw[1])


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> str:
    """How two lists of outputs differ, for people."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return "the outputs differ in number or shape"
    most = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel():
            gap = (x.double() - y.double()).abs()
            most = max(most, float(gap.nan_to_num(float("inf")).max()))
    return f"the outputs differ by up to {most:.3g}"


# ---------------------------------------------------------------- counting


@dataclass
class Ran:
    """One run of every probe: per probe, its output tensors and the counters of each patch at each module."""

    outputs: list[list[Tensor]]
    counts: list[dict[nn.Module, dict[Lease, Tally]]]

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for found in self.outputs for tensor in found]

    def at(self, site: Site, lease: Lease, probe: int | None = None) -> Tally:
        """The counters of one patch's method at one site, over all probes or in one."""
        total = Tally()
        for found in self.counts if probe is None else [self.counts[probe]]:
            tally = found.get(site.module, {}).get(lease)
            if tally is not None:
                total.fired += tally.fired
                total.acted += tally.acted
                total.kernels.update(tally.kernels)
                total.tokens_seen = max(total.tokens_seen, tally.tokens_seen)
                total.tokens_kept = max(total.tokens_kept, tally.tokens_kept)
        return total

    def calls_of_others(self, leases: set[Lease]) -> list[tuple[int, int, int, int]]:
        """What every patch but ``leases`` did, in a form in which two runs can be compared."""
        return [
            (id(module), id(lease), tally.fired, tally.acted)
            for found in self.counts
            for module, tallies in found.items()
            for lease, tally in tallies.items()
            if lease not in leases
        ]


def run(standing: Standing, probes: Sequence[Probe]) -> Ran:
    """Run every probe with all counters at zero; random numbers are drawn from the same seed each time."""
    ran = Ran([], [])
    for probe in probes:
        standing.fresh()
        here = runtimes(standing.parts)
        seed(SEED)
        ran.outputs.append(list(tensors_in(probe.run())))
        for runtime in here:
            runtime.fold()
        ran.counts.append({runtime.site.module: dict(runtime.tallies) for runtime in here})
    if not ran.tensors:
        raise InputError("the probe gives no tensors or images to compare; return the model's outputs")
    return ran
