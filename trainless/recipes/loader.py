"""From what the user names (a method, a recipe, a path, a mapping, a list) to a Recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean
from ..patchers import broken, get, known
from . import packaged
from .draft import Draft, GivenPatches, find, separate
from .faults import Faults
from .folder import RECIPE_FILE
from .recipe import Recipe
from .structure import Fits, Parsed, Structure, intersect
from .text import LIMIT_BYTES, RecipeSource, parse, read_source

SUFFIXES = (".yaml", ".yml")
WHERE = "where."  # begins the key of a --set that narrows a patch
LAYER = re.compile(r"-?\d{1,9}")
MOST_FILES = 100  # read for one recipe; bases that name two bases each would double at every level

What = str | Path | Recipe | Mapping[str, Any] | Sequence[Any]


def resolve(
    what: What,
    parameters: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe that ``what`` means, checked completely; raises before anything is touched.

    what: a method's name or alias, a packaged recipe's name, a path (a YAML file, or a folder that
    ``Patch.save`` wrote), a recipe as a mapping, ``{use, with, where, id}``, a Recipe, or a list of
    these. parameters: for a single method name only. sets: ``"name.key=value"`` strings, where name is
    a method in use or the id of a patch, and value is a YAML scalar or flow list; ``name.where.key=value``
    narrows that patch. where: ``{layers, part, modules}`` of the only patch that ``what`` holds.

    Raises InputError for arguments and mappings, RecipeError (``file:line key: reason``) for files,
    CalibrationError for a missing calibration file; each with every fault that was found.
    """
    if isinstance(what, Recipe) and not (parameters or sets or where):
        return what
    faults = Faults()
    loader = _Loader(faults)
    parts = loader.parts(what, parameters)
    drafts = separate([d for part in parts for d in part.drafts])
    fits = None if faults else _common(parts, faults)
    # A single recipe keeps its name; several are named after all of them.
    name = "+".join(dict.fromkeys(part.name for part in parts))
    description = parts[0].description if len(parts) == 1 else ""
    # Without a sound recipe it is not known what is in use, so faults of --set wait for it.
    overrides = [] if faults else [_override(text, drafts, faults) for text in sets]
    if where is not None and not faults:
        _narrow(where, drafts)
    uses = [draft.build(faults) for draft in drafts]
    faults.raise_all()
    return Recipe(
        name=name,
        uses=[use for use in uses if use is not None],
        fits=fits,
        description=description,
        drafts=drafts,
        overrides=[o for o in overrides if o is not None],
    )


def _common(parts: Sequence[Parsed], faults: Faults) -> Fits | None:
    given = [part for part in parts if part.fits is not None]
    if not given:
        return None
    common = intersect([part.fits for part in given if part.fits is not None])
    if not common:
        names = " and ".join(part.name for part in given)
        faults.add(RecipeSource("argument"), (), f"{names} fit no model in common; use one of them")
    return common or None


def _override(text: str, drafts: list[Draft], faults: Faults) -> tuple[str, str] | None:
    """Put one ``name.key=value`` into its draft; what it set, or None after a fault."""
    source = RecipeSource("--set")
    left, equals, right = text.partition("=")
    name, dot, key = left.strip().partition(".")
    if not (equals and dot and name and key):
        faults.add(source, (), f"{text!r} is not name.key=value, such as h2o.recent=64", key="--set")
        return None
    label = f"--set {name}.{key}"
    draft = find(drafts, name, known(aliases=True).get(name))
    if isinstance(draft, str):
        faults.add(source, (), draft, key=label)
        return None
    before = len(faults.found)
    if key.startswith(WHERE):
        draft.where[key.removeprefix(WHERE)] = GivenPatches(_where_value(right), source, (), label)
        return draft.id, key
    value = parse(
        right, source, lambda at, line, reason: faults.add(source, (), f"{right!r} {reason}", key=label)
    )
    if len(faults.found) == before:
        draft.given[key] = GivenPatches(value, source, (), label)
    return draft.id, key


def _where_value(text: str) -> Any:
    """A layer's number, a list, or the text itself: a slice such as ``2:`` means something else in YAML."""
    text = text.strip()
    if text.startswith("["):
        return [_where_value(item.strip("\"' ")) for item in text.strip("[]").split(",") if item.strip()]
    return int(text) if LAYER.fullmatch(text) else text


def _narrow(where: Mapping[str, Any], drafts: list[Draft]) -> None:
    """Put a ``where`` that was given beside the recipe into its only patch."""
    if not isinstance(where, Mapping):
        raise InputError(
            f"where={where!r}: must be a mapping of layers, part or modules, such as {{'layers': '2:'}}"
        )
    if len(drafts) != 1:
        ids = ", ".join(d.id for d in drafts)
        raise InputError(
            f"where goes with a single method, and there are {len(drafts)} here ({ids}); write it in each patch"
        )
    source = RecipeSource("argument")
    drafts[0].where |= {
        k: GivenPatches(v, source, (k,), f"{drafts[0].id}.where.{k}") for k, v in where.items()
    }


