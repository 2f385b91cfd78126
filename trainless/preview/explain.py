"""``explain``: what ``patch`` would do to a model, without doing it. Works on weightless models too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, TrainlessError
from ..hosts import Component, components, find_sites, size_notes, unmatched
from ..hosts.base import unwrapped
from ..patch.binding import Binding, bind_one, check_fits
from ..patch.compiling import cache_notes, compile_notes
from ..patch.conflicts import find_conflicts
from ..patch.generating import logits_notes
from ..patch.report import size, unmatched_lines
from ..recipes import Recipe, resolve
from ..recipes.values import values_of
from ..tables import ranges, table, wrapped
from .memory import CacheEstimate, estimate


@dataclass(frozen=True)
class Problem:
    """Why ``patch`` would refuse. kind: the name of the error it would raise; method: "" for the whole recipe."""

    kind: str
    method: str
    message: str

    def to_dict(self) -> dict[str, str]:
        return dict(vars(self))


@dataclass(frozen=True)
class MethodPlan:
    """What one method would do: ``sites`` of ``of`` candidates, in these layers, through these seams.

    skipped: reason → sites that are passed over for it. inert: known now to change nothing.
    """

    method: str
    parameters: dict[str, Any]
    sites: int = 0
    of: int = 0
    layers: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    seams: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    inert: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items() if v is not None)
        lines = [wrapped(f"{self.method}({given})", 0, len(self.method) + 1)]
        if not self.of:
            return lines[0]
        where = f", layers {ranges(self.layers)}" if self.layers else ""
        rows = [["sites", f"{self.sites}/{self.of}{where}"], ["seams", ", ".join(self.seams)]]
        rows += [["skipped", f"{count} ×: {reason}"] for reason, count in self.skipped.items()]
        if self.inert:
            rows.append(["note", "at its identity value: it would change nothing, and cost nothing"])
        return "\n".join([*lines, table(rows, indent=2)])


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; prints as text. ``ok``: ``patch`` would go through. ``cache``: see CacheEstimate.

    unmatched: modules that go by the name of attention and that no patch can reach, by class.
    """

    model: str
    recipe: str
    methods: list[MethodPlan]
    problems: list[Problem]
    cache: CacheEstimate | None
    notes: list[str] = field(default_factory=list)  # what does not stand in the way, and has to be known
    unmatched: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "recipe": self.recipe,
            "ok": self.ok,
            "methods": [m.to_dict() for m in self.methods],
            "problems": [p.to_dict() for p in self.problems],
            "cache": None if self.cache is None else self.cache.to_dict(),
            "notes": list(self.notes),
            "unmatched": dict(self.unmatched),
        }

    def __str__(self) -> str:
        blocks = [f"{self.recipe} on {self.model}", *(str(m) for m in self.methods)]
        if self.cache is not None:
            blocks.append(_cache_text(self.cache))
        blocks += [wrapped(line, 0, 2) for line in unmatched_lines(self.unmatched)]
        blocks += [wrapped(f"{p.kind}: {p.message}", 0, 2) for p in self.problems]
        blocks += [wrapped(f"Note: {note}", 0, 2) for note in self.notes]
        if self.ok:
            blocks.append("Nothing is in the way of this patch.")
        return "\n".join(blocks)


def explain(
    model: Any, what: Any, *, where: Mapping[str, Any] | None = None, **parameters: Any
) -> Explanation:
    """What ``patch(model, what, where=where, **parameters)`` would touch; nothing is changed.

    Reasons for which it would be refused (NoMatch, Unsupported, Conflict, a calibration of another
    model, layers or heads that do not exist) come back as data, all of them. Raises InputError or
    RecipeError when ``what`` itself is malformed, and InputError when ``model`` is no model.
    """
    recipe = resolve(what, parameters, where=where)
    parts = components(model)
    plans, bindings, problems = _bind_all(model, recipe, parts)
    clashes = [Problem("Conflict", "", sentence) for sentence in find_conflicts(bindings)]
    # Which of two clashing rules would hold is not known, so there is nothing to estimate.
    cache = estimate(parts, bindings) if bindings and not clashes else None
    notes = size_notes(parts) if any(b.method.by_size for b in bindings) else []
    notes += role_notes(bindings) + compile_notes(bindings) + cache_notes(parts, bindings)
    notes += logits_notes(bindings)
    name = type(unwrapped(model)).__name__
    return Explanation(name, recipe.name, plans, problems + clashes, cache, notes, unmatched(parts))


