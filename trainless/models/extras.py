"""Optional packages: which extra brings them, and one error when one is missing."""

from __future__ import annotations

import importlib.util

from ..errors import InputError

# import name -> (extra of this package, what it enables)
EXTRAS = {
    "diffusers": ("diffusers", "image pipelines"),
    "PIL": ("vlm", "reading and writing images"),
    "gguf": ("gguf", "GGUF files and demo:smollm2"),
    "accelerate": ("gguf", "weights from GGUF files"),
    "sentencepiece": ("gguf", "sentencepiece tokenizers"),
    "pyarrow": ("parquet", "Parquet prompt files"),
    "datasets": ("data", "prompts and calibration data from a `datasets` name"),
    "matplotlib": ("plots", "plots of bench"),
    "numba": ("", "compiled loops over packed caches and windows on a CPU"),
    "triton": ("triton", "GPU kernels"),
}


def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(package: str, purpose: str) -> None:
    """InputError naming the package and its extra unless ``package`` is installed."""
    if not installed(package):
        extra = EXTRAS[package][0]
        raise InputError(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'trainless[{extra}]'"
        )
