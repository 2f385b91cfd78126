"""Calibration files: what was measured on a model, in safetensors, with where it came from.

A file names the measurement, the model it was made on (family, sizes, a fingerprint of its weights), the
data and the settings. ``patch(model, method, calibration=FILE)`` refuses a file of another model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CalibrationError
from .hosts import Component
from .patchers import Method

FORMAT = "trainless calibration 1"


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's shape and of a sample of its weights; independent of dtype and device.

    Sixteen values of each of sixteen tensors, rounded to 2 significant digits, so that float32 and
    bfloat16 loads of one checkpoint agree and two checkpoints of one architecture do not.
    """
    state = [(n, t) for n, t in model.named_parameters() if t.dim() >= 1]
    digest = hashlib.sha256()
    for name, tensor in state:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
    step = max(1, len(state) // 16)
    for _, tensor in state[::step]:
        flat = tensor.detach().reshape(-1)
        if flat.device.type == "meta":
            continue
        sample = flat[:: max(1, flat.numel() // 16)][:16].float().cpu().tolist()
        digest.update(" ".join(f"{v:.1e}" for v in sample).encode())
    return digest.hexdigest()[:16]


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
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
    temporary.replace(path)


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
    """CalibrationError unless the file is of this measurement and of this very model."""
    if metadata["measurement"] != measurement:
        raise CalibrationError(f"{path}: holds {metadata['measurement']!r}, and {measurement!r} is needed")
    ours = shape_of(model, family)
    for name, value in metadata["model"].items():
        if ours.get(name) != value:
            raise CalibrationError(
                f"{path}: made for a model with {name} {value}, this one has {ours.get(name, 'none')}; "
                "calibrate this model"
            )
    meta = any(p.device.type == "meta" for p in model.parameters())
    if not meta and metadata["fingerprint"] != fingerprint(model):
        raise CalibrationError(
            f"{path}: made for other weights of the same architecture "
            f"(fingerprint {metadata['fingerprint']}, here {fingerprint(model)}); calibrate this model"
        )


def apply_calibration(method: Method, path: Path | None, component: Component) -> Method:
    """``method`` with its calibration file read, checked and applied; unchanged when it has none."""
    if path is None:
        return method
    tensors, metadata = load(path)
    family = component.host.family(component.module)
    check_fits(path, metadata, method.calibration_of or method.name, component.module, family)
    return method.calibrated(tensors, metadata["facts"])