class _Loader:
    def __init__(self, faults: Faults):
        self.faults = faults
        self.chain: list[str] = []  # files being read, outermost first, to find cycles
        self.files = 0

    def parts(self, what: Any, parameters: Mapping[str, Any] | None) -> list[Parsed]:
        if isinstance(what, (list, tuple)):
            _no_parameters(parameters, "a list; write {use: …, with: {…}} in it")
            if not what:
                raise InputError("the list of methods and recipes is empty; name at least one")
            return [self.part(item, f"[{i}]") for i, item in enumerate(what)]
        if isinstance(what, str) and what in known(aliases=True):
            return [self.method(what, parameters or {})]
        _no_parameters(parameters, f"{what!r}" if isinstance(what, (str, Path)) else "a mapping")
        return [self.part(what, "")]

    def part(self, what: Any, key: str) -> Parsed:
        if isinstance(what, Recipe):
            # its drafts are copied, so that --set leaves the given recipe alone
            return Parsed(what.name, what.description, what.fits, [d.copy() for d in what.drafts])
        if isinstance(what, Mapping):
            return self.mapping(what, key)
        if isinstance(what, str) and what in known(aliases=True):
            return self.method(what, {})
        if isinstance(what, str):
            return self.named(what)
        if isinstance(what, Path):
            return self.path(what)
        raise InputError(
            f"{what!r} is neither the name of a method or recipe, a path, a mapping nor a list of these"
        )

    def method(self, name: str, parameters: Mapping[str, Any]) -> Parsed:
        cls, source = get(name), RecipeSource("argument")
        given = {k: GivenPatches(v, source, (k,), f"{cls.name}.{k}") for k, v in parameters.items()}
        return Parsed(cls.name, drafts=[Draft(cls.name, cls, source, (), cls.name, given=given)])

    def mapping(self, data: Mapping[str, Any], key: str) -> Parsed:
        source = RecipeSource("mapping")
        structure = Structure(source, self.faults, self.base)
        if "use" in data and "patches" not in data:
            draft = structure.patch(data, (), key)
            return Parsed(draft.cls.name, drafts=[draft]) if draft is not None else Parsed("mapping")
        return structure.recipe(data, "mapping")

    def named(self, name: str) -> Parsed:
        if name in packaged.packaged():
            return self.file(
                packaged.read(name), RecipeSource(f"{name}.yaml", is_file=True, packaged=True), name
            )
        if "://" in name:
            raise InputError(f"{name!r} is a URL; download the recipe and name it by its path")
        path = Path(name)
        if path.exists() or path.suffix in SUFFIXES or name.startswith(("./", "../", "/")):
            return self.path(path)
        if any(plugin.name == name for plugin in broken()):
            get(name)
        names = [*known(aliases=True), *packaged.packaged()]
        raise InputError(f"{name!r} is neither a method nor a recipe{did_you_mean(name, names)}")

    def path(self, path: Path) -> Parsed:
        if path.is_dir():
            if not (path / RECIPE_FILE).is_file():
                raise InputError(f"folder {str(path)!r} has no {RECIPE_FILE}; name a recipe file")
            path = path / RECIPE_FILE
        if not path.is_file():
            raise InputError(f"no recipe file {str(path)!r}")
        return self.file(
            _read(path), RecipeSource(str(path), is_file=True, folder=path.parent), str(path.resolve())
        )

    def file(self, raw: bytes, source: RecipeSource, identity: str) -> Parsed:
        before = len(self.faults.found)
        read_source(raw, source, self.faults.reporter(source))
        if source.data is None and len(self.faults.found) > before:
            return Parsed(source.label)
        self.chain.append(identity)
        try:
            name = source.label.removesuffix(".yaml") if source.packaged else Path(source.label).stem
            return Structure(source, self.faults, self.base).recipe(source.data, name)
        finally:
            self.chain.pop()

    def base(self, target: str, given: GivenPatches) -> Parsed | None:
        """The recipe that an ``extends`` names, or None after a fault at ``given``."""
        if "://" in target:
            given.fault(
                self.faults, (), f"{target!r} is a URL; a recipe extends packaged names and local files"
            )
            return None
        if target in packaged.packaged():
            source = RecipeSource(f"{target}.yaml", is_file=True, packaged=True)
            return self.guarded(target, packaged.read(target), source, given)
        path = Path(given.source.folder or Path.cwd()) / target
        if Path(target).is_absolute() or given.source.packaged or not path.is_file():
            reason = (
                "must be relative" if Path(target).is_absolute() else "is no packaged recipe and no file here"
            )
            given.fault(self.faults, (), f"{target!r} {reason}{did_you_mean(target, packaged.packaged())}")
            return None
        # A base is named as its child names it, so that a message can be followed from file to file.
        source = RecipeSource(str(path), is_file=True, folder=path.parent)
        return self.guarded(str(path.resolve()), _read(path), source, given)

    def guarded(self, identity: str, raw: bytes, source: RecipeSource, given: GivenPatches) -> Parsed | None:
        if identity in self.chain:
            cycle = [*self.chain[self.chain.index(identity) :], identity]
            given.fault(self.faults, (), f"cycle: {' → '.join(Path(c).name for c in cycle)}")
            return None
        self.files += 1
        if self.files > MOST_FILES:
            given.fault(self.faults, (), f"extends more than {MOST_FILES} files")
            return None
        return self.file(raw, source, identity)


def _read(path: Path) -> bytes:
    """The file's bytes, and one more than is allowed when it is too large."""
    try:
        with path.open("rb") as file:
            return file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read recipe {str(path)!r}: {error.strerror}") from None


def _no_parameters(parameters: Mapping[str, Any] | None, kind: str) -> None:
    if parameters:
        raise InputError(
            f"parameters ({', '.join(parameters)}) go with a single method name, not with {kind}"
        )


def load_recipe(what: What) -> Recipe:
    """The recipe that ``what`` names, checked; see :func:`resolve`."""
    return resolve(what)
