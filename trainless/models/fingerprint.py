"""A model's identity: the content of its weights, configuration and tokenizer, or its hub commit.

The place of the folder, its name and the time of its files do not count, so a copied model is the
same model, and a model whose weights were changed in place is another one.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from .sources import ModelSource

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")
_CONFIGURATION = (
    "*config.json",
    "*.index.json",
    "model_index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
_NOT_THE_MODEL = ("training_args.bin", "optimizer*", "scheduler.pt", "rng_state*", "scaler.pt")


def fingerprint(source: ModelSource) -> str:
    """32 hex digits that change when, and only when, what the model computes may change."""
    digest = hashlib.sha256()
    if source.repo and source.commit:
        digest.update(f"{source.repo}@{source.commit}".encode())
        return digest.hexdigest()[:32]
    files = [source.folder / source.gguf] if source.gguf else _files(source.folder)
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL, and big models come in many files
        for path, content in zip(files, pool.map(_content, files), strict=True):
            # A GGUF file is the whole model: what it is called says nothing.
            name = "gguf" if source.gguf else path.relative_to(source.folder).as_posix()
            digest.update(f"{name}\0{path.stat().st_size}\0{content}\n".encode())
    return digest.hexdigest()[:32]


def weight_files(folder: Path) -> list[Path]:
    """Files with weights in a model folder or its direct subfolders."""
    return [p for p in _files(folder) if any(fnmatch(p.name, g) for g in _WEIGHTS)]


def _files(folder: Path) -> list[Path]:
    found = [
        path
        for path in (*folder.iterdir(), *folder.glob("*/*"))
        if path.is_file()
        and any(fnmatch(path.name, glob) for glob in (*_WEIGHTS, *_CONFIGURATION))
        and not any(fnmatch(path.name, glob) for glob in _NOT_THE_MODEL)
    ]
    return sorted(found)


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
