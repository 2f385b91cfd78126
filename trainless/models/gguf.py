"""Read GGUF files at a bearable speed.

transformers parses the whole file header once for the config, again for the tokenizer and again for
the weights, and rebuilds the table of tensor names for every module: half a minute for a model of
135M parameters. Inside this context both are computed once and remembered, and the parser cuts its
hundred thousands of small pieces out of a plain array, which takes half the time of a `numpy.memmap`.
Drop when transformers reads the header once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_readers: dict[tuple[str, int, int], Any] = {}


class _PlainMaps:
    """numpy, but for ``memmap``, which is a plain array over the same mapping."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def memmap(*given: Any, **named: Any) -> np.ndarray[Any, Any]:
        return np.memmap(*given, **named).view(np.ndarray)


@contextmanager
def remembered() -> Iterator[None]:
    """Memoise the header reader and the name table of the ``gguf`` package while the block runs.

    The converter's progress bar, which no setting of transformers turns off, is left out as well.
    """
    gguf: Any = importlib.import_module("gguf")
    converter: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    parser: Any = importlib.import_module("gguf.gguf_reader")
    reader, names, bar, numbers = gguf.GGUFReader, gguf.get_tensor_name_map, converter.tqdm, parser.np

    def read(path: Any, mode: str = "r") -> Any:
        stat = Path(path).stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in _readers:
            _readers.clear()
            _readers[key] = reader(path, mode)
        return _readers[key]

    gguf.GGUFReader = read
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=4)(names)
    converter.tqdm = lambda steps, **_: steps
    parser.np = _PlainMaps()
    try:
        yield
    finally:
        parser.np = numbers
        gguf.GGUFReader, gguf.get_tensor_name_map, converter.tqdm = reader, names, bar


def dense() -> dict[str, Any]:
    """Keywords for ``from_pretrained``: weights as ordinary tensors, whatever else is installed.

    Newer versions of transformers keep a file's blocks packed where a package with kernels is at hand, and fetch
    those from the hub; the same command would then compute something else on another machine.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def forget() -> None:
    """Let go of the parsed headers; call when the weights are loaded."""
    _readers.clear()
