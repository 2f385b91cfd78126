"""``trainless doctor``: what this machine has, and what will run on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from .shared import Json, as_json

_PACKAGES = ("trainless", "torch", "transformers", "safetensors", "huggingface-hub")
_COLUMNS = {
    "versions": ("package", "version"),
    "devices": ("device", "about"),
    "kernels": ("operation", "runs", "reason"),
    "extras": ("extra", "package", "state", "purpose"),
    "demo models": ("model", "state"),
    "plug-ins": ("method", "package", "state"),
}


def command(json: bool = Json) -> int:
    """Versions, devices, which kernels will run and why, and which extras are there."""
    from ..tables import table

    versions = [["python", platform.python_version()], *([name, _version(name)] for name in _PACKAGES)]
    found = {
        "versions": versions,
        "devices": _devices(),
        "kernels": _kernels(),
        "extras": _extras(),
        "demo models": _demos(),
        "plug-ins": _plugins(),
    }
    if json:
        entries = {
            name: [dict(zip(_COLUMNS[name], row, strict=True)) for row in rows]
            for name, rows in found.items()
        }
        print(as_json(entries))
        return 0
    for name, rows in found.items():
        if rows:
            print(name)
            print(table(rows, indent=2))
    return 0


def _plugins() -> list[list[str]]:
    """Methods that other packages bring, and those that cannot be used."""
    from ..patchers import broken, known

    own = __name__.partition(".")[0] + "."
    rows = [
        [name, cls.__module__, "ready"] for name, cls in known().items() if not cls.__module__.startswith(own)
    ]
    return rows + [[p.name, p.package, f"cannot be used: {p.reason}"] for p in broken()]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[list[str]]:
    import torch as t

    rows = [["cpu", f"{os.cpu_count()} cores, {t.get_num_threads()} threads, {platform.machine()}; float32"]]
    if t.cuda.is_available():
        for i in range(t.cuda.device_count()):
            properties = t.cuda.get_device_properties(i)
            memory = properties.total_memory / 2**30
            rows.append([f"cuda:{i}", f"{properties.name}, {memory:.0f} GiB; the checkpoint's own dtype"])
    elif t.accelerator.is_available():
        kind = t.accelerator.current_accelerator()
        rows.append([str(kind), f"{t.accelerator.device_count()} devices; the checkpoint's own dtype"])
    else:
        rows.append(["gpu", "none that torch can use"])
    return rows


def _kernels() -> list[list[str]]:
    from ..kernels.dispatch import available

    return [
        [name, choice.name, "; ".join(choice.reasons) or "the fastest form"]
        for name, choice in available().items()
    ]


def _extras() -> list[list[str]]:
    from ..models.extras import EXTRAS, installed

    rows = []
    for package, (extra, purpose) in EXTRAS.items():
        state = "installed" if installed(package) else "missing"
        what = f"'trainless[{extra}]'" if extra else package
        how = "" if state == "installed" else f"; pip install {what}"
        rows.append([extra or "default", package, state, purpose + how])
    return rows


def _demos() -> list[list[str]]:
    from ..errors import TrainlessError
    from ..models import DEMOS, locate

    rows = []
    for name in DEMOS:
        try:
            locate(f"demo:{name}")
            rows.append([f"demo:{name}", "ready"])
        except TrainlessError as error:
            rows.append([f"demo:{name}", str(error)])
    return rows
