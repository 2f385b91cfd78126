"""From a recipe to sites: which sites each method acts on, what it contributes there, and what clashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InputError, NoMatch, Unsupported, near
from ..hosts import Component, components, find_sites, module_sites
from ..patchers import Method
from ..recipes import Recipe, Use
from ..seams import Contribution, Entry, Lease, Site
from .calibration import apply_calibration
from .generating import check_logits


@dataclass
class Binding:
    """One method of a recipe, bound: its sites, what it contributes at each, and what was passed over."""

    use: Use
    method: Method
    lease: Lease
    candidates: int  # sites whose host, role and part fit
    contributions: list[tuple[Site, list[Contribution]]]
    skipped: dict[str, str] = field(default_factory=dict)  # site name -> reason

    @property
    def name(self) -> str:
        return self.method.name

    def entries(self, contributions: Sequence[Contribution]) -> list[Entry]:
        return [Entry(self.name, self.lease, c) for c in contributions]


def bind(model: Any, recipe: Recipe) -> tuple[list[Component], list[Binding]]:
    """Match every method of ``recipe`` to sites of ``model``; nothing is changed yet.

    Raises NoMatch when a method finds nothing, InputError for layers or heads that do not exist,
    CalibrationError for a calibration of another model, RecipeError when the recipe is for other models.
    """
    parts = components(model)
    check_fits(model, parts, recipe)
    sites = find_sites(parts)
    return parts, [bind_one(model, parts, sites, use) for use in recipe.uses]


def check_fits(model: Any, parts: list[Component], recipe: Recipe) -> None:
    if recipe.fits:
        recipe.check_fits(*_names_of(model, parts))


def _names_of(model: Any, parts: list[Component]) -> list[str]:
    """Every name that a recipe may fit: model types, text model types, pipeline classes."""
    names = [c.__name__ for c in type(model).__mro__ if c.__name__.endswith("Pipeline")]
    for module in parts[0].module.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(kind, str) and kind and kind not in names:
            names.append(kind)
    return names or [type(model).__name__]


@dataclass(frozen=True)
class Match:
    """Where a method can act before its own parameters and ``where`` narrow it."""

    sites: list[Site]
    candidates: int  # sites whose host, role and part fit
    skipped: dict[str, str]  # site name -> reason


def match(
    model: Any, parts: list[Component], sites: Sequence[Site], method: Method, part: str | None = None
) -> Match:
    """The sites of ``model`` at which ``method`` can act; NoMatch, with what was looked for, when none."""
    pool = [s for s in sites if s.host in method.hosts]
    if not pool:
        hosts = " and ".join(sorted(method.hosts))
        raise NoMatch(
            f"{method.name}: works on {hosts} models, and {type(model).__name__} has no such attention"
        )
    fitting = [s for s in pool if s.role in method.roles or s.kind == "module"]
    skipped: dict[str, str] = {}
    usable = _default_parts(fitting, method, part, parts)
    for site in usable:
        reason = _site_refusal(method, site)
        if reason:
            skipped[site.name] = reason
    matched = [s for s in usable if s.name not in skipped]
    if not matched:
        raise NoMatch(_nothing(method, model, pool, fitting, usable, skipped))
    return Match(matched, len(usable), skipped)


def bind_one(model: Any, parts: list[Component], sites: list[Site], use: Use) -> Binding:
    """Bind one method of a recipe; ``sites`` are the attention sites of the model. Raises as ``bind`` does."""
    method = apply_calibration(use, parts[0])
    name = method.name
    if method.site_kind == "module":
        sites = module_sites(parts)
    found = match(model, parts, sites, method, use.where.part)
    matched = found.sites
    method.validate(matched)
    chosen = [s for s in matched if method.wants_layer(s)]
    narrowed = use.where.select(chosen) if use.where else chosen
    if use.where and not narrowed:
        use.where.select(matched)  # a layer that does not exist is its own error
        close = [n for glob in use.where.globs for n in near(glob, [s.name for s in chosen])]
        raise NoMatch(
            f"{name}: `where: {use.where.given()}` leaves none of {len(chosen)} matching sites "
            f"({_names(chosen)}{'; near it: ' + ', '.join(close[:3]) if close else ''})"
        )
    if not narrowed:
        raise NoMatch(f"{name}: its own parameters leave none of {len(matched)} layers ({_names(matched)})")
    contributions, skipped = [], dict(found.skipped)
    for site in narrowed:
        given = list(method.contribute(site))
        refusal = site.facts.get("no_cache_layer")
        if refusal and any(c.stateful or c.kind == "kv" for c in given if not c.inert):
            raise Unsupported(f"{name}: {site.name}: {refusal}; use a tested version")
        reason = _contribution_refusal(site, given)
        if reason:
            skipped[site.name] = reason
        elif given:
            contributions.append((site, given))
    if not contributions and len(skipped) > len(found.skipped):
        raise NoMatch(_all_refused(method, model, skipped))
    _check_by_host(parts, contributions)
    check_logits(name, parts, contributions)
    if not contributions:
        raise NoMatch(
            f"{name}: contributes nothing at any of {len(narrowed)} sites; check its heads and layers"
        )
    return Binding(use, method, Lease(name, repr(method)), found.candidates, contributions, skipped)


def _contribution_refusal(site: Site, given: Sequence[Contribution]) -> str | None:
    """Why what a method would do at the site cannot be done there, by what the host knows of it."""
    active = [c for c in given if not c.inert]
    if site.facts.get("no_state") and any(c.stateful or c.statistics for c in active):
        return str(site.facts["no_state"])
    calls = site.facts.get("calls", 1)
    if any("residual" in c.asks for c in active) and (calls > 1 or site.facts.get("no_residual")):
        return str(
            site.facts.get("no_residual") or "its attention runs more than once on what enters its layer"
        )
    own = {"call", site.lasting, "layers" if site.lasting == "sequence" else "call"}
    lasts = next((c.scope for c in active if c.scope not in own), None)
    if lasts is not None:
        return f"a State of scope {lasts!r} is asked for, and here it lasts for a {site.lasting}"
    if site.lasting != "run" and any("step" in c.asks for c in active):
        return "there are no denoising steps here"
    if calls > 1 and any(c.in_order for c in active):
        return "its attention runs more than once for each token, and the method counts rows in their order"
    return None


def _check_by_host(parts: list[Component], contributions: list[tuple[Site, list[Contribution]]]) -> None:
    """Let the host refuse by name what it could not do at a site, before anything is touched."""
    for part in parts:
        check = getattr(part.host, "check", None)
        mine = [(s, given) for s, given in contributions if s.name.startswith(part.prefix)]
        if check is not None and mine:
            check(part.module, mine)


def _default_parts(sites: list[Site], method: Method, part: str | None, parts: list[Component]) -> list[Site]:
    """Narrow to the parts that a method acts on unless ``where: {part}`` names one."""
    if part is not None:
        return [s for s in sites if part in s.parts]
    extra = frozenset().union(*(p.parts for p in parts if not p.main)) if parts else frozenset()
    sites = [s for s in sites if not (s.parts & extra)]
    if method.parts:
        return [s for s in sites if s.parts & method.parts]
    # A model that reads or hears more than text: its text, unless asked otherwise.
    text = [s for s in sites if "text" in s.parts]
    if (
        not text
        and all("vision" in s.parts for s in sites)
        and any(p.main and _writes(p.module) for p in parts)
    ):
        return []  # its text is out of reach, and what it sees was not asked for
    return text or sites


def _writes(module: Any) -> bool:
    """Whether the model generates text; one that only sees does not."""
    asked = getattr(module, "can_generate", None)
    return callable(asked) and bool(asked())


def _site_refusal(method: Method, site: Site) -> str | None:
    return site.refusal or method.refuses(site) or _kv_refusal(method, site)


def _kv_refusal(method: Method, site: Site) -> str | None:
    if not (method.evicts or method.packs):
        return None
    if site.facts.get("no_kv"):
        return str(site.facts["no_kv"])
    if method.evicts and site.facts.get("no_evict"):
        return str(site.facts["no_evict"])
    if site.facts.get("sliding_window"):
        return "a sliding-window layer keeps its own window"
    if site.facts.get("position_bias"):
        return "its position bias needs every key at its place"
    if site.facts.get("shares_kv"):
        return "its keys and values are shared with other layers"
    if not (site.causal or site.facts.get("caches")):
        return "not causal: there is no cache to compress"
    return None


def _nothing(
    method: Method,
    model: Any,
    pool: list[Site],
    fitting: list[Site],
    usable: list[Site],
    skipped: dict[str, str],
) -> str:
    head = f"{method.name}: nothing to patch in {type(model).__name__}"
    if skipped:
        return _all_refused(method, model, skipped)
    wanted = "/".join(sorted(method.roles))
    if not fitting:
        return f"{head}: looked for {wanted} attention among {len(pool)} attention sites ({_names(pool)})"
    parts = "/".join(sorted(method.parts)) or "any part"
    others = "/".join(sorted({p for s in fitting for p in s.parts}))
    said = f"{head}: looked for {wanted} attention in {parts}; the {len(fitting)} sites belong to {others}"
    reasons = [_site_refusal(method, site) for site in fitting]
    if all(reasons):
        return f"{said}, and none of them can be patched: {reasons[0]}"
    return f"{said}; say `where: {{part: …}}` to choose one"


def _all_refused(method: Method, model: Any, skipped: dict[str, str]) -> str:
    first, reason = next(iter(skipped.items()))
    return (
        f"{method.name}: nothing to patch in {type(model).__name__}: all {len(skipped)} candidate sites are refused, "
        f"e.g. {first}: {reason}"
    )


def _names(sites: Sequence[Site]) -> str:
    names = [s.name for s in sites]
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]}"


def entries_by_module(bindings: Sequence[Binding]) -> dict[Any, tuple[Site, list[Entry]]]:
    """What the bindings put at each module, in the order of the recipe."""
    table: dict[Any, tuple[Site, list[Entry]]] = {}
    for binding in bindings:
        for site, contributions in binding.contributions:
            _, entries = table.setdefault(site.module, (site, []))
            entries.extend(binding.entries(contributions))
    return table


def same_plan(binding: Binding, method: Method) -> Binding:
    """The same sites with other parameters (for checking the identity value); a new lease."""
    contributions = [(site, list(method.contribute(site))) for site, _ in binding.contributions]
    return replace(
        binding, method=method, lease=Lease(binding.name, repr(method)), contributions=contributions
    )


__all__ = [
    "Binding", "InputError", "Match", "Unsupported", "bind", "bind_one", "check_fits",
    "entries_by_module", "match", "same_plan",
]  # fmt: skip
