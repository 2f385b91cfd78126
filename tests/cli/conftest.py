from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_BATCH = Path(__file__).parents[1] / "batch"
sys.path.insert(0, str(_BATCH))
_spec = importlib.util.spec_from_file_location("batch_conftest", _BATCH / "conftest.py")
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)

llama, run = _shared.llama, _shared.run
