"""Calibration files: what was measured on a model, in safetensors, with where it came from.

A file names the measurement, the model it was made on (family, sizes, a fingerprint of its weights), the
data and the settings. ``patch(model, method, calibration=FILE)`` refuses a file of another model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor, nn

from ..edits.journal import stored
from ..errors import CalibrationError, InputError
from ..hosts import Component
from ..patchers import ANY_MEASUREMENT, Method
from ..recipes import Use
from ..recipes.values import build

FORMAT = "trainless calibration 1"


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's shape and of a sample of its weights; independent of the device.

    Sixteen values of each of sixteen tensors, rounded to bfloat16, so that loads of one checkpoint in
    float64, float32 and bfloat16 agree, and two checkpoints of one architecture do not. (A float16 load
    agrees when the checkpoint is no wider than float16: rounding twice is not rounding once.)
    """
    state = [(n, t) for n, t in model.named_parameters() if t.dim() >= 1]
    digest = hashlib.sha256()
    for name, tensor in state:
        # A part that torch.compile wraps is the same part.
        digest.update(f"{name.replace('_orig_mod.', '')}{tuple(tensor.shape)}".encode())
    for name, _ in _sampled(state):
        values = _values(model, name)
        if values is None:
            continue
        flat = values.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 16)][:16].cpu().to(torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled(state: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return state[:: max(1, len(state) // 16)]


def _values(model: nn.Module, name: str) -> Tensor | None:
    """The values of a parameter, those of an offloaded one too; None on the meta device."""
    owner, _, leaf = name.rpartition(".")
    return stored(model.get_submodule(owner), leaf)


def _weightless(model: nn.Module) -> bool:
    state = [(n, t) for n, t in model.named_parameters() if t.dim() >= 1]
    return any(_values(model, name) is None for name, _ in _sampled(state))


def shape_of(model: nn.Module, family: str) -> dict[str, str]:
    """The facts by which a calibration recognises its model."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    facts = {"family": family}
    for name in (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "vocab_size",
    ):
        value = getattr(text, name, None)
        if value is not None:
            facts[name] = str(value)
    return facts


def save(
    path: str | Path,
    tensors: dict[str, Tensor],
    *,
    measurement: str,
    model: nn.Module,
    family: str,
    facts: dict[str, Any],
) -> None:
    """Write a calibration file; ``facts`` (data, settings, scores …) go in as JSON."""
    metadata = {
        "format": FORMAT,
        "measurement": measurement,
        "model": json.dumps(shape_of(model, family)),
        "fingerprint": fingerprint(model),
        "facts": json.dumps(facts),
    }
    metadata["checksum"] = checksum(tensors, metadata)
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        # Written by us: safetensors' own writer leaves a file that only its owner can read.
        temporary.write_bytes(serialised({k: v.contiguous() for k, v in tensors.items()}, metadata=metadata))
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cannot be written ({str(error).strip() or type(error).__name__})"
        ) from error


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of everything that a file says: names, types, shapes and bytes of its tensors, and its metadata."""
    digest = hashlib.sha256()
    facts = {name: text for name, text in metadata.items() if name != "checksum"}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a calibration file; CalibrationError when it is missing or not one."""
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"{path}: no such calibration file; make one with `trainless calibrate`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("format") != FORMAT:
            raise CalibrationError(
                f"{path}: a safetensors file, but not a calibration ({FORMAT!r} is missing)"
            )
        # Files of earlier versions have none.
        if "checksum" in metadata and metadata["checksum"] != checksum(tensors, metadata):
            raise CalibrationError(
                f"{path}: its contents are not those that were measured: it was damaged or edited since; make it again"
            )
        return tensors, {
            "measurement": metadata["measurement"],
            "model": json.loads(metadata["model"]),
            "fingerprint": metadata["fingerprint"],
            "facts": json.loads(metadata.get("facts", "{}")),
        }
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CalibrationError(f"{path}: cannot be read as a calibration ({error}); make it again") from None


def check_fits(
    path: str | Path, metadata: dict[str, Any], measurement: str, model: nn.Module, family: str
) -> None:
    """CalibrationError unless the file is of this measurement (or any will do) and of this very model."""
    if measurement not in (ANY_MEASUREMENT, metadata["measurement"]):
        raise CalibrationError(f"{path}: holds {metadata['measurement']!r}, and {measurement!r} is needed")
    ours = shape_of(model, family)
    for name, value in metadata["model"].items():
        if ours.get(name) != value:
            raise CalibrationError(
                f"{path}: made for a model with {name} {value}, this one has {ours.get(name, 'none')}; "
                "calibrate this model"
            )
    if not _weightless(model) and metadata["fingerprint"] != fingerprint(model):
        raise CalibrationError(
            f"{path}: made for other weights of the same architecture "
            f"(fingerprint {metadata['fingerprint']}, here {fingerprint(model)}); calibrate this model"
        )


def apply_calibration(use: Use, component: Component) -> Method:
    """The method of ``use`` with its calibration file read, checked and applied; unchanged without one.

    The file decides the method's ``calibration_sets``. Of the settings that it was measured with, those
    are taken over which the user did not give: what was given wins.
    """
    method, path = use.method, use.calibration
    if path is None:
        return method
    tensors, metadata = load(path)
    family = component.host.family(component.module)
    check_fits(path, metadata, method.calibration_of or method.name, component.module, family)
    missing = [name for name in method.calibration_sets if name not in tensors]
    if missing:
        raise CalibrationError(
            f"{path}: a measurement of {metadata['measurement']!r} without the {missing[0]} that {method.name} reads"
        )
    recorded = metadata["facts"].get("parameters", {})
    settings = {name: value for name, value in recorded.items() if name in use.from_calibration}
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    faults: list[str] = []
    made = build(type(method), {**values, **settings}, lambda at, why: faults.append(f"{at}: {why}"))
    if made is None:
        raise CalibrationError(f"{path}: its settings make no sense ({faults[0]}); make it again")
    try:
        made = made.calibrated(tensors, metadata["facts"])
        made.check()
    except InputError as error:
        raise CalibrationError(f"{path}: {error}; make it again") from None
    return made
