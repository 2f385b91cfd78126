"""``trainless doctor``: what this machine has, and what will run on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("trainless", "torch", "transformers", "safetensors", "huggingface-hub")


def command() -> int:
    """Versions, devices, which kernels will run and why, and which extras are there."""
    from ..tables import table

    print("versions")
    rows = [["python", platform.python_version()], *([name, _version(name)] for name in _PACKAGES)]
    print(table(rows, indent=2))
    print("devices")
    print(table(_devices(), indent=2))
    print("kernels")
    print(table(_kernels(), indent=2))
    print("extras")
    print(table(_extras(), indent=2))
    print("demo models")
    print(table(_demos(), indent=2))
    return 0


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
        how = "" if state == "installed" else f"; pip install 'trainless[{extra}]'"
        rows.append([f"{extra}", package, state, purpose + how])
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
