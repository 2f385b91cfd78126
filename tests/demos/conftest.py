"""The trained demo models, loaded once, and the scenes, readers and questions that they were trained with."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "examples" / "shapes")]


@pytest.fixture(scope="session")
def pipeline():
    pytest.importorskip("diffusers")
    from trainless.models import load

    return load("demo:shapes").model


@pytest.fixture(scope="session")
def transformer():
    pytest.importorskip("diffusers")
    from trainless.models import load

    return load("demo:shapes-dit").model


@pytest.fixture(scope="session")
def vlm():
    pytest.importorskip("PIL")
    from trainless.models import load

    loaded = load("demo:shapes-vlm")
    return loaded.model, loaded.processor
