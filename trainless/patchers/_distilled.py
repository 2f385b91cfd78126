"""Published weights that were distilled for a method: read from a folder or file, and matched strictly.

A publication is one or more safetensors files, with a ``config.json`` beside them where the method has one.
Nothing is read but names and shapes until a tensor is written into the model, one at a time. A method says
under which key it expects each tensor of the model; whatever is missing, left over or of another shape is
one error that names it, before anything is changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError, Unsupported
from ..seams import Site, parameter_of, why_not_plain

CONFIG = "config.json"
SHOWN = 3  # names that a message gives as examples
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Distilled:
    """What a publication holds. files: key -> its file; shapes: key -> shape; config: its config.json or {}."""

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self.files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def under(self, keys: Mapping[str, str]) -> Mapping[str, Tensor]:
        """Tensors by the names that the model has for them; ``keys``: that name -> key here. Read on access."""
        return _Lazy(self, dict(keys))


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, source: Distilled, keys: dict[str, str]):
        self.source, self.keys_ = source, keys

    def __getitem__(self, name: str) -> Tensor:
        return self.source[self.keys_[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def distilled(path: str | Path, method: str) -> Distilled:
    """The publication at ``path``, a folder or a safetensors file; its headers are read once per version.

    Raises InputError for a path that is not there, holds no safetensors, or cannot be read.
    """
    place = Path(path).expanduser()
    files = _files(place, method)
    folder = place if place.is_dir() else place.parent
    stamps = tuple(
        (f, f.stat().st_mtime_ns, f.stat().st_size) for f in (*files, folder / CONFIG) if f.is_file()
    )
    return _read(place, stamps, method)


def _files(place: Path, method: str) -> Sequence[Path]:
    said = f"{method}: weights={str(place)!r}"
    if place.is_file() and place.suffix == ".safetensors":
        return [place]
    if place.is_file():
        raise InputError(
            f"{said} is not a safetensors file; pickled weights are not read, convert them first"
        )
    if not place.is_dir():
        raise InputError(
            f"{said} is neither a folder nor a file here; download the weights and give their path"
        )
    found = sorted(place.glob("*.safetensors"))
    if not found:
        raise InputError(f"{said} holds no .safetensors file; give the folder that does")
    return found


@functools.lru_cache(maxsize=8)
def _read(place: Path, stamps: tuple[tuple[Path, int, int], ...], method: str) -> Distilled:
    files: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    config: dict[str, Any] = {}
    twice = quantised = ""
    for path, _, _ in stamps:
        try:
            if path.name == CONFIG:
                config = json.loads(path.read_text(encoding="utf-8"))
                continue
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    twice = twice or (key if key in files else "")
                    held = file.get_slice(key)
                    files[key], shapes[key] = path, tuple(held.get_shape())
                    if "F" not in held.get_dtype():
                        quantised = quantised or f"{key!r} as {held.get_dtype()}"
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{method}: {path} cannot be read ({error}); download it again") from None
    if twice:
        raise InputError(f"{method}: {place} holds {twice!r} in more than one file; leave one of them there")
    if quantised:
        raise InputError(
            f"{method}: {place} holds {quantised}, which is no floating-point number: quantised weights are not "
            "read; give the ones that were published"
        )
    if not isinstance(config, dict):
        raise InputError(f"{method}: {place / CONFIG} is not a JSON object; download it again")
    return Distilled(place, files, shapes, config)


def shape_at(site: Site, name: str) -> Shape | None:
    """Shape of a site's parameter, adapters or not; None where the model has no such parameter."""
    found = parameter_of(site.module, name)
    return None if found is None else tuple(getattr(*found).shape)


def check_plain(sites: Sequence[Site], layers: Sequence[str], method: str) -> None:
    """Unsupported, by name, unless every one of ``layers`` that a site has holds ordinary tensors."""
    for site in sites:
        for name in (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
            reason = why_not_plain(site.module, name)
            if reason is not None:
                raise Unsupported(
                    f"{method}: {site.name}.{name} cannot be replaced: {reason}; load the model unquantised and "
                    "unwrapped"
                )


def check_keys(source: Distilled, expected: Mapping[str, Shape | None], method: str) -> None:
    """InputError unless the publication holds exactly ``expected``: key -> shape that the model needs.

    None as a shape: any. The message names missing keys, unexpected keys and other shapes together.
    """
    missing = [key for key in expected if key not in source.shapes]
    unexpected = [key for key in source.shapes if key not in expected]
    wrong = [
        f"{key} is {source.shapes[key]}, the model needs {shape}"
        for key, shape in expected.items()
        if shape is not None and key in source.shapes and source.shapes[key] != shape
    ]
    faults = [
        f"{len(found)} {kind} ({_some(found)})"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if found
    ]
    if faults:
        raise InputError(
            f"{method}: the tensors in {source.path} do not fit: {'; '.join(faults)}. These are weights of "
            "another base model or another method; give the ones made for this model"
        )


def _some(found: Sequence[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more
