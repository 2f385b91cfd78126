"""What a measurement is, the registry that finds it by name, and what it returns."""

from __future__ import annotations

import datetime
import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import InputError, did_you_mean
from ..hosts import components
from ..patch import calibration
from ..patchers import ANY_MEASUREMENT
from ..patchers import known as methods


class Stopped(Exception):
    """A measurement stopped between two steps because it was asked to; its message says how far it came."""


@dataclass
class Session:
    """How a measurement runs: where it saves, whether it shows progress, and whether it is to stop."""

    out: Path | None = None
    shown: bool = True
    stop: Callable[[], bool] = lambda: False


@dataclass
class Calibration:
    """A finished measurement. ``tensors`` and ``facts`` are what its file holds; ``path`` is that file."""

    measurement: str
    model: nn.Module
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    summary: str
    path: Path | None = None

    def save(self, path: str | Path) -> Path:
        """Write the calibration file (safetensors)."""
        part = components(self.model)[0]
        calibration.save(
            path, self.tensors, measurement=self.measurement, model=self.model,
            family=part.host.family(part.module), facts=self.facts,
        )  # fmt: skip
        self.path = Path(path)
        return self.path

    def to_dict(self) -> dict[str, Any]:
        """The facts, with the path of the file."""
        return {
            "measurement": self.measurement,
            "path": None if self.path is None else str(self.path),
            **self.facts,
        }

    def __str__(self) -> str:
        return self.summary if self.path is None else f"{self.summary}\n  saved     {self.path}"


class Measurement(ABC):
    """Base class of measurements: ``read`` → ``check`` and ``encode`` → ``run``, cheap checks first.

    Made from its options, a mapping; InputError when they are wrong. ``option_table`` lists them as
    (name with its default, help). ``needs_data``: whether there is nothing to measure without data.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True

    @abstractmethod
    def __init__(self, options: Mapping[str, Any]): ...

    @classmethod
    @abstractmethod
    def option_table(cls) -> list[tuple[str, str]]:
        """(name=default, one line of help) of every option."""

    @classmethod
    @abstractmethod
    def is_text(cls, name: str) -> bool:
        """Whether the option ``name`` takes a text as it is, so that a command line need not quote it."""

    @abstractmethod
    def read(self, data: Any) -> None:
        """Read and check the data; InputError with every fault and its file and line."""

    @property
    def reads_images(self) -> bool:
        """Whether the data has images, so that ``encode`` needs the model's processor."""
        return False

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise unless ``model`` can be measured; a model without weights will do."""

    @abstractmethod
    def encode(self, tokenizer: Any, positions: int | None, processor: Any = None) -> None:
        """Turn the data into tokens, and its images into what ``processor`` makes of them.

        InputError for what does not fit ``positions`` or cannot be judged.
        """

    @abstractmethod
    def run(self, model: nn.Module, session: Session) -> Calibration:
        """Measure. Raises Stopped when the session asks for it."""


def provenance(model: nn.Module) -> dict[str, Any]:
    """What every calibration file says of where it was made: model, dtype, versions and date."""
    config: Any = getattr(model, "config", None)
    return {
        "model_name": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(next(model.parameters()).dtype),
        "versions": {name: version(name) for name in ("trainless", "torch", "transformers")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


_registry: dict[str, type[Measurement]] = {}


def register(cls: type[Measurement]) -> type[Measurement]:
    """Class decorator: make a measurement known under its name."""
    _registry[cls.name] = cls
    return cls


def known() -> dict[str, type[Measurement]]:
    """Every measurement by name, sorted."""
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        if info.name != "base" and not info.name.startswith("_"):
            importlib.import_module(f"{__package__}.{info.name}")
    return dict(sorted(_registry.items()))


def get(name: str) -> type[Measurement]:
    """The measurement called ``name``, or the one that the method ``name`` needs; InputError otherwise."""
    measurements, patchers = known(), methods(aliases=True)
    if name in measurements:
        return measurements[name]
    needed = patchers[name].calibration_of if name in patchers else None
    if needed in measurements:
        return measurements[needed]
    if needed == ANY_MEASUREMENT:
        reads = " and ".join(patchers[name].calibration_sets)
        raise InputError(
            f"{name!r} has no measurement of its own: it reads the {reads} of another's file; "
            f"measurements: {', '.join(measurements)}"
        )
    if name in patchers:
        raise InputError(
            f"method {name!r} needs no calibration; measurements: {', '.join(measurements)}"
            if needed is None
            else f"method {name!r} needs the measurement {needed!r}, which does not exist"
        )
    raise InputError(f"unknown measurement {name!r}{did_you_mean(str(name), [*measurements, *patchers])}")


def check_output(out: Path | None) -> None:
    """InputError unless a new file can be written at ``out``."""
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"-o {out}: this is a folder; give a file")
    if out.exists():
        raise InputError(f"-o {out}: the file exists; delete it, or choose another name")
    if not out.parent.is_dir():
        raise InputError(f"-o {out}: there is no folder {str(out.parent)!r}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"-o {out}: the folder {str(out.parent)!r} cannot be written to")
