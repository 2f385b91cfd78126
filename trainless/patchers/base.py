"""What a method is, and the registry that finds methods by name.

A method is one frozen dataclass in one file: its fields are its parameters (the only source for the
Python signature, YAML, ``--help``, the documentation table and the JSON Schema), its class attributes
say what it is, and ``contribute(site)`` says what it does at a site.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from ..errors import InputError, did_you_mean
from ..seams import Contribution, Site

ENTRY_POINTS = "trainless.methods"
ANY_MEASUREMENT = "*"  # calibration_of: a file of any measurement that holds what the method reads


def option(default: Any = dataclasses.MISSING, *, help: str, origin: str = "ours", **meta: Any) -> Any:
    """A parameter: its default, one line of help, and where the default comes from.

    origin: ``"published"`` for a value from the paper or its code, ``"ours"`` otherwise. Further
    metadata: ``low``, ``high`` (inclusive bounds), ``choices``.
    """
    metadata = {"help": help, "origin": origin, **meta}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class of methods; a subclass is a frozen dataclass of parameters.

    Class attributes: ``name``; ``aliases``; ``summary`` (one line); ``source`` (paper or code, by
    name); ``parts`` (parts of a model it acts on unless ``where: {part}`` says otherwise; empty: all);
    ``roles``; ``hosts``; ``identity`` (parameter values at which it is bitwise the identity, or None);
    ``calibration_of`` (name of the measurement that makes its calibration file, ANY_MEASUREMENT, or
    None); ``calibration_sets`` (parameters that such a file holds as tensors of the same name; they
    cannot be given beside it); ``calibration_settings`` (parameters that the file records as the
    settings of its measurement, in groups: used unless the user gives one of the group); ``instead`` (parameters
    that stand in the place of others: neither is given beside the other); ``site_kind`` ("attention", or
    "module" to be offered every module); ``evicts`` (whether it drops cache entries); ``packs`` (whether it
    stores cache entries at a lower precision); ``by_size`` (whether what it does depends on the size of the image, so
    that a pipeline which paints another one than asked has to be said).
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    parts: ClassVar[frozenset[str]] = frozenset()
    roles: ClassVar[frozenset[str]] = frozenset({"self"})
    hosts: ClassVar[frozenset[str]] = frozenset({"transformers"})
    identity: ClassVar[dict[str, Any] | None] = None
    calibration_of: ClassVar[str | None] = None
    calibration_sets: ClassVar[tuple[str, ...]] = ()
    calibration_settings: ClassVar[tuple[tuple[str, ...], ...]] = ()
    instead: ClassVar[dict[str, tuple[str, ...]]] = {}
    site_kind: ClassVar[str] = "attention"
    evicts: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    by_size: ClassVar[bool] = False

    def calibrated(self, tensors: dict[str, Any], facts: dict[str, Any]) -> Method:
        """These parameters with what a calibration file holds for ``calibration_sets``; settings are in already."""
        if not self.calibration_sets:
            raise InputError(f"{self.name} takes no calibration")
        return dataclasses.replace(self, **{name: tensors[name].tolist() for name in self.calibration_sets})

    def check(self) -> None:
        """Raise InputError when the parameters make no sense; called before anything is touched."""

    def refuses(self, site: Site) -> str | None:
        """Why this method cannot act at ``site`` although its role and part fit, or None."""
        return None

    def wants_layer(self, site: Site) -> bool:
        """Whether the method's own parameters (layers, skip_layers, heads) choose this site's layer."""
        return True

    def validate(self, sites: Sequence[Site]) -> None:
        """Raise InputError when a parameter names a layer or head that does not exist among ``sites``."""

    def contribute(self, site: Site) -> Sequence[Contribution]:
        """What the method does at ``site``."""
        raise InputError(f"{self.name} defines no contribution")


@dataclasses.dataclass(frozen=True)
class BrokenPlugin:
    """An entry point whose method cannot be used, and why; everything else goes on without it."""

    name: str
    package: str
    reason: str

    def __str__(self) -> str:
        return f"the plug-in {self.name!r} of the package {self.package} cannot be used ({self.reason})"


_registry: dict[str, type[Method]] = {}
_broken: list[BrokenPlugin] = []
_scanned = False


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known under its name and aliases; InputError, and nothing, for one taken."""
    for name in (cls.name, *cls.aliases):
        other = _registry.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"method name {name!r} is taken by {other.__module__}.{other.__qualname__}")
    _registry.update(dict.fromkeys((cls.name, *cls.aliases), cls))
    return cls


def _scan() -> None:
    global _scanned
    if _scanned:
        return
    _scanned = True
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        if info.name != "base" and not info.name.startswith("_"):
            importlib.import_module(f"{__package__}.{info.name}")
    from importlib.metadata import entry_points

    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: (p.name, p.value)):
        _plug_in(point)


def _plug_in(point: Any) -> None:
    """Register the method of one entry point; one that fails is noted, and leaves nothing behind."""
    before = dict(_registry)
    try:
        register(_method(point.load()))
    except (Exception, SystemExit) as error:
        _registry.clear()
        _registry.update(before)
        lines = str(error).strip().splitlines() or ["no message"]
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        package = getattr(point.dist, "name", None) or point.value.partition(":")[0]
        broken = BrokenPlugin(point.name, package, kind + lines[0])
        _broken.append(broken)
        warnings.warn(f"{broken}; correct or uninstall it", stacklevel=2)


def _method(found: Any) -> type[Method]:
    """What an entry point brought, when it is a method whose parameters can be read."""
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"{found!r} is not a subclass of trainless.patchers.Method")
    if "__dataclass_fields__" not in vars(found):
        raise InputError(f"{found.__name__} is not a dataclass: decorate it with @dataclass(frozen=True)")
    names = (found.name, *found.aliases)
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{found.__name__} has no name")
    typing.get_type_hints(found)  # an annotation that does not exist would end every listing
    return found


def broken() -> list[BrokenPlugin]:
    """The plug-ins that cannot be used."""
    _scan()
    return list(_broken)


def known(aliases: bool = False) -> dict[str, type[Method]]:
    """Every method by name, sorted; with aliases when asked."""
    _scan()
    return {n: c for n, c in sorted(_registry.items()) if aliases or n == c.name}


def get(name: str) -> type[Method]:
    """The method called ``name``, or InputError with the nearest name."""
    _scan()
    if not isinstance(name, str) or name not in _registry:
        raise InputError(unknown(str(name), _registry))
    return _registry[name]


def unknown(name: str, names: Iterable[str]) -> str:
    """Why there is no method ``name``: its plug-in cannot be used, or the nearest of ``names``."""
    for plugin in broken():
        if plugin.name == name:
            return f"{plugin}; correct or uninstall it"
    return f"unknown method {name!r}{did_you_mean(name, names)}"


def parameters_of(cls: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """The parameters of a method, by name, in order."""
    return {f.name: f for f in dataclasses.fields(cls)}
