"""Measurements on a model that methods are calibrated with: one file each, found by name.

``calibrate`` runs one and writes its calibration file. Files whose names begin with an underscore are what
measurements share.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Calibration

__all__ = ["calibrate"]


def calibrate(
    model: Any,
    name: str,
    *,
    data: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Calibration:
    """Run the measurement ``name`` (or the one that the method ``name`` needs) on a loaded ``model``.

    data: a JSONL file, a `datasets` name or folder, a loaded Dataset, or a list of mappings; some measurements
    need none. tokenizer: the model's; a transformers pipeline brings its own. processor: the model's, when the
    data has images. out: where to save; beside it a progress file, from
    which an interrupted call goes on. options: the measurement's, which are the method's parameters and
    how to read the data; see ``trainless calibrate --help``.

    Returns the Calibration, saved when ``out`` is given. The model is left as it was found. Raises
    InputError for bad options or data, with file and line; CalibrationError when nothing is worth saving.
    """
    from ..errors import InputError
    from ..hosts import components
    from .base import Session, check_output, get

    measurement = get(name)(options)
    if data is None and measurement.needs_data:
        raise InputError(f"data=None: {measurement.name} is measured on data; give a file or a list of rows")
    measurement.read(data)
    session = Session(None if out is None else Path(out), shown=progress)
    check_output(session.out)
    processor = getattr(model, "processor", None) if processor is None else processor
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise InputError("tokenizer=None: give the model's tokenizer; it turns the data into tokens")
    module = components(model)[0].module
    measurement.check(module)
    text = getattr(module.config, "get_text_config", lambda: module.config)()
    measurement.encode(tokenizer, getattr(text, "max_position_embeddings", None), processor)
    return measurement.run(module, session)