def role_notes(bindings: Sequence[Binding]) -> list[str]:
    """What is taken for granted of attention classes that do not say whose keys they read."""
    sites = {site.name: site.facts.get("undeclared") for b in bindings for site, _ in b.contributions}
    counts = Counter(name for name in sites.values() if name is not None)
    return [
        f"{name} ({count} {'layers' if count > 1 else 'layer'}) is not among transformers' own classes and does not say "
        "whose keys it reads (is_cross_attention): taken for self-attention. Calls with key_value_states or "
        "encoder_hidden_states run unpatched; others where keys and queries differ in number are refused"
        for name, count in counts.items()
    ]


def fits(model: Any, recipe: Recipe) -> bool:
    """Whether a recipe is made for models such as this one: its ``fits`` names it."""
    try:
        check_fits(model, components(model), recipe)
    except InputError:
        return False
    return recipe.fits is not None


def _bind_all(
    model: Any, recipe: Recipe, parts: list[Component]
) -> tuple[list[MethodPlan], list[Binding], list[Problem]]:
    problems: list[Problem] = []
    bindings: list[Binding] = []
    plans = [MethodPlan(use.method.name, values_of(use.method)) for use in recipe.uses]
    try:
        check_fits(model, parts, recipe)
    except TrainlessError as error:
        problems.append(_problem(error, ""))
    try:
        sites = find_sites(parts)
    except TrainlessError as error:
        return plans, [], [*problems, _problem(error, "")]
    for i, use in enumerate(recipe.uses):
        try:
            binding = bind_one(model, parts, sites, use)
        except TrainlessError as error:
            problems.append(_problem(error, use.method.name))
            continue
        bindings.append(binding)
        plans[i] = _plan(binding)
    return plans, bindings, problems


def _problem(error: TrainlessError, method: str) -> Problem:
    return Problem(type(error).__name__, method, str(error))


def _plan(binding: Binding) -> MethodPlan:
    sites = [site for site, _ in binding.contributions]
    given = [c for _, contributions in binding.contributions for c in contributions]
    return MethodPlan(
        binding.name,
        values_of(binding.method),
        sites=len(sites),
        of=binding.candidates,
        layers=_layers(sites),
        names=tuple(site.name for site in sites),
        seams=tuple(dict.fromkeys(c.kind for c in given)),
        skipped=dict(Counter(binding.skipped.values())),
        inert=all(c.inert for c in given),
    )


def _layers(sites: Sequence[Any]) -> tuple[int, ...]:
    """Layer numbers, when they are of one part and role and so mean something together."""
    groups = {(site.parts, site.role) for site in sites}
    return tuple(site.layer for site in sites) if len(groups) == 1 and sites[0].kind == "attention" else ()


def _cache_text(cache: CacheEstimate) -> str:
    rows = [["KV cache, one sequence", "unpatched", "patched"]]
    for point in cache.points:
        rows.append([f"  {point.tokens:,} tokens", size(point.unpatched), _patched_text(point.patched)])
    text = table(rows, right=(1, 2))
    known = f"{cache.dtype}, {cache.layers} layers; an estimate for after the prefill, which needs all of it"
    if any(point.beyond for point in cache.points):
        known += f"; the model was made for {cache.positions:,} positions"
    return f"{text}\n{wrapped(known, 2)}"


def _patched_text(patched: int | None) -> str:
    return "depends on the prompt" if patched is None else size(patched)


__all__ = ["Explanation", "MethodPlan", "Problem", "explain"]
