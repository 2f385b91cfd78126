"""The scripts of examples/shapes import each other as scripts do: from their own folder."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))
